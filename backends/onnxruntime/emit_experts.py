"""Sparse experts as ONNX nodes: a conditional for each expert, over the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import numpy_helper

from liquidc.backends.onnxruntime.emit_qmoe import qmoe
from liquidc.backends.onnxruntime.emit_quantised import product
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import Op, Value, ops
from liquidc.ir.types import dim_names
from liquidc.ir.weights import sizes

F32 = np.float32
Body = Callable[[Graph, str, int], str]
"""Adds the nodes of one expert to its arm: from tokens [n, D] and its number to [n, D]."""


def _by_expert(
    g: Graph, op: ops.GroupedExperts | ops.MapExperts, params: list[Value], body: Body
) -> list[str]:
    """Conditionals over the slots that hold each expert; sums in the order of the slots.

    Without branching, the same on no rows for an expert that no slot holds.
    """
    experts, width = sizes([*params[0].shape[:1], op.y.shape[-1]])
    x, chosen, weight = (g.flat(g.name(v), v.shape) for v in (op.x, op.index, op.weight))
    hits = g.op("Equal", [chosen, g.const(np.arange(experts).reshape(-1, 1, 1))])
    any_hit = g.op("ReduceMax", [hits, g.const([1, 2])], keepdims=0)
    some = [any_hit]
    if experts > 1:
        some = g.op("Split", [any_hit], experts, axis=0, num_outputs=experts)
    values: list[str] = []
    places: list[str] = []
    moe = f"moe{g.shared.layers.get(op, '')}"
    group = f"{g.prefix}/{moe}" if g.prefix else moe
    for expert in range(experts):
        label = f"{group}/expert{expert}"
        run, skip = g.arm(label), g.arm(f"{label}/skip")
        found = run.op("NonZero", [run.op("Gather", [hits, g.const(expert)])])
        tokens = run.op("Gather", [x, run.op("Gather", [found, g.const(0)])])
        if op.apply == "input":
            share = run.op("GatherND", [weight, run.op("Transpose", [found])])
            tokens = run.op("Mul", [tokens, run.op("Unsqueeze", [share, g.const([1])])])
        y = body(run, tokens, expert)
        if g.shared.branching:
            run.finish([y, found])
            nothing = np.zeros((0, width), F32), np.zeros((2, 0), np.int64)
            # Constants are no nodes of a loaded graph.
            tensors = map(numpy_helper.from_array, nothing)
            skip.finish([skip.op("Constant", [], value=tensor) for tensor in tensors])
            y, found = g.conditional(some[expert], run, skip, 2)
        else:
            g.nodes += run.nodes
        values.append(y)
        places.append(found)
    total = g.op("Concat", [g.op("Shape", [chosen]), g.const([width])], axis=0)
    blank = g.op("ConstantOfShape", [total])
    slots = g.op("Transpose", [g.op("Concat", places, axis=1)])
    spread = g.op("ScatterND", [blank, slots, g.op("Concat", values, axis=0)])
    if op.apply == "output":
        spread = g.op("Mul", [spread, g.op("Unsqueeze", [weight, g.const([2])])])
    summed = g.op("ReduceSum", [spread, g.const([1])], keepdims=0)
    return [g.unflat(summed, op.y.shape)]


def grouped_experts(g: Graph, op: ops.GroupedExperts) -> list[str]:
    """SwiGLU experts: two products each, or one operator for all."""
    if g.shared.choices.fused_experts:
        return qmoe(g, op)

    def swiglu(arm: Graph, tokens: str, expert: int) -> str:
        both = product(arm, tokens, op.gate_up, expert=expert, rounded=op.input_block)
        gate, up = arm.op("Split", [both], 2, axis=1, num_outputs=2)
        inner = arm.op("Mul", [arm.contrib("QuickGelu", [gate], alpha=1.0), up])
        return product(arm, inner, op.down, expert=expert, rounded=op.inner_block)

    return _by_expert(g, op, [op.gate_up, op.down], swiglu)


def map_experts(g: Graph, op: ops.MapExperts) -> list[str]:
    """Experts of any body, which sees its tokens as one row of a batch: [1, n, D]."""
    lead = op.x.shape[:-1]
    inside = {value for inner in op.body.walk() for value in inner.results} | set(op.body.args)
    for value in (value for inner in op.body.walk() for value in inner.operands):
        if value not in inside and dim_names(value.shape):
            raise UnsupportedError(
                f"onnxruntime: an expert at {op.loc} uses %{value.name} of all tokens"
            )

    def region(arm: Graph, tokens: str, expert: int) -> str:
        count = arm.op("Shape", [tokens], start=0, end=1)
        arm.dims |= {str(dim): arm.const([1]) for dim in lead[:-1]} | {str(lead[-1]): count}
        x, *others = op.body.args
        arm.names[x] = arm.reshape(tokens, ["n", x.shape[-1]], x.shape)
        params = [arm.expert(param, expert) for param in op.params]
        arm.names |= dict(zip(others, params, strict=True))
        arm.shared.emit(arm, op.body)
        y = op.body.terminator.operands[0]
        return arm.flat(arm.name(y), y.shape)

    return _by_expert(g, op, list(op.params), region)


EMIT: dict[type[Op], Emit] = {
    ops.GroupedExperts: grouped_experts,
    ops.MapExperts: map_experts,
}
"""Lowerings by op class."""

"""Sparse experts as ONNX nodes: a conditional for each expert, over the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from liquidc.backends.onnxruntime.emit_qmoe import qmoe
from liquidc.backends.onnxruntime.emit_quantised import product
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import DType, Op, Value, ops
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
    slots = sizes(op.index.shape[-1:])[0]
    x = g.flat(g.name(op.x), op.x.shape)
    chosen = g.op("Reshape", [g.name(op.index), g.const([-1])])
    weight = g.op("Reshape", [g.name(op.weight), g.const([-1, 1])])
    hits = g.op("Equal", [g.const(np.arange(experts)[:, None]), chosen])
    small = g.op("Cast", [hits], to=ELEMENT[DType.U8])
    any_hit = g.op("ReduceMax", [small, g.const([1])], keepdims=0)
    any_hit = g.op("Cast", [any_hit], to=ELEMENT[DType.BOOL])
    values: list[str] = []
    places: list[str] = []
    moe = f"moe{g.shared.layers.get(op, '')}"
    group = f"{g.prefix}/{moe}" if g.prefix else moe
    for expert in range(experts):
        label = f"{group}/expert{expert}"
        number = g.const(expert)
        run, skip = g.arm(label), g.arm(f"{label}/skip")
        found = run.op("NonZero", [g.op("Gather", [hits, number])])
        slot = run.op("Gather", [found, run.const(0)])
        row = slot if slots == 1 else run.op("Div", [slot, run.const(slots)])
        tokens = run.op("Gather", [x, row])
        if op.apply == "input":
            tokens = run.op("Mul", [tokens, run.op("Gather", [weight, slot])])
        y = body(run, tokens, expert)
        spot = run.op("Unsqueeze", [slot, run.const([1])])
        if not g.shared.branching:
            g.nodes += run.nodes
            values.append(y)
            places.append(spot)
            continue
        run.finish([y, spot])
        empty = [g.const(np.zeros((0, width)), F32), g.const(np.zeros((0, 1)))]
        skip.finish([skip.op("Identity", [name]) for name in empty])
        value, place = g.conditional(g.op("Gather", [any_hit, number]), run, skip, 2)
        values.append(value)
        places.append(place)
    total = g.op("Concat", [g.op("Shape", [chosen]), g.const([width])], axis=0)
    blank = g.op("ConstantOfShape", [total])
    parts = [g.op("Concat", names, axis=0) for names in (places, values)]
    spread = g.op("ScatterND", [blank, *parts])
    if op.apply == "output":
        spread = g.op("Mul", [spread, weight])
    spread = g.op("Reshape", [spread, g.const([-1, slots, width])])
    summed = g.op("ReduceSum", [spread, g.const([1])], keepdims=0)
    return [summed if op.x.type.rank == 2 else g.op("Reshape", [summed, g.shape(op.y.shape)])]


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

"""Sparse experts as ONNX nodes: each computes the tokens that chose it, and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import numpy_helper

from liquidc.backends.onnxruntime.emit_qmoe import qmoe
from liquidc.backends.onnxruntime.emit_quantised import is_direct, product
from liquidc.backends.onnxruntime.emit_route import routes_all
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.backends.onnxruntime.nodes import mark_expert
from liquidc.errors import UnsupportedError
from liquidc.ir import DType, Op, Value, ops
from liquidc.ir.types import dim_names
from liquidc.ir.weights import sizes

F32 = np.float32
I64 = ELEMENT[DType.I64]
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
    group = _group(g, op)
    for expert in range(experts):
        label = f"{group}/expert{expert}"
        run, skip = g.arm(label), g.arm(f"{label}/skip")
        found = run.op("NonZero", [run.op("Gather", [hits, g.const(expert)])])
        tokens = run.op("Gather", [x, run.op("Gather", [found, g.const(0)])])
        if op.apply == "input":
            share = run.op("GatherND", [weight, run.op("Transpose", [found])])
            tokens = run.op("Mul", [tokens, run.op("Unsqueeze", [share, g.const([1])])])
        y = body(run, tokens, expert)
        mark_expert(run.nodes, g.shared.layers.get(op), expert)
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
    if is_direct(g, op.gate_up) and is_direct(g, op.down):
        return _by_piece(g, op)

    def swiglu(arm: Graph, tokens: str, expert: int) -> str:
        both = product(arm, tokens, op.gate_up, expert=expert, rounded=op.input_block)
        return product(arm, _glu(arm, both), op.down, expert=expert, rounded=op.inner_block)

    return _by_expert(g, op, [op.gate_up, op.down], swiglu)


def _glu(g: Graph, both: str) -> str:
    """SiLU of the first half of rows, times the second."""
    gate, up = g.op("Split", [both], 2, axis=1, num_outputs=2)
    return g.op("Mul", [g.contrib("QuickGelu", [gate], alpha=1.0), up])


def _by_piece(g: Graph, op: ops.GroupedExperts) -> list[str]:
    """Slots in the order of their experts, so that each expert has a piece of the rows.

    A product of no rows reads no weight, and takes a fraction of a conditional (docs/facts.md).
    """
    experts, width = sizes([*op.gate_up.shape[:1], op.y.shape[-1]])
    slots = sizes(op.index.shape[-1:])[0]
    x = g.flat(g.name(op.x), op.x.shape)
    chosen = g.op("Reshape", [g.name(op.index), g.const([-1])])
    weight = g.op("Reshape", [g.name(op.weight), g.const([-1, 1])])
    hits = g.op("Equal", [g.const(np.arange(experts)[:, None]), chosen])
    counts = g.op("ReduceSum", [g.op("Cast", [hits], to=I64), g.const([1])], keepdims=0)
    slot = g.op("Gather", [g.op("NonZero", [hits]), g.const(1)])
    tokens = g.op("Gather", [x, slot if slots == 1 else g.op("Div", [slot, g.const(slots)])])
    if op.apply == "input":
        tokens = g.op("Mul", [tokens, g.op("Gather", [weight, slot])])
    group = _group(g, op)

    def products(rows: str, factor: Value, rounded: int, *, first: bool = False) -> str:
        pieces = [rows] if experts == 1 else g.op("Split", [rows, counts], experts, axis=0)
        made: list[str] = []
        for expert, piece in enumerate(pieces):
            arm = g.arm(f"{group}/expert{expert}")
            made.append(product(arm, piece, factor, expert=expert, rounded=rounded))
            if first:
                mark_expert(arm.nodes, g.shared.layers.get(op), expert)
            g.nodes += arm.nodes
        return g.op("Concat", made, axis=0)

    inner = _glu(g, products(tokens, op.gate_up, op.input_block, first=True))
    y = products(inner, op.down, op.inner_block)
    if _every_slot(op):
        blank = tokens  # all of it is written to
    else:
        total = g.op("Concat", [g.op("Shape", [chosen]), g.const([width])], axis=0)
        blank = g.op("ConstantOfShape", [total])
    y = g.op("ScatterND", [blank, g.op("Unsqueeze", [slot, g.const([1])]), y])
    if op.apply == "output":
        y = g.op("Mul", [y, weight])
    y = g.op("Reshape", [y, g.const([-1, slots, width])])
    return [g.unflat(g.op("ReduceSum", [y, g.const([1])], keepdims=0), op.y.shape)]


def _every_slot(op: ops.GroupedExperts) -> bool:
    """Whether each slot of each token holds one of the experts."""
    route = op.index.op
    experts = op.gate_up.shape[0]
    return isinstance(route, ops.Route) and routes_all(route) and route.logits.shape[-1] == experts


def _group(g: Graph, op: ops.GroupedExperts | ops.MapExperts) -> str:
    """What the nodes of a layer's experts are called."""
    moe = f"moe{g.shared.layers.get(op, '')}"
    return f"{g.prefix}/{moe}" if g.prefix else moe


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

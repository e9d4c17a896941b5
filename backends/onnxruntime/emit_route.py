"""Depth gates and routers as ONNX nodes."""

from __future__ import annotations

import numpy as np

from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.ir import DType, Op, ops
from liquidc.ir.weights import sizes

F32 = np.float32
F32_ONNX = ELEMENT[DType.F32]


def depth_gate(g: Graph, op: ops.DepthGate) -> list[str]:
    """The rules of `ops.DepthGate`, one after the other."""
    score = g.name(op.score)
    columns = [g.op("Unsqueeze", [g.name(v), g.const([1])]) for v in (op.bias, op.min_depth)]
    biased = g.op("Sigmoid", [g.op("Add", [score, columns[0]])])
    compare = "Greater" if op.compare == "gt" else "GreaterOrEqual"
    mask = g.op(compare, [biased, g.const(op.threshold, F32)])
    need = g.op("Sub", [columns[1], g.name(op.executed)])
    mask = g.op("Or", [mask, g.op("GreaterOrEqual", [need, g.const(op.remaining)])])
    if op.reserved:
        first = g.op("Less", [g.name(op.positions), g.const(op.reserved)])
        mask = g.op("Or", [mask, first])
    force, zero = g.name(op.force), g.const(0, np.int8)
    # Forced: force > 0 runs, force < 0 does not.
    mask = g.op("And", [mask, g.op("Equal", [force, zero])])
    mask = g.op("Or", [mask, g.op("Greater", [force, zero])])
    return [g.op("And", [mask, g.name(op.valid)]), g.op("Sigmoid", [score])]


def fixed_gate(g: Graph, op: ops.FixedGate) -> list[str]:
    """All valid tokens, or none; p is the number of it."""
    valid = g.name(op.valid)
    mask = g.op("And", [valid, g.const(op.run, np.bool_)])
    shape = g.op("Shape", [valid])
    return [mask, g.op("Expand", [g.const(float(op.run), F32), shape])]


def route(g: Graph, op: ops.Route) -> list[str]:
    """TopK, which lets the lowest index win a tie, and the weights of what it chose."""
    logits = g.name(op.logits)
    match op.score:
        case "softmax":
            scores = g.op("Softmax", [logits], axis=-1)
        case "sigmoid":
            scores = g.op("Sigmoid", [logits])
        case _:
            scores = logits
    chosen = scores
    if op.selection_bias is not None:
        chosen = g.op("Add", [scores, g.name(op.selection_bias)])
    if op.n_group > 1:
        chosen = _limit_groups(g, op, chosen)
    _, index = g.op("TopK", [chosen, g.const([op.k])], 2, axis=-1)
    weight = g.op("GatherElements", [scores, index], axis=-1)
    match op.post:
        case "renorm":
            total = g.op("ReduceSum", [weight, g.const([-1])], keepdims=1)
            if op.renorm_eps:
                total = g.op("Add", [total, g.const(op.renorm_eps, F32)])
            weight = g.op("Div", [weight, total])
        case "softmax_k":
            weight = g.op("Softmax", [weight], axis=-1)
        case "sigmoid":
            weight = g.op("Sigmoid", [weight])
        case _:
            pass
    if op.scaling != 1.0:
        weight = g.op("Mul", [weight, g.const(op.scaling, F32)])
    seen = g.op("Unsqueeze", [g.name(op.mask), g.const([-1])])
    return [
        g.op("Where", [seen, index, g.const(-1)]),
        g.op("Where", [seen, weight, g.const(0.0, F32)]),
    ]


def _limit_groups(g: Graph, op: ops.Route, scores: str) -> str:
    """Fill the scores outside the best groups."""
    experts = sizes(op.logits.shape[-1:])[0]
    width = experts // op.n_group
    lead = [0] * (op.logits.type.rank - 1)
    grouped = g.op("Reshape", [scores, g.const([*lead, op.n_group, width])])
    if op.group_score == "top2sum":
        best, _ = g.op("TopK", [grouped, g.const([min(2, width)])], 2, axis=-1)
        rank = g.op("ReduceSum", [best, g.const([-1])], keepdims=0)
    else:
        rank = g.op("ReduceMax", [grouped, g.const([-1])], keepdims=0)
    _, kept = g.op("TopK", [rank, g.const([op.topk_group])], 2, axis=-1)
    hits = g.op("Equal", [g.op("Unsqueeze", [kept, g.const([-1])]), g.const(np.arange(op.n_group))])
    hits = g.op("Cast", [hits], to=ELEMENT[DType.U8])
    mask = g.op("Cast", [g.op("ReduceMax", [hits, g.const([-2])], keepdims=0)], to=9)
    fill = g.const(0.0 if op.group_fill == "zero" else -np.inf, F32)
    filled = g.op("Where", [g.op("Unsqueeze", [mask, g.const([-1])]), grouped, fill])
    return g.op("Reshape", [filled, g.const([*lead, experts])])


def renumber(g: Graph, op: ops.Renumber) -> list[str]:
    """The table's entries, and negative numbers as they are."""
    index, zero = g.name(op.index), g.const(0)
    found = g.op("Gather", [g.const(list(op.table)), g.op("Max", [index, zero])])
    return [g.op("Where", [g.op("Less", [index, zero]), index, found])]


def expert_mask(g: Graph, op: ops.ExpertMask) -> list[str]:
    """Whether a slot holds the expert."""
    hits = g.op("Equal", [g.name(op.index), g.const(op.expert)])
    small = g.op("Cast", [hits], to=ELEMENT[DType.U8])
    any_hit = g.op("ReduceMax", [small, g.const([-1])], keepdims=0)
    return [g.op("Cast", [any_hit], to=ELEMENT[DType.BOOL])]


def expert_weight(g: Graph, op: ops.ExpertWeight) -> list[str]:
    """The weight in the slot of the expert."""
    hits = g.op("Equal", [g.name(op.index), g.const(op.expert)])
    kept = g.op("Where", [hits, g.name(op.weight), g.const(0.0, F32)])
    return [g.op("ReduceSum", [kept, g.const([-1])], keepdims=0)]


EMIT: dict[type[Op], Emit] = {
    ops.DepthGate: depth_gate,
    ops.FixedGate: fixed_gate,
    ops.Route: route,
    ops.Renumber: renumber,
    ops.ExpertMask: expert_mask,
    ops.ExpertWeight: expert_weight,
}
"""Lowerings by op class."""

"""Depth gates and routers as ONNX nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.ir import DType, Op, Value, ops
from liquidc.ir.weights import sizes

F32 = np.float32
F32_ONNX = ELEMENT[DType.F32]


def depth_gate(g: Graph, op: ops.DepthGate) -> list[str]:
    """The rules of `ops.DepthGate` as two bounds: of the score, and of the layers executed.

    The sigmoid rises, so that `sigmoid(score + bias) > threshold` is `score > logit(threshold) -
    bias`, whose right side is computed once for all gates.
    """
    bounds, shape = _bounds(g, op), op.score.shape
    score = g.lead(g.name(op.score), shape)
    compare = "Greater" if op.compare == "gt" else "GreaterOrEqual"
    decided = g.op(compare, [score, bounds.thresholds[op]])
    executed = g.name(op.executed)
    executed = g.lead(executed, op.executed.shape, make=False) or executed
    needed = g.op("LessOrEqual", [executed, bounds.floors[op]])
    mask = g.viewed(g.op("Or", [decided, needed]), (1, *shape), shape)
    return [mask, g.op("Sigmoid", [g.name(op.score)])] if op.p.uses else [mask]


@dataclass(frozen=True)
class Bounds:
    """What decides besides scores, for all gates of a function at once.

    Attributes:
        thresholds: f32[1, B, T] by gate; no score is above that of a token which must not run.
        floors: i64[1, B, T] by gate: a token that executed no more layers runs.
    """

    thresholds: dict[ops.DepthGate, str]
    floors: dict[ops.DepthGate, str]


MOST = 2**31
"""More layers than any model has."""


def _bounds(g: Graph, op: ops.DepthGate) -> Bounds:
    """Those of a gate and the ones that are told the same; made once in a graph."""
    told = (op.valid, op.positions, op.bias, op.min_depth)
    known = g.remember(("bounds", *told))
    if known is not None and op in known.floors:
        return known
    gates = [u for u in op.valid.uses if isinstance(u, ops.DepthGate)]
    gates = [u for u in gates if (u.valid, u.positions, u.bias, u.min_depth) == told]
    gates.sort(key=lambda gate: gate.gate)
    forces = _forces(g, gates)
    if forces is None:
        gates, forces = [op], g.op("Reshape", [g.name(op.force), g.const([1, 1, 1])])
    zero = g.const(0, np.int8)
    free, forced = g.op("Equal", [forces, zero]), g.op("Greater", [forces, zero])
    valid = g.op("Unsqueeze", [g.name(op.valid), g.const([0])])
    asked = g.op("Reshape", [g.name(op.min_depth), g.const([1, -1, 1])])

    def column(values: list[Any], dtype: Any) -> str:
        return g.const(np.array(values).reshape(-1, 1, 1), dtype)

    floor = g.op("Sub", [asked, column([gate.remaining for gate in gates], np.int64)])
    if any(gate.reserved for gate in gates):
        place = g.op("Unsqueeze", [g.name(op.positions), g.const([0])])
        first = g.op("Less", [place, column([gate.reserved for gate in gates], np.int64)])
        floor = g.op("Where", [first, g.const(MOST), floor])
    ruled = g.op("Where", [forced, g.const(MOST), g.const(-1)])
    floor = g.op("Where", [valid, g.op("Where", [free, floor, ruled]), g.const(-1)])
    threshold = column([logit(gate.threshold) for gate in gates], F32)
    bias = g.op("Reshape", [g.name(op.bias), g.const([1, -1, 1])])
    threshold = g.op("Sub", [threshold, bias])
    open_ = g.op("And", [valid, free])
    threshold = g.op("Where", [open_, threshold, g.const(np.inf, F32)])
    known = Bounds(
        dict(zip(gates, _each(g, threshold, len(gates)), strict=True)),
        dict(zip(gates, _each(g, floor, len(gates)), strict=True)),
    )
    g.memo["bounds", *told] = known
    return known


def logit(p: float) -> float:
    """The score whose sigmoid is p; infinite at 0 and at 1."""
    if not 0 < p < 1:
        return -math.inf if p <= 0 else math.inf
    return math.log(p) - math.log1p(-p)


def _each(g: Graph, x: str, count: int) -> list[str]:
    """[count, ...] as so many [1, ...]."""
    if count == 1:
        return [x]
    return list(g.op("Split", [x], count, axis=0, num_outputs=count))


def _forces(g: Graph, gates: list[ops.DepthGate]) -> str | None:
    """What the gates are forced to, i8[G, 1, 1], if they all read it from one argument."""
    places: list[int] = []
    source: Value | None = None
    for gate in gates:
        value = gate.force
        while isinstance(value.op, ops.Reshape):
            value = value.op.x
        cut = value.op
        if not isinstance(cut, ops.Slice) or cut.x.type.rank != 1 or cut.stop - cut.start != 1:
            return None
        if cut.x.op is not None or source not in (None, cut.x):
            return None
        source = cut.x
        places.append(cut.start)
    if source is None:
        return None
    picked = g.op("Gather", [g.name(source), g.const(places)], axis=0)
    return g.op("Reshape", [picked, g.const([-1, 1, 1])])


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
    weight, index = g.op("TopK", [chosen, g.const([op.k])], 2, axis=-1)
    if chosen != scores:
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
    if routes_all(op):
        return [index, weight]
    seen = g.op("Unsqueeze", [g.name(op.mask), g.const([-1])])
    return [
        g.op("Where", [seen, index, g.const(-1)]),
        g.op("Where", [seen, weight, g.const(0.0, F32)]),
    ]


def routes_all(op: ops.Route) -> bool:
    """Whether every token gets experts, as compacted ones do."""
    mask = op.mask.op
    if isinstance(mask, ops.Broadcast):
        mask = mask.x.op
    return isinstance(mask, ops.Constant) and bool(np.all(mask.value))


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

"""The experts of a layer as one operator, QMoE; asked for by `--fused-experts`.

It spares the conditional, the search for rows and the moves of rows of every expert, and no expert
that no token chose is read; but a profile can't tell its experts apart. QMoE chooses experts by
itself, the k largest of `router_probs`, and weighs them by `router_weights`; here the slots of a
token have chosen already, so an expert's score is 1 where one of them holds it, else 0. Experts
whose weight is 1e-8 or less are skipped by its CPU kernel (docs/facts.md): empty slots cost
nothing, and negative weights would be lost, so that only routers without them are taken.
"""

from __future__ import annotations

from math import prod
from typing import cast

import numpy as np

from liquidc.backends.onnxruntime.emit_quantised import LEAST, stored_name
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.backends.onnxruntime.nodes import mark
from liquidc.errors import UnsupportedError
from liquidc.ir import Op, Value, ops
from liquidc.ir.quantised import BITS
from liquidc.ir.weight_maths import Take
from liquidc.ir.weights import sizes


def qmoe(g: Graph, op: ops.GroupedExperts) -> list[str]:
    """SwiGLU experts whose weights are codes.

    Raises:
        UnsupportedError: QMoE can't compute these experts.
    """
    if (reason := refusal(op)) is not None:
        raise UnsupportedError(
            f"onnxruntime: the experts at {op.loc} can't be one QMoE: {reason}; "
            "compile without --fused-experts"
        )
    gate_up, down = cast(ops.Dequantize, op.gate_up.op), cast(ops.Dequantize, op.down.op)
    experts, rows, _ = sizes(op.gate_up.shape)
    # [gate; up] to gate and up in turn: the CPU kernel knows no other layout.
    order = tuple(np.arange(rows).reshape(2, -1).T.reshape(-1).tolist())
    scores, weights = _routes(g, op, experts)
    inputs = [g.name(op.x), scores]
    zeros: list[str] = []
    for weight, take in ((gate_up, order), (down, None)):
        parts = (weight.codes, weight.scales, weight.zeros)
        codes, scales, zero = (_part(g, part, take) for part in parts)
        inputs += [codes, scales, ""]
        zeros.append(zero)
    inputs += ["", "", "", *zeros, "", weights]
    name = f"moe{g.shared.layers.get(op, '')}/QMoE"
    y = g.contrib(
        "QMoE",
        inputs,
        name=f"{g.prefix}/{name}" if g.prefix else name,
        k=min(experts, *sizes(op.index.shape[-1:])),
        block_size=gate_up.block,
        expert_weight_bits=BITS[gate_up.format],
        fc2_expert_weight_bits=BITS[down.format],
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        weights_prepacked=0,
        accuracy_level=4,
    )
    if op in g.shared.layers:
        mark(g.nodes[-1], "fused", g.shared.layers[op])
    return [y]


def refusal(op: ops.GroupedExperts) -> str | None:
    """Why QMoE can't compute these experts; None if it can."""
    gate_up, down = op.gate_up.op, op.down.op
    if not isinstance(gate_up, ops.Dequantize) or not isinstance(down, ops.Dequantize):
        return "their weights are not quantised"
    if "e4m3" in (gate_up.format, down.format):
        return "its CPU kernel has no e4m3"
    if gate_up.block != down.block:
        return f"blocks of {gate_up.block} and {down.block} elements"
    if gate_up.block < LEAST or gate_up.block & (gate_up.block - 1):
        return f"blocks of {gate_up.block} elements are no power of two from {LEAST} on"
    if {op.input_block, op.inner_block} - {0, gate_up.block}:
        return f"what they read is rounded in other blocks than {gate_up.block} elements"
    if op.apply != "output":
        return "they weigh their inputs"
    if not _never_negative(op.weight.op):
        return "QMoE ignores negative weights, and their router may give some"
    return None


def _never_negative(op: Op | None) -> bool:
    """Whether weights are those of a router whose formula has no negative results."""
    return (
        isinstance(op, ops.Route)
        and op.scaling >= 0
        and (op.score in ("softmax", "sigmoid") or op.post in ("softmax_k", "sigmoid"))
    )


def _routes(g: Graph, op: ops.GroupedExperts, experts: int) -> list[str]:
    """Scores by which QMoE chooses, and weights, of tokens and experts.

    Slots without one of these experts, whose index is -1 or too large, scatter into one column too
    many, the last, which is cut off.
    """
    index = g.op("Min", [g.flat(g.name(op.index), op.index.shape), g.const(experts)])
    weight = g.flat(g.name(op.weight), op.weight.shape)
    shape = g.op("Shape", [index])
    size = g.op("Concat", [g.op("Shape", [index], start=0, end=1), g.const([experts + 1])], axis=0)
    blank = g.op("ConstantOfShape", [size])
    ones = g.op("Expand", [g.const(1.0, np.float32), shape])
    found = [
        g.op("ScatterElements", [blank, index, ones], axis=1),
        g.op("ScatterElements", [blank, index, weight], axis=1, reduction="add"),
    ]
    cut = [g.const([0]), g.const([experts]), g.const([1])]
    return [g.op("Slice", [table, *cut]) for table in found]


def _part(g: Graph, value: Value | None, order: tuple[int, ...] | None) -> str:
    """Codes, scales or zero points of a stack [E, N, ...], bytes of a row together."""
    if value is None:
        return ""
    name, expr = g.weight_expr(stored_name(value))
    experts, rows, *rest = expr.sizes
    expr = expr if order is None else Take(expr, 1, order)
    return g.view(f"{name}.qmoe", expr, ELEMENT[expr.type.dtype], (experts, rows, prod(rest)))

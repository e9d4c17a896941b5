"""The layers of a transformer as ONNX nodes."""

from __future__ import annotations

import numpy as np

from liquidc.backends.onnxruntime.emit_quantised import product
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import Graph
from liquidc.ir import DType, Op, ops
from liquidc.ir.weights import sizes


def _embed(g: Graph, op: ops.Embed) -> list[str]:
    return [g.op("Gather", [g.name(op.table), g.name(op.ids)], name="embed/Gather", axis=0)]


def _linear(g: Graph, op: ops.Linear) -> list[str]:
    """A product on rows."""
    bias = "" if op.bias is None else g.name(op.bias)
    x = g.flat(g.name(op.x), op.x.shape)
    y = product(g, x, op.weight, bias, rounded=op.input_block)
    return [g.unflat(y, op.y.shape)]


def _matmul(g: Graph, op: ops.MatMul) -> list[str]:
    return [g.op("MatMul", [g.name(op.a), g.name(op.b)])]


def _scale(g: Graph, op: ops.RMSNorm | ops.LayerNorm) -> str:
    """The norm's weight; ones if it has none."""
    if op.weight is not None:
        return g.name(op.weight)
    return g.const(np.ones(sizes(op.x.shape[-1:])), np.float32)


def _rms_norm(g: Graph, op: ops.RMSNorm) -> list[str]:
    """RMSNormalization, with the addition before it if there is one."""
    if (joined := _after_add(g, op)) is not None:
        return [joined]
    x = g.flat(g.name(op.x), op.x.shape) if op.x.type.rank == 3 else g.name(op.x)
    y = g.op("RMSNormalization", [x, _scale(g, op)], axis=-1, epsilon=op.eps)
    return [g.unflat(y, op.y.shape) if op.x.type.rank == 3 else y]


def _after_add(g: Graph, op: ops.RMSNorm) -> str | None:
    """The addition and the norm as one node in the place of the addition."""
    add = op.x.op
    if not isinstance(add, ops.Add) or add.parent is not op.parent or op.x.dtype is not DType.F32:
        return None
    if add.a.shape != add.b.shape or op.x.type.rank not in (2, 3):
        return None
    total = g.remember(("flat", g.name(op.x))) or g.name(op.x)
    at = next((i for i, node in enumerate(g.nodes) if total in node.output), None)
    if at is None or g.nodes[at].op_type != "Add":
        return None
    a, b = g.nodes[at].input
    later, g.nodes = g.nodes[at + 1 :], g.nodes[:at]
    y = g.shared.unique(f"{g.prefix}/norm:out" if g.prefix else "norm:out")
    g.contrib(
        "SkipSimplifiedLayerNormalization",
        [a, b, _scale(g, op)],
        outputs=[y, "", "", total],
        epsilon=op.eps,
    )
    g.nodes += later
    return y if total == g.name(op.x) else g.unflat(y, op.y.shape)


def _layer_norm(g: Graph, op: ops.LayerNorm) -> list[str]:
    inputs = [g.name(op.x), _scale(g, op)] + ([g.name(op.bias)] if op.bias is not None else [])
    return [g.op("LayerNormalization", inputs, axis=-1, epsilon=op.eps)]


def _softmax(g: Graph, op: ops.Softmax) -> list[str]:
    return [g.op("Softmax", [g.name(op.x)], axis=op.dim)]


EMIT: dict[type[Op], Emit] = {
    ops.Embed: _embed,
    ops.Linear: _linear,
    ops.MatMul: _matmul,
    ops.RMSNorm: _rms_norm,
    ops.LayerNorm: _layer_norm,
    ops.Softmax: _softmax,
}
"""Lowerings by op class."""

"""Rotary embeddings as ONNX nodes.

Cosines and sines come from a table, which is a weight: a row for each position of the context, one
table for all layers that rotate alike. Where there is no table (the model names no context, the
table would be larger than `MAX_TABLE_BYTES`, or a module makes positions of its own), they are
computed from the positions of the call, once for all layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from liquidc.backends.onnxruntime.emit_cache import content, places
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.ir import DType, Op, TensorType, Value, ops
from liquidc.ir.rotary import Rotation, Scaling, rates
from liquidc.ir.weights import byte_size, sizes

MAX_TABLE_BYTES = 64 * 1024 * 1024
"""Largest size of the cosines and sines of a context: 131,072 positions of heads of 128.

Attention reads a table without a node of its own; computed angles take five nodes a step, and two
or three a layer to rotate before the attention.
"""


@dataclass(frozen=True)
class Turns:
    """Names of cosines and sines f32[rows, hd / 2], and how many rows there are."""

    cos: str
    sin: str
    rows: int


def rope(g: Graph, op: ops.Rope) -> list[str]:
    """RotaryEmbedding; every token is a row of its own, so that their number has no limit."""
    heads, width = sizes(op.x.shape[-2:])
    x = g.op("Reshape", [g.name(op.x), g.const([-1, 1, heads * width])])
    if (table := turns(g, op)) is not None:
        inputs = [table.cos, table.sin, g.op("Reshape", [g.name(op.positions), g.const([-1, 1])])]
    else:
        inputs = _computed(g, op)
    y = g.op("RotaryEmbedding", [x, *inputs], num_heads=heads)
    if op.x.type.rank == 3:
        return [g.op("Reshape", [y, g.const([-1, heads, width])])]
    return [g.op("Reshape", [y, g.shape(op.y.shape)])]


def turns(g: Graph, op: ops.Rope) -> Turns | None:
    """The table of a rotation; None if its angles are computed."""
    count = g.shared.module.attributes.get("max_positions")
    if not isinstance(count, int) or not _counts_tokens(op.positions):
        return None
    table = TensorType(DType.F32, (count, sizes(op.x.shape[-1:])[0] // 2))
    if 2 * byte_size(table) > MAX_TABLE_BYTES:
        return None
    cos, sin = (_table(g, Rotation(p, op.theta, op.scaling, table)) for p in ("cos", "sin"))
    return Turns(cos, sin, count)


def _table(g: Graph, expr: Rotation) -> str:
    """A weight named by what it holds: layers and graphs of one engine share it."""
    name = f"rope.{expr.part}.{hashlib.sha256(str(expr).encode()).hexdigest()[:8]}"
    g.shared.weights.setdefault(name, expr)
    return name


def _counts_tokens(positions: Value) -> bool:
    """Whether these are the positions that `trace` counts: below the context, 0 at padding."""
    base = content(positions)
    if isinstance(base.op, ops.GatherRows):
        base = content(base.op.x)
    chosen = base.op
    if not isinstance(chosen, ops.Where) or not isinstance(chosen.mask.op, ops.Lt):
        return False
    counted = content(chosen.a)
    starts = counted.op.operands if isinstance(counted.op, ops.Add) else [counted]
    return any(content(start).name == "position_start" for start in starts)


def _computed(g: Graph, op: ops.Rope) -> list[str]:
    """Cosines and sines of a call's tokens; and which of them a compacted row has."""
    base, rows = op.positions, ""
    if isinstance(base.op, ops.GatherRows):
        base, rows = base.op.x, places(g, base.op.rows)
    home = g
    while home.parent is not None and base not in home.names:
        home = home.parent
    half, scaling = sizes(op.x.shape[-1:])[0] // 2, Scaling.read(op.scaling)
    key = ("turns", base, half, op.theta, op.scaling)
    made = home.remember(key)
    if made is None:
        positions = home.op("Reshape", [home.name(base), home.const([-1, 1])])
        positions = home.op("Cast", [positions], to=ELEMENT[DType.F32])
        each = rates(op.theta, half, scaling, torch.float32).reshape(1, half)
        angle = home.op("Mul", [positions, home.const(each.numpy(), np.float32)])
        made = [home.op(kind, [angle]) for kind in ("Cos", "Sin")]
        if scaling is not None and scaling.amplitude != 1:
            amplitude = home.const(scaling.amplitude, np.float32)
            made = [home.op("Mul", [part, amplitude]) for part in made]
        home.memo[key] = made
    if rows:
        return [*made, rows]
    return [home.once("Unsqueeze", [part, home.const([1])]) for part in made]


EMIT: dict[type[Op], Emit] = {ops.Rope: rope}
"""Lowerings by op class."""

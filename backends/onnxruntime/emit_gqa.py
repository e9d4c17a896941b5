"""The forms of GroupQueryAttention: what one node of ONNX Runtime does for an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from liquidc.backends.onnxruntime.emit_cache import (
    I32,
    Appending,
    cache_scale,
    content,
    pad,
    places,
    ragged,
    unpad,
)
from liquidc.backends.onnxruntime.emit_rope import Turns, turns
from liquidc.backends.onnxruntime.graph import Graph
from liquidc.ir import DType, Value, ops
from liquidc.ir.weights import sizes


def fused(g: Graph, op: ops.Attend | ops.AttendRows, *, alone: bool = False) -> list[str]:
    """One GroupQueryAttention: its result, and the caches.

    Args:
        g: where it stands.
        op: the attention.
        alone: of compacted rows, whether there is one token in all; then nothing is ragged.

    Returns:
        Rows [N, H · hd], keys, values.
    """
    key, value = pair(op)
    heads, width = sizes(op.q.shape[-2:])
    kv = sizes(key.cache.shape[1:2])[0]
    compact = isinstance(op, ops.AttendRows)
    rotation, parts = _rotation(g, op), _parts(g, op)
    inputs: list[str] = []
    for tensor in parts:
        x = g.name(tensor)
        count = sizes(tensor.shape[-1:])[0]
        if tensor.type.rank == (3 if compact else 4):
            count *= sizes(tensor.shape[-2:-1])[0]
        if compact:
            rows = g.op("Reshape", [x, g.const([1, -1, count] if alone else [-1, count])])
            inputs.append(rows if alone else pad(g, rows, key.mask))
        else:
            inputs.append(g.op("Reshape", [x, g.const([0, 0, count])]))
    inputs += [""] * (3 - len(inputs))
    last, counts = slots_taken(g, key.length), ""
    if not alone:
        where = ragged(g, key.mask)
        last = g.op("Max", [g.op("Add", [last, where.before]), g.const(0, np.int32)])
        counts = g.op("Reshape", [where.count, g.const([-1])])
    capacity = _capacity(g, key)
    turned: dict[str, Any] = {}
    tables = [""] * 3
    if rotation is not None:
        if alone:
            positions = _position(g, rotation)
        else:
            positions = g.name(rotation.positions)
            positions = pad(g, positions, key.mask) if compact else positions
        tables = [rotation.turns.cos, rotation.turns.sin, positions]
        # No token lies beyond the context; buffers may.
        capacity = g.root().once("Min", [capacity, g.const([rotation.turns.rows], np.int32)])
        turned["do_rotary"] = 1
    if op.window:
        turned["local_window_size"] = op.window
    scales = [(scale and cache_scale(g, scale)) or "" for scale in (key.scale, value.scale)]
    inputs += [g.name(key.cache), g.name(value.cache), last, capacity]
    sink = "" if op.sink is None else g.name(op.sink)
    inputs += [*tables, "", sink, *scales, *[""] * 2, counts]
    while not inputs[-1]:
        inputs.pop()
    codes: dict[str, Any] = {}
    if all(scales):
        codes = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
        codes["kv_cache_bit_width"] = 8
    out = g.shared.unique(label(g, "gqa"))
    caches = cache_names(g, op)
    g.contrib(
        "GroupQueryAttention",
        inputs,
        outputs=[out, *caches],
        num_heads=heads,
        kv_num_heads=kv,
        scale=op.scale,
        **codes,
        **turned,
    )
    if compact and not alone:
        out = unpad(g, out, key.mask, heads * width)
    else:
        out = g.op("Reshape", [out, g.const([-1, heads * width])])
    return [out, *caches]


def apart(g: Graph, op: ops.Attend | ops.AttendRows) -> list[str]:
    """One token's appends, and its attention by groups; as `fused`."""
    key, value = pair(op)
    heads, width = sizes(op.q.shape[-2:])
    kv = sizes(key.cache.shape[1:2])[0]
    rotation, parts = _rotation(g, op), _parts(g, op)

    def split(x: str, counts: list[int]) -> list[str]:
        return list(g.op("Split", [x, g.const(counts)], len(counts), axis=1))

    shape = [1, -1, 1, width]
    if len(parts) == 1:
        whole = g.op("Reshape", [g.name(parts[0]), g.const(shape)])
        if rotation is None:
            q, k, v = split(whole, [heads, kv, kv])
        else:
            turning, v = split(whole, [heads + kv, kv])
            q, k = split(_turned(g, rotation, turning, heads + kv), [heads, kv])
    else:
        q, k, v = (g.op("Reshape", [g.name(part), g.const(shape)]) for part in parts)
        if rotation is not None:
            q, k = (_turned(g, rotation, x, n) for x, n in ((q, heads), (k, kv)))
    start = g.op("Reshape", [g.name(key.length), g.const([-1])])
    keys, values = (
        g.op("TensorScatter", [g.name(append.cache), new, start], axis=2, outputs=[name])
        for append, new, name in zip((key, value), (k, v), cache_names(g, op), strict=True)
    )
    return [by_group(g, op, q, keys, values, slots_taken(g, key.length)), keys, values]


def by_group(
    g: Graph, op: ops.Attend | ops.AttendRows, q: str, keys: str, values: str, last: str
) -> str:
    """The query of one token, H · hd numbers, over a cache of H / KV slots or more: [1, H · hd].

    GroupQueryAttention reads a key/value head once for each head. Here the heads of a group are so
    many queries of one head, which see the same slots: one product instead of several, twice as
    fast with thousands of slots (docs/facts.md).
    """
    heads, width = sizes(op.q.shape[-2:])
    key = cast(Appending, op.key.op)
    kv = sizes(key.cache.shape[1:2])[0]
    nothing = g.const(np.zeros((1, 0, kv * width)), np.float32)
    q = g.op("Reshape", [q, g.const([-1, kv, heads // kv, width])])
    q = g.op("Transpose", [q], perm=[0, 2, 1, 3])
    q = g.op("Reshape", [q, g.const([1, heads // kv, kv * width])])
    y = g.contrib(
        "GroupQueryAttention",
        [q, nothing, nothing, keys, values, last, _capacity(g, key)],
        num_heads=kv,
        kv_num_heads=kv,
        scale=op.scale,
        causal=0,
    )
    y = g.op("Reshape", [y, g.const([1, heads // kv, kv, width])])
    y = g.op("Transpose", [y], perm=[0, 2, 1, 3])
    return g.op("Reshape", [y, g.const([1, heads * width])])


def by_row(g: Graph, op: ops.AttendRows, *, alone: bool = False) -> str:
    """Queries of one token a row, or of one `alone`, over the cache where it is, [N, H · hd]."""
    key, _ = pair(op)
    heads, width = sizes(op.q.shape[-2:])
    kv = sizes(key.cache.shape[1:2])[0]
    root, rows = g.root(), places(g, op.rows)
    capacity, last = _capacity(g, key), slots_taken(g, key.length)
    if alone:
        q = g.op("Reshape", [g.name(op.q), g.const([1, -1, heads * width])])
        nothing = g.const(np.zeros((1, 0, kv * width)), np.float32)
    else:
        batch = root.size(key.mask.shape[0])
        base = root.once("Concat", [batch, root.const([heads * width])], axis=0)
        base = root.once("ConstantOfShape", [base])
        nothing = root.once("Concat", [batch, root.const([0, kv * width])], axis=0)
        nothing = root.once("ConstantOfShape", [nothing])
        q = g.op("Reshape", [g.name(op.q), g.const([-1, heads * width])])
        q = g.op("ScatterND", [base, rows, q])
        q = g.op("Reshape", [q, g.const([-1, 1, heads * width])])
        # A full row that gets no token reads its last slot; nobody asks what.
        last = g.op("Min", [last, root.once("Sub", [capacity, root.const(1, np.int32)])])
    inputs = [q, nothing, nothing, g.name(op.key), g.name(op.value), last, capacity]
    if op.sink is not None:
        inputs += [""] * 4 + [g.name(op.sink)]
    window: dict[str, Any] = {"local_window_size": op.window} if op.window else {}
    y = g.contrib(
        "GroupQueryAttention",
        inputs,
        num_heads=heads,
        kv_num_heads=kv,
        scale=op.scale,
        **window,
    )
    y = g.op("Reshape", [y, g.const([-1, heads * width])])
    return y if alone else g.op("GatherND", [y, rows])


def has_groups(op: ops.Attend | ops.AttendRows) -> bool:
    """Whether `by_group` can compute an attention over one key/value head for several heads."""
    key = cast(Appending, op.key.op)
    several = sizes(op.q.shape[-2:-1]) > sizes(key.cache.shape[1:2])
    plain = op.key_scale is None and op.sink is None and not op.window and not op.chunk
    return several and plain and op.q.dtype is DType.F32


def _turned(g: Graph, by: _Rotation, x: str, heads: int) -> str:
    """One token's heads [1, n, 1, hd], rotated."""
    tables = [by.turns.cos, by.turns.sin]
    return g.op("RotaryEmbedding", [x, *tables, _position(g, by)], num_heads=heads)


def _position(g: Graph, by: _Rotation) -> str:
    """Where the only token of a call stands, i64[1, 1]."""
    known = by.positions
    if isinstance(known.op, ops.GatherRows):
        known = known.op.x
    return (
        g.name(known) if known.type.rank == 2 else g.op("Unsqueeze", [g.name(known), g.const([0])])
    )


def pair(op: ops.Attend | ops.AttendRows) -> tuple[Appending, Appending]:
    """The appends of keys and values that an attention reads."""
    key, value = op.key.op, op.value.op
    if not isinstance(key, Appending) or not isinstance(value, Appending):
        raise TypeError("no pair of appends")
    return key, value


def _parts(g: Graph, op: ops.Attend | ops.AttendRows) -> list[Value]:
    """Queries, keys and values before their rotation, or the one value that holds them all."""
    key, value = pair(op)
    rotation = _rotation(g, op)
    parts = [op.q, key.new, value.new]
    if rotation is not None:
        parts[:2] = [rotation.q, rotation.k]
    whole = _joined(parts)
    return parts if whole is None else [whole]


def cache_names(g: Graph, op: ops.Attend | ops.AttendRows) -> list[str]:
    """What keys and values are called after an append."""
    pairs = zip(pair(op), ("key", "value"), strict=True)
    return [g.wanted.get(a.y) or g.shared.unique(label(g, name)) for a, name in pairs]


def label(g: Graph, name: str) -> str:
    """What a part of an attention is called."""
    around, inside, _ = g.prefix.partition("attention/")
    start = f"{around}/" if around and not inside else around
    return f"{start}attention/{name}"


def _capacity(g: Graph, key: Appending) -> str:
    """Slots of a cache, i32[1]."""
    root = g.root()
    return root.once("Cast", [root.size(key.cache.shape[2])], to=I32)


def slots_taken(g: Graph, length: Value) -> str:
    """Slots taken before an append, i32[B, 1]; those of all layers are made ready at once."""
    cut = content(length).op
    if not isinstance(cut, ops.Slice) or cut.x.op is not None or cut.dim or cut.x.type.rank != 2:
        return g.op("Cast", [g.op("Reshape", [g.name(length), g.const([-1, 1])])], to=I32)
    parts = g.remember(("starts", cut.x))
    if parts is None:
        root = g.root()
        count = sizes(cut.x.shape[:1])[0]
        every = root.op("Cast", [root.name(cut.x)], to=I32)
        if count == 1:
            parts = [root.op("Reshape", [every, root.const([-1, 1])])]
        else:
            every = root.op("Transpose", [every], perm=[1, 0])
            parts = root.op("Split", [every], count, axis=1, num_outputs=count)
        root.memo["starts", cut.x] = parts
    return parts[cut.start]


@dataclass(frozen=True)
class _Rotation:
    """How an attention rotates queries and keys: the same table, the same positions."""

    q: Value
    k: Value
    positions: Value
    turns: Turns


def _rotation(g: Graph, op: ops.Attend | ops.AttendRows) -> _Rotation | None:
    """The rotations of queries and keys, if the attention can do both.

    It does so from a table, in heads of 16 · n.
    """
    one, other = op.q.op, pair(op)[0].new.op
    if not isinstance(one, ops.Rope) or not isinstance(other, ops.Rope):
        return None
    if sizes(op.q.shape[-1:])[0] % 16:
        return None
    parts = [(rope.positions, rope.theta, rope.scaling) for rope in (one, other)]
    table = turns(g, one) if parts[0] == parts[1] else None
    return None if table is None else _Rotation(one.x, other.x, one.positions, table)


def _joined(parts: Sequence[Value]) -> Value | None:
    """What queries, keys and values are slices of, one after the other and nothing else."""
    cuts = [content(value).op for value in parts]
    end = 0
    for cut in cuts:
        if not isinstance(cut, ops.Slice) or cut.start != end:
            return None
        if cut.x is not cast(ops.Slice, cuts[0]).x or cut.dim != cut.x.type.rank - 1:
            return None
        end = cut.stop
    whole = cast(ops.Slice, cuts[0]).x
    return whole if end == whole.shape[-1] else None

"""Caches, attention and compacted rows as ONNX nodes.

An append and the attention over it become one GroupQueryAttention when the query's limit says just
that; it writes in place when past and present are the same buffer. Everything else appends by
TensorScatter and attends under a mask made from the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from liquidc.backends.onnxruntime.emit_nn import rope_tables
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import Dim, DType, Op, Value, ops
from liquidc.ir.weights import sizes

I8 = ELEMENT[DType.I8]
I32 = ELEMENT[DType.I32]
I64 = ELEMENT[DType.I64]
Appending = ops.Append | ops.AppendRows


def rows(g: Graph, op: ops.Rows) -> list[str]:
    """The true places of the mask, flat."""
    found = g.op("NonZero", [g.op("Reshape", [g.name(op.mask), g.const([-1])])])
    y = g.op("Reshape", [found, g.const([-1])])
    g.memo["places", y] = g.op("Reshape", [found, g.const([-1, 1])])
    g.dims[op.dim] = g.op("Shape", [y])
    return [y]


def gather_rows(g: Graph, op: ops.GatherRows) -> list[str]:
    """GatherND over the tokens as one dimension."""
    tail = sizes(op.x.shape[2:])
    if len(tail) == 1:
        flat = g.flat(g.name(op.x), op.x.shape)
    else:
        flat = g.op("Reshape", [g.name(op.x), g.const([-1, *tail])])
    return [g.op("GatherND", [flat, _places(g, op.rows)])]


def _places(g: Graph, rows: Value) -> str:
    """Flat places as indices i64[N, 1]."""
    name = g.name(rows)
    return g.remember(("places", name)) or g.op("Unsqueeze", [name, g.const([1])])


def scatter_rows(g: Graph, op: ops.ScatterRows) -> list[str]:
    """ScatterND over the tokens as one dimension."""
    tail = sizes(op.base.shape[2:])
    rows = len(tail) == 1
    base = g.name(op.base)
    flat = g.flat(base, op.base.shape) if rows else g.op("Reshape", [base, g.const([-1, *tail])])
    y = g.op("ScatterND", [flat, _places(g, op.rows), g.name(op.update)])
    return [g.unflat(y, op.y.shape) if rows else g.op("Reshape", [y, g.shape(op.y.shape)])]


def take_tokens(g: Graph, op: ops.TakeTokens) -> list[str]:
    """GatherND with the row as a batch dimension."""
    places = g.op("Unsqueeze", [g.name(op.index), g.const([2])])
    return [g.op("GatherND", [g.name(op.x), places], batch_dims=1)]


@dataclass(frozen=True)
class Ragged:
    """Masked tokens moved to the front of their batch row: [B, W, ...], W the widest row.

    Attributes:
        count: tokens of each row, i32[B, 1].
        before: tokens of the row but one, i32[B, 1]: a row of none has -1.
        places: which compacted token stands where, i32[B, W]; beyond a row's own, some other.
        taken: bool[B · W], where a row has tokens.
    """

    count: str
    before: str
    places: str
    taken: str


def ragged(g: Graph, mask: Value) -> Ragged:
    """Where the tokens of a mask bool[B, T] go; made once in a graph."""
    known = g.remember(("ragged", mask))
    if known is None:
        count = _count(g, mask)
        before = g.op("Sub", [count, g.const(1, np.int32)])
        first = g.op("CumSum", [count, g.const(0)], exclusive=1)
        width = g.op("ReduceMax", [count, g.const([0, 1])], keepdims=0)
        rank = g.op("Range", [g.const(0, np.int32), width, g.const(1, np.int32)])
        places = g.op("Add", [first, g.op("Min", [rank, before])])
        taken = g.op("Reshape", [g.op("Less", [rank, count]), g.const([-1])])
        known = Ragged(count, before, places, taken)
        g.memo["ragged", mask] = known
    return known


def pad(g: Graph, x: str, mask: Value) -> str:
    """Compacted rows [N, ...] as [B, W, ...]; where a row has fewer, what stands there is any."""
    return g.op("Gather", [x, ragged(g, mask).places], axis=0)


def unpad(g: Graph, x: str, mask: Value, shape: Sequence[Dim]) -> str:
    """[B, W, ...] as compacted rows of the shape [N, heads, width]."""
    count, heads, width = shape
    merged = heads * width if isinstance(heads, int) and isinstance(width, int) else -1
    rows = g.op("Reshape", [x, g.const([-1, merged])])
    rows = g.op("Compress", [rows, ragged(g, mask).taken], axis=0)
    return g.viewed(rows, (count, merged), shape)


def is_prefix(mask: Value) -> bool:
    """Whether a mask only cuts off padding: `iota < lengths`."""
    return isinstance(mask.op, ops.Lt) and isinstance(_content(mask.op.a).op, ops.Iota)


def fused_with(op: Appending) -> ops.Attend | ops.AttendRows | None:
    """The attention in the same block over this append and its twin, if one node can do all three.

    GroupQueryAttention lets query number i of a row see `length + i + 1` slots or the last of them,
    and wants heads of a multiple of 8 (ONNX Runtime 1.32).
    """
    for user in op.y.uses:
        if isinstance(user, ops.Attend | ops.AttendRows) and user.parent is op.parent:
            key, value = user.key.op, user.value.op
            if (
                isinstance(key, Appending)
                and isinstance(value, Appending)
                and key.parent is value.parent is user.parent
                and (key.length, key.mask) == (value.length, value.mask)
                and sizes(user.q.shape[-1:])[0] % 8 == 0
                and not user.chunk
                and _sees_in_order(user, key)
            ):
                return user
    return None


def _sees_in_order(user: ops.Attend | ops.AttendRows, key: Appending) -> bool:
    """Whether the limit of each query is length + its rank among the tokens appended."""
    limit = user.limit
    if isinstance(user, ops.AttendRows):
        if not isinstance(key, ops.AppendRows) or not isinstance(limit.op, ops.GatherRows):
            return False
        if not user.rows == key.rows == limit.op.rows:
            return False
        limit = limit.op.x
    elif not isinstance(key, ops.Append) or not is_prefix(key.mask):
        return False
    if not isinstance(limit.op, ops.Add):
        return False
    for start, rank in ((limit.op.a, limit.op.b), (limit.op.b, limit.op.a)):
        if isinstance(rank.op, ops.CumSum) and isinstance(rank.op.x.op, ops.Cast):
            return _content(start) is _content(key.length) and rank.op.x.op.x is key.mask
    return False


def _content(value: Value) -> Value:
    """What a value holds, whatever its shape."""
    while isinstance(value.op, ops.Reshape):
        value = value.op.x
    return value


def append(g: Graph, op: Appending) -> list[str]:
    """TensorScatter of the new entries, unless the attention over them does it."""
    if fused_with(op) is not None:
        return []
    if is_passing(op):
        return [_with_one_more(g, op)]
    kv, width = sizes((op.cache.shape[1], op.cache.shape[3]))
    new = g.name(op.new)
    if isinstance(op, ops.AppendRows):
        new = pad(g, new, op.mask)
    elif not is_prefix(op.mask):
        flat = g.op("Reshape", [new, g.const([-1, kv, width])])
        among = g.op("Reshape", [g.name(op.mask), g.const([-1])])
        new = pad(g, g.op("Compress", [flat, among], axis=0), op.mask)
    new = _stored(g, g.op("Transpose", [new], perm=[0, 2, 1, 3]), op.scale)
    wanted = g.wanted.get(op.y)
    outputs = [wanted] if wanted else None
    inputs = [g.name(op.cache), new, g.name(op.length)]
    return [g.op("TensorScatter", inputs, axis=2, outputs=outputs)]


def is_passing(op: Appending) -> bool:
    """Whether an append of one token to one row is attended over and then forgotten.

    Nothing is written then: the entries before are read where they are.
    """
    return (
        isinstance(op, ops.Append)
        and op.new.shape[:2] == (1, 1)
        and all(isinstance(u, ops.Attend) and u.parent is op.parent for u in op.y.uses)
    )


def _with_one_more(g: Graph, op: Appending) -> str:
    """The entries before, and the new one."""
    before = g.op("Slice", [g.name(op.cache), g.const([0]), g.name(op.length), g.const([2])])
    new = _stored(g, g.op("Transpose", [g.name(op.new)], perm=[0, 2, 1, 3]), op.scale)
    return g.op("Concat", [before, new], axis=2)


def _stored(g: Graph, new: str, scale: Value | None) -> str:
    """Entries [B, KV, T, hd] as a cache holds them: floats, or codes of a scale."""
    if scale is None:
        return new
    steps = g.op("Round", [g.op("Div", [new, _scale(g, scale)])])
    bounds = [g.const(value, np.float32) for value in (-128, 127)]
    return g.op("Cast", [g.op("Clip", [steps, *bounds])], to=I8)


def _scale(g: Graph, scale: Value) -> str:
    """A weight [KV, hd] that meets caches, [1, KV, 1, hd]."""
    if not isinstance(scale.op, ops.Weight):
        raise UnsupportedError(f"onnxruntime: the scale %{scale.name} of a cache is computed")
    name, expr = g.weight_expr(scale.op.weight)
    heads, width = expr.sizes
    return g.view(f"{name}.channels", expr, ELEMENT[DType.F32], [1, heads, 1, width])


def attend(g: Graph, op: ops.Attend | ops.AttendRows) -> list[str]:
    """GroupQueryAttention with its append, or Attention under a mask."""
    key = op.key.op
    if isinstance(key, Appending) and fused_with(key) is op:
        return [_with_append(g, op)]
    q, limit = g.name(op.q), g.name(op.limit)
    if isinstance(op, ops.AttendRows):
        q, limit = pad(g, q, op.mask), pad(g, limit, op.mask)
    q = g.op("Transpose", [q], perm=[0, 2, 1, 3])
    most = g.op("ReduceMax", [g.op("Reshape", [limit, g.const([-1])]), g.const([0])], keepdims=1)
    most = g.op("Max", [most, g.const([1])])
    keys, values = (g.name(v) for v in (op.key, op.value))
    if isinstance(key, Appending) and is_passing(key):
        most = g.op("Shape", [keys], start=2, end=3)
    else:
        bounds = [g.const([0]), most, g.const([2])]
        keys, values = (g.op("Slice", [name, *bounds]) for name in (keys, values))
    if op.key_scale is not None and op.value_scale is not None:
        keys, values = (
            g.op("Mul", [g.op("Cast", [codes], to=ELEMENT[DType.F32]), _scale(g, scale)])
            for codes, scale in ((keys, op.key_scale), (values, op.value_scale))
        )
    slots = g.op("Range", [g.const(0), g.op("Squeeze", [most, g.const([0])]), g.const(1)])
    limits = g.op("Unsqueeze", [limit, g.const([1, 3])])
    mask = g.op("Less", [slots, limits])
    if op.window or op.chunk:
        first = g.op("Sub", [limits, g.const(op.window or 1)])
        if op.chunk:
            first = g.op("Mul", [g.op("Div", [first, g.const(op.chunk)]), g.const(op.chunk)])
        mask = g.op("And", [mask, g.op("GreaterOrEqual", [slots, first])])
    if op.sink is not None:
        keys, values, mask = _with_sink(g, op.sink, keys, values, mask)
    y = g.op("Attention", [q, keys, values, mask], scale=op.scale)
    y = g.op("Transpose", [y], perm=[0, 2, 1, 3])
    if isinstance(op, ops.AttendRows):
        return [unpad(g, y, op.mask, op.y.shape)]
    some = g.op("Unsqueeze", [g.op("Greater", [limit, g.const(0)]), g.const([2, 3])])
    return [g.op("Where", [some, y, g.const(0.0, np.float32)])]


def _with_sink(g: Graph, sink: Value, keys: str, values: str, mask: str) -> tuple[str, str, str]:
    """One more slot of zeros, which the queries of mask [B, 1, T, S] see at their head's score."""
    heads = sizes(sink.shape)[0]
    low = g.const(np.finfo(np.float32).min, np.float32)
    scores = g.op("Where", [mask, g.const(0.0, np.float32), low])
    scores = g.op("Expand", [scores, g.const([1, heads, 1, 1])])
    column = g.op("Reshape", [g.name(sink), g.const([1, heads, 1, 1])])
    shape = g.op("Concat", [g.op("Shape", [mask], end=3), g.const([1])], axis=0)
    scores = g.op("Concat", [scores, g.op("Expand", [column, shape])], axis=3)
    one = [g.const([0]), g.const([1]), g.const([2])]
    shape = g.op("Shape", [g.op("Slice", [keys, *one])])
    empty = g.op("ConstantOfShape", [shape])
    keys, values = (g.op("Concat", [slots, empty], axis=2) for slots in (keys, values))
    return keys, values, scores


def _with_append(g: Graph, op: ops.Attend | ops.AttendRows) -> str:
    """Both appends and the attention; names the caches after what they append to."""
    key, value = op.key.op, op.value.op
    if not isinstance(key, Appending) or not isinstance(value, Appending):
        raise TypeError("no pair of appends")
    heads, width = sizes(op.q.shape[-2:])
    kv = sizes(key.cache.shape[1:2])[0]
    compact = isinstance(op, ops.AttendRows)
    rotation = _rotation(op.q, key.new)
    parts = [op.q, key.new, value.new]
    if rotation is not None:
        parts[:2] = [rope.x for rope in rotation]
    whole = _joined(parts)
    inputs: list[str] = []
    for tensor in parts if whole is None else [whole]:
        x = g.name(tensor)
        count = sizes(tensor.shape[-1:])[0]
        if tensor.type.rank == (3 if compact else 4):
            count *= sizes(tensor.shape[-2:-1])[0]
            x = g.op("Reshape", [x, g.const([-1, count] if compact else [0, 0, count])])
        inputs.append(pad(g, x, key.mask) if compact else x)
    inputs += [""] * (3 - len(inputs))
    where = ragged(g, key.mask)
    start = _start(g, key.length)
    last = g.op("Max", [g.op("Add", [start, where.before]), g.const(0, np.int32)])
    capacity = g.op("Squeeze", [g.op("Cast", [g.size(key.cache.shape[2])], to=I32), g.const([0])])
    turned: dict[str, Any] = {}
    tables = [""] * 3
    if rotation is not None:
        cos, sin, rows = rope_tables(g, rotation[0])
        positions = g.name(rotation[0].positions)
        tables = [cos, sin, pad(g, positions, key.mask) if compact else positions]
        # No token lies beyond the context; buffers may.
        capacity = g.op("Min", [capacity, g.const(rows, np.int32)])
        turned["do_rotary"] = 1
    if op.window:
        turned["local_window_size"] = op.window
    scales = [(scale and _scale(g, scale)) or "" for scale in (key.scale, value.scale)]
    inputs += [g.name(key.cache), g.name(value.cache), last, capacity]
    count = g.op("Reshape", [where.count, g.const([-1])])
    sink = "" if op.sink is None else g.name(op.sink)
    inputs += [*tables, "", sink, *scales, *[""] * 2, count]
    codes: dict[str, Any] = {}
    if all(scales):
        codes = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
        codes["kv_cache_bit_width"] = 8
    caches = [
        g.wanted.get(a.y) or g.shared.unique(f"{g.prefix}/{n}")
        for a, n in ((key, "key"), (value, "value"))
    ]
    out = g.shared.unique(f"{g.prefix}/attention:out")
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
    g.names[key.y], g.names[value.y] = caches
    if compact:
        return unpad(g, out, key.mask, op.y.shape)
    return g.op("Reshape", [out, g.const([0, 0, heads, width])])


def _start(g: Graph, length: Value) -> str:
    """Slots taken before an append, i32[B, 1]; those of all layers are made ready at once."""
    cut = _content(length).op
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


def _rotation(q: Value, k: Value) -> tuple[ops.Rope, ops.Rope] | None:
    """The rotations of queries and keys, if the attention can do both: in heads of 16 · n."""
    one, other = q.op, k.op
    if not isinstance(one, ops.Rope) or not isinstance(other, ops.Rope):
        return None
    if sizes(q.shape[-1:])[0] % 16:
        return None
    alike = (one.positions, one.theta, one.scaling) == (
        other.positions,
        other.theta,
        other.scaling,
    )
    return (one, other) if alike else None


def _joined(parts: Sequence[Value]) -> Value | None:
    """What queries, keys and values are slices of, one after the other and nothing else."""
    cuts = [_content(value).op for value in parts]
    end = 0
    for cut in cuts:
        if not isinstance(cut, ops.Slice) or cut.start != end:
            return None
        if cut.x is not cast(ops.Slice, cuts[0]).x or cut.dim != cut.x.type.rank - 1:
            return None
        end = cut.stop
    whole = cast(ops.Slice, cuts[0]).x
    return whole if end == whole.shape[-1] else None


def _count(g: Graph, mask: Value) -> str:
    """Tokens of a mask in each row, i32[B, 1]."""
    known = g.remember(("count", mask))
    if known is None:
        whole = g.op("Cast", [g.name(mask)], to=I32)
        known = g.op("ReduceSum", [whole, g.const([1])], keepdims=1)
        g.memo["count", mask] = known
    return known


EMIT: dict[type[Op], Emit] = {
    ops.Rows: rows,
    ops.GatherRows: gather_rows,
    ops.ScatterRows: scatter_rows,
    ops.TakeTokens: take_tokens,
    ops.Append: append,
    ops.AppendRows: append,
    ops.Attend: attend,
    ops.AttendRows: attend,
}
"""Lowerings by op class."""

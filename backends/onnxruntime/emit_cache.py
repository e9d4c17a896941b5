"""Caches and compacted rows as ONNX nodes; `emit_attend` has what reads caches.

An append is a TensorScatter, which writes in place when past and present are the same buffer,
unless the attention over it does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import DType, Op, Value, ops
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
    return [g.op("GatherND", [flat, places(g, op.rows)])]


def places(g: Graph, rows: Value) -> str:
    """Flat places as indices i64[N, 1]."""
    name = g.name(rows)
    return g.remember(("places", name)) or g.op("Unsqueeze", [name, g.const([1])])


def scatter_rows(g: Graph, op: ops.ScatterRows) -> list[str]:
    """ScatterND over the tokens as one dimension."""
    tail = sizes(op.base.shape[2:])
    rows = len(tail) == 1
    base = g.name(op.base)
    flat = g.flat(base, op.base.shape) if rows else g.op("Reshape", [base, g.const([-1, *tail])])
    y = g.op("ScatterND", [flat, places(g, op.rows), g.name(op.update)])
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


def unpad(g: Graph, x: str, mask: Value, width: int) -> str:
    """[B, W, ...] as compacted rows [N, width]."""
    rows = g.op("Reshape", [x, g.const([-1, width])])
    return g.op("Compress", [rows, ragged(g, mask).taken], axis=0)


def is_prefix(mask: Value) -> bool:
    """Whether a mask only cuts off padding: `iota < lengths`."""
    return isinstance(mask.op, ops.Lt) and isinstance(content(mask.op.a).op, ops.Iota)


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
    return counts_from(limit, key)


def counts_from(limit: Value, key: Appending) -> bool:
    """Whether a limit of every token is the append's length + its rank among what is appended."""
    if not isinstance(limit.op, ops.Add):
        return False
    for start, rank in ((limit.op.a, limit.op.b), (limit.op.b, limit.op.a)):
        if isinstance(rank.op, ops.CumSum) and isinstance(rank.op.x.op, ops.Cast):
            return content(start) is content(key.length) and rank.op.x.op.x is key.mask
    return False


def content(value: Value) -> Value:
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
    steps = g.op("Round", [g.op("Div", [new, cache_scale(g, scale)])])
    bounds = [g.const(value, np.float32) for value in (-128, 127)]
    return g.op("Cast", [g.op("Clip", [steps, *bounds])], to=I8)


def cache_scale(g: Graph, scale: Value) -> str:
    """A weight [KV, hd] that meets caches, [1, KV, 1, hd]."""
    if not isinstance(scale.op, ops.Weight):
        raise UnsupportedError(f"onnxruntime: the scale %{scale.name} of a cache is computed")
    name, expr = g.weight_expr(scale.op.weight)
    heads, width = expr.sizes
    return g.view(f"{name}.channels", expr, ELEMENT[DType.F32], [1, heads, 1, width])


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
}
"""Lowerings by op class."""

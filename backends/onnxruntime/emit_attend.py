"""Attention as ONNX nodes.

An append and the attention over it become one GroupQueryAttention when the query's limit says just
that; it writes in place when past and present are the same buffer. A cache that was appended to
before is read in place while every row has one token, again by a GroupQueryAttention. Everything
else attends under a mask made from the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from liquidc.backends.onnxruntime.emit_cache import (
    Appending,
    cache_scale,
    content,
    counts_from,
    fused_with,
    is_passing,
    is_prefix,
    pad,
    unpad,
)
from liquidc.backends.onnxruntime.emit_gqa import (
    apart,
    by_group,
    by_row,
    cache_names,
    fused,
    has_groups,
    label,
    pair,
    slots_taken,
)
from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import ELEMENT, Graph
from liquidc.ir import DType, Op, Value, ops
from liquidc.ir.types import dim_names
from liquidc.ir.weights import sizes


def attend(g: Graph, op: ops.Attend | ops.AttendRows) -> list[str]:
    """GroupQueryAttention with its append, or over what was appended before."""
    key = op.key.op
    if isinstance(key, Appending) and fused_with(key) is op:
        return [_with_append(g, op)]
    if isinstance(op, ops.AttendRows) and _reads_in_place(g, op):
        y = _in_place_or_masked(g, op)
    elif isinstance(op, ops.AttendRows):
        y = _masked(g, op)
    else:
        return [_masked(g, op)]
    heads, width = sizes(op.q.shape[-2:])
    return [g.viewed(y, (op.y.shape[0], heads * width), op.y.shape)]


def _masked(g: Graph, op: ops.Attend | ops.AttendRows) -> str:
    """Attention under a mask: rows [N, H · hd] of compacted tokens, [B, T, H, hd] of others."""
    key = op.key.op
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
            g.op("Mul", [g.op("Cast", [codes], to=ELEMENT[DType.F32]), cache_scale(g, scale)])
            for codes, scale in ((keys, op.key_scale), (values, op.value_scale))
        )
    slots = g.op("Range", [g.const(0), g.op("Squeeze", [most, g.const([0])]), g.const(1)])
    limits = g.op("Unsqueeze", [limit, g.const([1, 3])])
    if op.key_scale is None and not (isinstance(key, Appending) and is_passing(key)):
        keys, values = _seen_alone(g, slots, limits, keys, values)
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
        heads, width = sizes(op.q.shape[-2:])
        return unpad(g, y, op.mask, heads * width)
    some = g.op("Unsqueeze", [g.op("Greater", [limit, g.const(0)]), g.const([2, 3])])
    return g.op("Where", [some, y, g.const(0.0, np.float32)])


def _seen_alone(g: Graph, slots: str, limits: str, keys: str, values: str) -> list[str]:
    """Zeros in the slots that no token of a row sees, for limits [B, 1, T, 1].

    What lies there may be the keys and values of padding, whose states are unspecified: a score of
    NaN stays NaN under a mask, and 0 times NaN is NaN.
    """
    most = g.op("ReduceMax", [limits, g.const([2])], keepdims=1)
    seen = g.op("Less", [g.op("Unsqueeze", [slots, g.const([1])]), most])
    return [g.op("Where", [seen, each, g.const(0.0, np.float32)]) for each in (keys, values)]


def _reads_in_place(g: Graph, op: ops.AttendRows) -> bool:
    """Whether queries of one token a row see all that their row holds, in caches of floats."""
    key, limit = op.key.op, op.limit.op
    return (
        g.shared.branching
        and isinstance(key, ops.Append)
        and is_prefix(key.mask)
        and bool(dim_names(key.mask.shape[1:]))
        and isinstance(limit, ops.GatherRows)
        and limit.rows == op.rows
        and counts_from(limit.x, key)
        and op.key_scale is None
        and not op.chunk
        and sizes(op.q.shape[-1:])[0] % 8 == 0
    )


def _in_place_or_masked(g: Graph, op: ops.AttendRows) -> str:
    """Conditionals on whether there is one token in all, or in each row; [N, H · hd].

    Without new keys and values (length 0), GroupQueryAttention attends over the cache where it is;
    with several queries in a batch it refuses (ONNX Runtime 1.32).
    """
    key = cast(ops.Append, op.key.op)
    root = g.root()
    is_by_row = root.once("Equal", [root.size(key.mask.shape[1]), root.const([1])])

    def each(g: Graph) -> list[str]:
        return [by_row(g, op)]

    def several(g: Graph) -> list[str]:
        return [_masked(g, op)]

    long = _is_long(g, key) if _is_guarded(op) and has_groups(op) else None
    if long is None:
        return _either(g, is_by_row, {"each": each, "several": several})

    def grouped(g: Graph) -> list[str]:
        keys, values = g.name(op.key), g.name(op.value)
        return [by_group(g, op, g.name(op.q), keys, values, slots_taken(g, key.length))]

    alone = _is_alone(g, key.mask)

    def rows(g: Graph) -> list[str]:
        return [_either(g, alone, {"long": grouped, "each": each})]

    def other(g: Graph) -> list[str]:
        return [_either(g, is_by_row, {"rows": rows, "several": several})]

    return _either(g, long.no, {"one": lambda g: [by_row(g, op, alone=True)], "other": other})


def _is_guarded(op: ops.AttendRows) -> bool:
    """Whether it stands where some token of its mask runs, of as many as a call may have."""
    around = op.parent.parent if op.parent is not None else None
    if not isinstance(around, ops.If) or op.parent is not around.then:
        return False
    condition = around.cond.op
    some = isinstance(condition, ops.Any) and condition.x is op.mask
    return some and bool(dim_names(op.mask.shape))


def _is_alone(g: Graph, mask: Value) -> str:
    """Whether the call has one token, bool[1]."""
    root = g.root()
    return root.once("Equal", [root.size("*".join(map(str, mask.shape))), root.const([1])])


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


LONG = 192
"""Slots from which `by_group` is faster than one GroupQueryAttention that also appends."""


def _with_append(g: Graph, op: ops.Attend | ops.AttendRows) -> str:
    """Both appends and the attention; names the caches after what they append to."""
    key, value = pair(op)
    heads, width = sizes(op.q.shape[-2:])
    y, *caches = _appended(g, op)
    g.names[key.y], g.names[value.y] = caches
    count = "*".join(map(str, op.y.shape[:-2]))
    return g.viewed(y, (count, heads * width), op.y.shape)


def _appended(g: Graph, op: ops.Attend | ops.AttendRows) -> list[str]:
    """Rows [N, H · hd] and the caches, by the form that is fastest for a call.

    The most frequent is found by the first condition: a conditional takes as long as eight nodes.
    """
    key, _ = pair(op)
    if not g.shared.branching or not dim_names(key.mask.shape):
        return fused(g, op)
    long = _is_long(g, key) if has_groups(op) else None
    if not isinstance(op, ops.AttendRows):
        if long is None:
            return fused(g, op)
        forms = {"long": lambda g: apart(g, op), "short": lambda g: fused(g, op)}
        return _either(g, long.yes, forms, *cache_names(g, op))
    if not _is_guarded(op):
        return fused(g, op)
    alone = _is_alone(g, key.mask)
    one, several = (lambda g: fused(g, op, alone=True)), (lambda g: fused(g, op))
    if long is None:
        return _either(g, alone, {"one": one, "several": several}, *cache_names(g, op))

    def other(g: Graph) -> list[str]:
        forms = {"long": lambda g: apart(g, op), "several": several}
        return _either(g, alone, forms, *cache_names(g, op))

    return _either(g, long.no, {"one": one, "other": other}, *cache_names(g, op))


def _either(
    g: Graph, condition: str, forms: dict[str, Callable[[Graph], list[str]]], *outputs: str
) -> Any:
    """A conditional over two forms of something, the first if it holds; what both give."""
    arms: list[Graph] = []
    for name, emit in forms.items():
        arm = g.arm(label(g, name))
        arm.finish(emit(arm))
        arms.append(arm)
    then, other = arms
    names = [g.shared.unique(label(g, "out")), *outputs]
    return g.conditional(condition, then, other, len(names), outputs=names)


@dataclass(frozen=True)
class Long:
    """Whether the call has one token, bool[1]; and the cache of the layer many, or few."""

    yes: str
    no: str


def _is_long(g: Graph, key: Appending) -> Long | None:
    """Those conditions, which are computed for all layers at once; None if that can't be."""
    cut = content(key.length).op
    if not isinstance(cut, ops.Slice) or cut.x.op is not None or cut.dim or cut.x.type.rank != 2:
        return None
    parts = g.remember(("long", cut.x))
    if parts is None:
        root = g.root()
        count = sizes(cut.x.shape[:1])[0]
        most = root.op("ReduceMax", [root.name(cut.x), root.const([1])], keepdims=0)
        parts = []
        for compare in ("GreaterOrEqual", "Less"):
            length = root.op(compare, [most, root.const(LONG)])
            which = root.op("And", [length, _is_alone(g, key.mask)])
            split = [which] if count == 1 else root.op("Split", [which], count, num_outputs=count)
            parts.append(split)
        root.memo["long", cut.x] = parts
    return Long(*(each[cut.start] for each in parts))


EMIT: dict[type[Op], Emit] = {
    ops.Attend: attend,
    ops.AttendRows: attend,
}
"""Lowerings by op class."""

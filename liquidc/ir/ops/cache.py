"""Caches of keys and values, and attention over them, of whole batches and of compacted rows.

B rows of T tokens; KV key/value heads of width hd; a cache has S slots per row and holds floats, or
codes i8 with a scale f32[KV, hd].
"""

from __future__ import annotations

from liquidc.ir.core import Op, Value, attribute, operand, optional, result
from liquidc.ir.ops.liquid import expect
from liquidc.ir.types import Dim, DType, TensorType


class Append(Op, name="append"):
    """Write the tokens of `new` [B, T, KV, hd] where `mask` [B, T] holds into the cache.

    Row b's masked tokens go, in order, to slots length[b], length[b] + 1, …; slots beyond the
    last one written are scratch and may change; slots before `length[b]` stay as they are.
    With `scale` f32[KV, hd] the cache holds codes i8: the multiples of it that are nearest.
    """

    cache: Value = operand()
    new: Value = operand()
    length: Value = operand()
    mask: Value = operand()
    scale: Value | None = optional()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the cache [B, KV, S, hd]."""
        return (self.cache.type,)

    def verify(self) -> None:
        """Operand types."""
        if self.cache.type.rank != 4 or self.new.type.rank != 4:
            raise ValueError(f"a cache [B, KV, S, hd] can't take {self.new.type}")
        rows, heads, _, width = self.cache.shape
        tokens = self.new.shape[1]
        dtype = _dtype_behind(self.cache, self.scale)
        expect(self.new, "the new entries", dtype, rows, tokens, heads, width)
        expect(self.length, "length", DType.I64, rows)
        expect(self.mask, "mask", DType.BOOL, rows, tokens)


class Attend(Op, name="attend"):
    """Grouped-query attention of q [B, T, H, hd] over a cache [B, KV, S, hd].

    Query (b, t) sees the slots j < limit[b, t] =: n; with none it yields 0. With a `window` it sees
    the last so many of them, j >= n - window (sliding window, arXiv 2310.06825); with a `chunk`
    those of its own chunk, j >= floor((n - 1) / chunk) * chunk (Llama 4). `sink` f32[H] are scores
    of each head that take their part of the softmax and give nothing (GPT-OSS). Codes are read
    with the scales f32[KV, hd] that they were written with.
    """

    q: Value = operand()
    key: Value = operand()
    value: Value = operand()
    limit: Value = operand()
    key_scale: Value | None = optional()
    value_scale: Value | None = optional()
    sink: Value | None = optional()
    scale: float = attribute()
    window: int = attribute(default=0)
    chunk: int = attribute(default=0)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As q."""
        return (self.q.type,)

    def verify(self) -> None:
        """Operand types."""
        if self.q.type.rank != 4:
            raise ValueError(f"q must be [B, T, H, hd], not {self.q.type}")
        rows, tokens, heads, width = self.q.shape
        _check_caches(self, rows, heads, width)
        expect(self.limit, "limit", DType.I64, rows, tokens)


class AppendRows(Op, name="append_rows"):
    """`append` of compacted tokens: `new` [N, KV, hd] belongs to `rows` [N] of `mask` [B, T]."""

    cache: Value = operand()
    new: Value = operand()
    rows: Value = operand()
    length: Value = operand()
    mask: Value = operand()
    scale: Value | None = optional()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the cache [B, KV, S, hd]."""
        return (self.cache.type,)

    def verify(self) -> None:
        """Operand types."""
        if self.cache.type.rank != 4:
            raise ValueError(f"a cache is [B, KV, S, hd], not {self.cache.type}")
        rows, heads, _, width = self.cache.shape
        dtype = _dtype_behind(self.cache, self.scale)
        expect(self.new, "the new entries", dtype, *self.rows.shape, heads, width)
        expect(self.length, "length", DType.I64, rows)
        if self.mask.dtype != DType.BOOL or self.mask.shape[:1] != (rows,):
            raise ValueError(f"the mask must be bool[{rows}, T], not {self.mask.type}")


class AttendRows(Op, name="attend_rows"):
    """`attend` of compacted queries: q [N, H, hd], limit [N] belong to `rows` [N] of `mask`."""

    q: Value = operand()
    key: Value = operand()
    value: Value = operand()
    limit: Value = operand()
    rows: Value = operand()
    mask: Value = operand()
    key_scale: Value | None = optional()
    value_scale: Value | None = optional()
    sink: Value | None = optional()
    scale: float = attribute()
    window: int = attribute(default=0)
    chunk: int = attribute(default=0)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As q."""
        return (self.q.type,)

    def verify(self) -> None:
        """Operand types."""
        if self.q.type.rank != 3:
            raise ValueError(f"q must be [N, H, hd], not {self.q.type}")
        count, heads, width = self.q.shape
        _check_caches(self, self.mask.shape[0], heads, width)
        expect(self.limit, "limit", DType.I64, count)
        expect(self.rows, "rows", DType.I64, count)


def _check_caches(op: Attend | AttendRows, rows: Dim, heads: Dim, width: Dim) -> None:
    key, value = op.key, op.value
    if key.type.rank != 4 or key.type != value.type:
        raise ValueError(f"key and value must be [B, KV, S, hd], not {key.type}, {value.type}")
    groups = key.shape[1]
    if key.shape[0] != rows or key.shape[3] != width:
        raise ValueError(f"a cache {key.type} does not meet {heads} heads of {width}")
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        raise ValueError(f"{heads} heads can't share {groups} key/value heads")
    if op.sink is not None:
        expect(op.sink, "the sink", op.q.dtype, heads)
    if op.window < 0 or op.chunk < 0 or (op.window and op.chunk):
        raise ValueError(f"window {op.window} and chunk {op.chunk}: one of them, or neither")
    for cache, scale in ((key, op.key_scale), (value, op.value_scale)):
        if _dtype_behind(cache, scale) != op.q.dtype:
            raise ValueError(f"a cache {cache.type} does not meet {op.q.type}")


def _dtype_behind(cache: Value, scale: Value | None) -> DType:
    """The type of what a cache stands for."""
    if (cache.dtype == DType.I8) != (scale is not None):
        raise ValueError(f"a cache {cache.type}: i8 goes with a scale, and nothing else does")
    if scale is None:
        return cache.dtype
    expect(scale, "the scale", DType.F32, cache.shape[1], cache.shape[3])
    return DType.F32

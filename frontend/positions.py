"""The context of a traced module: what it is named, or what its tables of positions hold.

Rotary angles are computed for any position, so that they limit nothing. A table that is read by
position, such as learned positions, does.
"""

from __future__ import annotations

from collections.abc import Iterator

from liquidc.errors import ConfigError
from liquidc.ir import Dim, DType, Function, Module, Op, Value, ops
from liquidc.ir.weights import sizes

FAR = 2**40
"""A position beyond every table."""
INTEGERS = (DType.I64, DType.I32)


def context_of(module: Module, named: int | None) -> int | None:
    """How many tokens a row can hold; None if nothing limits it.

    Args:
        module: just traced: its main function counts positions in `%positions`, or without a
            cache in an `iota`.
        named: `max_position_embeddings` of the model's config.

    Raises:
        ConfigError: a table has fewer rows than the context that is named; or none is named, and
            which row a position reads can't be told.
    """
    limits = [
        _limit(op, named) for op in module.functions["prefill"].body.walk() if _reads(op, module)
    ]
    return min(limits, default=None) if named is None else named


def _reads(op: Op, module: Module) -> bool:
    """Whether an op reads a table by position."""
    if not isinstance(op, ops.Embed | ops.Gather) or not isinstance(_rows(op), int):
        return False
    return _counts(_index(op), module.functions["prefill"])


def _rows(op: Op) -> Dim:
    """The size of the dimension that is read."""
    return op.table.shape[0] if isinstance(op, ops.Embed) else op.operands[0].shape[_dim(op)]


def _index(op: Op) -> Value:
    return op.ids if isinstance(op, ops.Embed) else op.operands[1]


def _limit(op: Op, named: int | None) -> int:
    """The positions that a table has rows for."""
    (rows,) = sizes([_rows(op)])
    first, last = _row(_index(op), 0), _row(_index(op), FAR)
    told = f"{op.loc}: " if op.loc else ""
    if first is None or last is None:
        if named is None:
            raise ConfigError(
                f"{told}a table of {rows} rows is read by position, but which row a position reads "
                "can't be told: name the context as max_position_embeddings of the module's config"
            )
        return named
    wanted = None if named is None else _row(_index(op), named - 1)
    if wanted is not None and wanted >= rows:
        raise ConfigError(
            f"{told}a table of {rows} rows is read by position, and max_position_embeddings is "
            f"{named}; it must be at most {rows - first}"
        )
    return min(last, rows - 1) - first + 1


def _dim(op: Op) -> int:
    return op.dim if isinstance(op, ops.Gather) else 0


def _counts(value: Value, function: Function) -> bool:
    """Whether a value depends on the positions of tokens."""
    return any(_is_position(v, function) for v in _made_of(value))


def _made_of(value: Value) -> Iterator[Value]:
    """An integer, and the integers that it is computed from."""
    stack, seen = [value], set[Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        if value.op is not None and value.dtype in INTEGERS:
            stack += value.op.operands


def _is_position(value: Value, function: Function) -> bool:
    cached = any(arg.name == "position_start" for arg in function.args)
    return _is_counted(value) if cached else isinstance(value.op, ops.Iota)


def _is_counted(value: Value) -> bool:
    return value.name == "positions" and value.dtype is DType.I64


def _moves(value: Value) -> bool:
    """Whether a value depends on a position, or on any count."""
    return any(_is_counted(v) or isinstance(v.op, ops.Iota) for v in _made_of(value))


def _row(value: Value, position: int) -> int | None:
    """The row that a position reads; None if the way to it has other steps than these."""
    op = value.op
    if _is_counted(value) or isinstance(op, ops.Iota):
        return position
    if isinstance(op, ops.Constant):
        return int(max(op.value)) if len(set(op.value)) == 1 else None
    if isinstance(op, ops.Reshape | ops.Broadcast | ops.Cast | ops.GatherRows):
        return _row(op.operands[0], position)
    if isinstance(op, ops.Add | ops.Sub | ops.Minimum | ops.Maximum):
        a, b = _row(op.a, position), _row(op.b, position)
        if a is None or b is None or (_moves(op.a) and _moves(op.b)):
            return None  # of two positions: a distance
        if isinstance(op, ops.Add | ops.Sub):
            return a + b if isinstance(op, ops.Add) else a - b
        return min(a, b) if isinstance(op, ops.Minimum) else max(a, b)
    return None

"""The pass `stack-results`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from liquidc.ir import Module, Op, Value, ops
from liquidc.ir.rewriter import Rewriter, Rule, Statistics, apply_rules
from liquidc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class StackResults(Pass):
    """What is computed alike for every layer and then stacked is computed once, of the stack.

    Before::

        %l0 = add %kv0, sum(cast(%gate0)), ...        (%kv0 is row 0 of %kv_len)
        %l1 = add %kv1, sum(cast(%gate1)), ...
        %r = concat [reshape(%l0), reshape(%l1)], dim=0

    After::

        %gates = concat [reshape(%gate0), reshape(%gate1)], dim=0
        %r = add %kv_len, sum(cast(%gates))

    A decode step then has fewer small operations for each layer. Casts, sums, additions of equal
    shapes, gate probabilities and rows of one tensor are stacked. Probabilities may move by their
    last bit: a runtime may compute the sigmoid of a vector's end by another formula than the rest.
    """

    name: ClassVar[str] = "stack-results"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Until nothing is stacked late."""
        apply_rules(module, [StackEarlier()], statistics)


class StackEarlier(Rule):
    """stack(f(x), f(y)) → f(stack(x, y)); stack(x[0], x[1]) → x, if x has no more rows."""

    root = (ops.Concat,)

    def rewrite(self, op: ops.Concat, rw: Rewriter) -> Sequence[Value]:
        """The function of the stack."""
        parts = _stacked(op)
        rw.check(len(parts) > 1, "no stack of several tensors")
        made = _joined(parts, rw)
        rw.check(made is not None, "the tensors are not made alike")
        return [cast(Value, made)]


def _stacked(op: ops.Concat) -> list[Value]:
    """What a concatenation along a new first dimension puts there; nothing if it is no such one."""
    parts: list[Value] = []
    for x in op.xs:
        if op.dim != 0 or not isinstance(x.op, ops.Reshape):
            return []
        if x.shape != (1, *x.op.x.shape):
            return []
        parts.append(x.op.x)
    return parts


def _stack(values: Sequence[Value], rw: Rewriter) -> Value:
    """The values along a new first dimension."""
    made = _joined(values, rw)
    if made is not None:
        return made
    rows = [rw.emit(ops.Reshape(v, shape=(1, *v.shape))).y for v in values]
    return rw.emit(ops.Concat(rows, dim=0)).y


def _joined(values: Sequence[Value], rw: Rewriter) -> Value | None:
    """The stack without a concatenation of these values, if they are made alike."""
    makers = [value.op for value in values]
    first = makers[0]
    if first is None or any(type(op) is not type(first) for op in makers):
        return None
    if _one(values):
        return None
    if (whole := _rows_of_one(values)) is not None:
        return whole
    alike = all(op is not None and _settings(op) == _settings(first) for op in makers)
    match first:
        case ops.Cast() if alike:
            inner = [cast(ops.Cast, op).x for op in makers]
            return rw.emit(ops.Cast(_stack(inner, rw), to=first.to, loc=first.loc)).y
        case ops.Sum() if alike:
            inner = [cast(ops.Sum, op).x for op in makers]
            dims = tuple(dim + 1 for dim in first.dims)
            made = ops.Sum(_stack(inner, rw), dims=dims, keep=first.keep, loc=first.loc)
            return rw.emit(made).y
        case ops.Add():
            adds = [cast(ops.Add, op) for op in makers]
            left, right = [op.a for op in adds], [op.b for op in adds]
            if any(term.shape != first.y.shape for term in (*left, *right)):
                return None
            if _one(left) and _one(right):
                return None
            return rw.emit(ops.Add(_term(left, rw), _term(right, rw), loc=first.loc)).y
        case ops.DepthGate():
            gates = [cast(ops.DepthGate, op) for op in makers]
            if any(value is not gate.p for value, gate in zip(values, gates, strict=True)):
                return None
            return rw.emit(ops.Sigmoid(_stack([gate.score for gate in gates], rw))).y
        case _:
            return None


def _term(values: Sequence[Value], rw: Rewriter) -> Value:
    """The stack of one side of additions; a single row, which is broadcast, if all are the same."""
    if _one(values):
        return rw.emit(ops.Reshape(values[0], shape=(1, *values[0].shape))).y
    return _stack(values, rw)


def _one(values: Sequence[Value]) -> bool:
    return all(value is values[0] for value in values)


def _settings(op: Op) -> list[object]:
    return [op.attributes.get(name) for name in ("to", "dims", "keep")]


def _rows_of_one(values: Sequence[Value]) -> Value | None:
    """The tensor whose rows, all and in order, the values are."""
    found: Value | None = None
    for row, value in enumerate(values):
        cut = value.op.x.op if isinstance(value.op, ops.Reshape) else None
        if not isinstance(cut, ops.Slice) or (cut.dim, cut.start, cut.stop) != (0, row, row + 1):
            return None
        if found not in (None, cut.x) or value.shape != cut.x.shape[1:]:
            return None
        found = cut.x
    return found if found is not None and found.shape[0] == len(values) else None

"""What values are on tokens whose mask is known."""

from __future__ import annotations

from liquidc.ir import DType, Value, ops
from liquidc.passes.eliminate_common import signature
from liquidc.passes.fold_constants import splat

Number = int | float | bool


class KnownMask:
    """Values of an arm on tokens where a mask is known.

    Args:
        mask: bool[B, T], from outside.
        inside: the values that the arm defines.
        known: what the mask is on these tokens.
    """

    def __init__(self, mask: Value, inside: set[Value], known: bool) -> None:
        self.mask, self.inside, self.known = mask, inside, known

    def truth(self, value: Value) -> bool | None:
        """What a mask is on these rows, if that is known."""
        if value is self.mask:
            return self.known
        if value.dtype != DType.BOOL:
            return None
        op = value.op
        match op:
            case ops.Reshape() | ops.Broadcast():
                return self.truth(op.x)
            case ops.Not():
                inner = self.truth(op.x)
                return None if inner is None else not inner
            case ops.And():
                sides = [self.truth(side) for side in op.operands]
                return False if False in sides else None if None in sides else True
            case ops.Constant():
                return bool(op.value[0]) if splat(value) is not None else None
            case _:
                return None

    def simple(self, value: Value) -> Value | Number | None:
        """The value on these rows: one from outside, a number, or None if it must be computed."""
        if value not in self.inside:
            return value if splat(value) is None else splat(value)
        if (number := splat(value)) is not None:
            return number
        op = value.op
        match op:
            case ops.Where() if (known := self.truth(op.mask)) is not None:
                return self.simple(op.a if known else op.b)
            case ops.Add():
                a, b = self.simple(op.a), self.simple(op.b)
                return a if is_zero(b) else b if is_zero(a) else None
            case ops.Route() if self.truth(op.mask) is False:
                return -1 if value is op.index else 0.0
            case ops.Renumber() if self.simple(op.index) == -1:
                return -1
            case ops.GroupedExperts() | ops.MapExperts() if self.simple(op.index) == -1:
                return 0.0
            case ops.Reshape() | ops.Broadcast() | ops.Cast():
                inner = self.simple(op.x)
                return None if isinstance(inner, Value) else inner
            case _:
                return None

    def same(self, mine: Value, other: Value) -> bool:
        """Whether a value is, on these tokens, what `other` of the other arm is.

        Both must be computed by the same ops from the same values, once the mask is known.
        """
        mine = self._chosen(mine)
        if mine is other:
            return True
        simple = self.simple(mine)
        if isinstance(simple, int | float):
            return splat(other) == simple and mine.type == other.type
        if simple is other:
            return True
        a, b = mine.op, other.op
        if a is None or b is None or type(a) is not type(b) or a.regions or b.regions:
            return False
        pairs = list(zip(a.operands, b.operands, strict=False))
        return (
            a.results.index(mine) == b.results.index(other)
            and signature(a, []) == signature(b, [])
            and len(a.operands) == len(b.operands)
            and all(self.same(x, y) for x, y in pairs)
        )

    def _chosen(self, value: Value) -> Value:
        """The value that a choice by the mask comes down to."""
        while value in self.inside:
            op = value.op
            match op:
                case ops.Where() if (known := self.truth(op.mask)) is not None:
                    value = op.a if known else op.b
                case ops.Add() if self.simple(op.b) == 0 and op.a.type == value.type:
                    value = op.a
                case ops.Add() if self.simple(op.a) == 0 and op.b.type == value.type:
                    value = op.b
                case ops.Append() | ops.AppendRows() if self.truth(op.mask) is False:
                    value = op.cache
                case _:
                    return value
        return value


def is_zero(value: Value | Number | None) -> bool:
    """Whether a value is the number 0."""
    return isinstance(value, int | float) and value == 0

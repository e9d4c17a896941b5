"""The pass `fold-constants`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from liquidc.ir import DType, Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Rewriter, Rule, Statistics, apply_rules
from liquidc.ir.types import broadcast
from liquidc.passes.base import Pass, PassContext

MAX_ELEMENTS = 4096
"""Constants are not computed beyond this size: they are written out in the program."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes what is known: ops on constants, ops that change nothing, layouts of weights.

    Before::

        %w = weight weight="a" : f32[2, 3]
        %t = transpose %w, perm=[1, 0]
        %r = reshape %x, shape=[4] : f32[4]      (x is f32[4])

    After::

        %t = weight weight="a.t10" : f32[3, 2]   (%r is %x)

    x + 0 is folded for integers only: it turns -0.0 into 0.0, as x - (-0) does.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Apply the rules until none fires."""
        rules = [SkipIdentity(), MergeReshapes(), FoldWhere(), FoldOperation(), FoldWeight(module)]
        apply_rules(module, rules, statistics)


def constant(value: Value) -> ops.Constant | None:
    """The constant that defines `value`, if one does."""
    return value.op if isinstance(value.op, ops.Constant) else None


def splat(value: Value) -> int | float | bool | None:
    """The number that `value` repeats, if it is known to."""
    op = value.op
    while isinstance(op, ops.Broadcast | ops.Reshape):
        op = op.x.op
    if isinstance(op, ops.Constant) and len({repr(x) for x in op.value}) == 1:  # 0.0 is not -0.0
        return op.value[0]
    return None


class SkipIdentity(Rule):
    """An op that returns its operand → the operand."""

    root = (ops.Reshape, ops.Broadcast, ops.Transpose, ops.Slice, ops.Cast, ops.Binary, ops.Reduce)

    def rewrite(self, op: Op, rw: Rewriter) -> Sequence[Value]:
        """The operand, if nothing changes."""
        if isinstance(op, ops.Add | ops.Sub | ops.Mul | ops.Div | ops.And | ops.Or):
            return [self._binary(op, rw)]
        rw.check(
            not isinstance(op, ops.Compare | ops.Logical | ops.Maximum | ops.Minimum), "it compares"
        )
        x = op.operands[0]
        rw.check(op.results[0].type == x.type, "the type changes")
        if isinstance(op, ops.Transpose):
            rw.check(op.perm == tuple(sorted(op.perm)), "the order changes")
        if isinstance(op, ops.Reduce):
            rw.check(all(x.shape[dim] == 1 for dim in op.dims), "it adds up several elements")
        return [x]

    def _binary(self, op: ops.Binary, rw: Rewriter) -> Value:
        for value, other, right in ((op.a, op.b, True), (op.b, op.a, False)):
            number = splat(other)
            if value.type != op.y.type or number is None:
                continue
            whole = not value.dtype.is_float
            neutral = (
                (isinstance(op, ops.Mul) and number == 1)
                or (isinstance(op, ops.Div) and right and number == 1)
                or (isinstance(op, ops.Add) and whole and number == 0)
                or (isinstance(op, ops.Sub) and right and number == 0 and _positive(number))
                or (isinstance(op, ops.And) and number is True)
                or (isinstance(op, ops.Or) and number is False)
            )
            if neutral:
                return value
        rw.refuse("no operand is neutral")


def _positive(number: float) -> bool:
    """False for negative numbers and -0.0."""
    return math.copysign(1.0, number) > 0


class MergeReshapes(Rule):
    """reshape(reshape(x)) → reshape(x); transpose(transpose(x)) → transpose(x)."""

    root = (ops.Reshape, ops.Transpose)

    def rewrite(self, op: ops.Reshape | ops.Transpose, rw: Rewriter) -> Sequence[Value]:
        """One op instead of two."""
        if isinstance(op, ops.Reshape):
            inner = rw.need(op.x.op, ops.Reshape, "the operand is no reshape")
            return [rw.emit(ops.Reshape(inner.x, shape=op.shape, loc=op.loc)).y]
        first = rw.need(op.x.op, ops.Transpose, "the operand is no transpose")
        perm = tuple(first.perm[i] for i in op.perm)
        return [rw.emit(ops.Transpose(first.x, perm=perm, loc=op.loc)).y]


class FoldWhere(Rule):
    """where(mask, a, a) → a; where(true, a, b) → a; where(false, a, b) → b."""

    root = ops.Where

    def rewrite(self, op: ops.Where, rw: Rewriter) -> Sequence[Value]:
        """The side that is known to be taken."""
        known = splat(op.mask)
        same = op.a is op.b
        rw.check(same or known is not None, "the mask is not known")
        side = op.a if same or known else op.b
        if side.shape != op.y.shape:
            rw.check(broadcast([side.shape, op.y.shape]) == op.y.shape, "no broadcast")
            side = rw.emit(ops.Broadcast(side, shape=op.y.shape, loc=op.loc)).y
        return [side]


class FoldOperation(Rule):
    """An op on constants → a constant."""

    def rewrite(self, op: Op, rw: Rewriter) -> Sequence[Value]:
        """The computed constant."""
        rw.check(bool(op.operands) and not op.terminator and not op.regions, "nothing to compute")
        rw.check(len(op.results) == 1, "several results")
        inputs = [
            rw.need(value.op, ops.Constant, "an operand is not constant") for value in op.operands
        ]
        shape = op.results[0].shape
        rw.check(all(isinstance(size, int) for size in shape), "a size is not known")
        count = 1
        for size in lazy.sizes(shape):
            count *= size
        rw.check(count <= MAX_ELEMENTS, f"more than {MAX_ELEMENTS} elements")
        rw.check(len(inputs[0].value) == count or count == 1, "it would only repeat a constant")
        return [rw.emit(_compute(op)).y]


def _compute(op: Op) -> ops.Constant:
    from liquidc.ir.core import Function
    from liquidc.ir.interpreter import Interpreter

    function = Function("fold", [])
    mapping: dict[Value, Value] = {}
    for value in dict.fromkeys(op.operands):
        function.body.append(cast(Op, value.op).clone(mapping))
    copy = function.body.append(op.clone(mapping))
    function.body.append(ops.Return([copy.results[0]]))
    function.result_names = ("y",)
    module = Module("fold")
    module.add(function)
    tensor = Interpreter(module).run("fold", {})["y"]
    return ops.Constant(value=tuple(tensor.flatten().tolist()), result_types=[op.results[0].type])


class FoldWeight(Rule):
    """transpose, slice, cast or concat of weights → another weight, still lazy."""

    root = (ops.Transpose, ops.Slice, ops.Cast, ops.Concat)

    def __init__(self, module: Module) -> None:
        self.module = module

    def rewrite(self, op: Op, rw: Rewriter) -> Sequence[Value]:
        """The new weight."""
        used = [rw.need(v.op, ops.Weight, "an operand is no weight") for v in op.operands]
        names = [weight.weight for weight in used]
        exprs = [self.module.weights[name] for name in names]
        match op:
            case ops.Transpose():
                name = f"{names[0]}.t{''.join(map(str, op.perm))}"
                expr = lazy.Transpose(exprs[0], op.perm)
            case ops.Slice():
                name = f"{names[0]}.d{op.dim}.{op.start}.{op.stop}"
                expr = lazy.Slice(exprs[0], op.dim, op.start, op.stop)
            case ops.Cast():
                rw.check(op.to != DType.BOOL, "not to bool")
                name, expr = f"{names[0]}.{op.to}", lazy.cast(exprs[0], op.to)
            case _:
                dim = cast(ops.Concat, op).dim
                name, expr = joined(names), lazy.Concat(tuple(exprs), dim)
        return [declare(self.module, rw, name, expr)]


def joined(names: Sequence[str]) -> str:
    """A name for weights put together: the first one's, and what is new in the others."""
    return names[0] + "".join(f".and.{name.split('.')[-2:][0]}" for name in names[1:])


def declare(module: Module, rw: Rewriter, name: str, expr: lazy.WeightExpr) -> Value:
    """A weight op for `expr`, under `name` or, if that is another weight, the next free one."""
    free, number = name, 1
    while free in module.weights and module.weights[free] != expr:
        number += 1
        free = f"{name}.{number}"
    module.weights[free] = expr
    return rw.emit(ops.Weight(weight=free, result_types=[expr.type])).y

"""The pass `fold-router`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import DType, Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Rewriter, Rule, Statistics, apply_rules
from liquidc.ir.weight_maths import Mix, Product
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare, joined
from liquidc.passes.routers import router_linears

LARGEST = 2**26
"""Multiplications of a product of weights; each is done exactly, at compile time."""


@dataclass(frozen=True)
class FoldRouter(Pass):
    """What a router computes with weights alone is computed at compile time.

    Two `linear` without anything between them become one. Before::

        %h = linear %x, %dec : f32[B, T, 64]
        %s = linear %h, %head : f32[B, T, 1]

    After::

        %s = linear %x, %w : f32[B, T, 1]               (w = product(head, dec))

    A score that is the difference of two logits becomes one logit. Before::

        %z = linear %x, %head : f32[B, T, 2]
        %s = sub slice(%z, 1), slice(%z, 0)

    After::

        %s = linear %x, %w : f32[B, T, 1]               (w = mix([row 1, row 0], [1, -1]))

    The routers of depth gates and of experts alone are folded, and only in float32. The weight
    that is stored is correctly rounded, so a score moves by no more than rounding, and a decision
    only where it was a tie up to rounding.
    """

    name: ClassVar[str] = "fold-router"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Apply both rules until none fires."""
        routed = router_linears(module)
        rules = [FoldLinearChain(module, routed), FoldTwoLogits(module, routed)]
        apply_rules(module, rules, statistics)


class FoldLinearChain(Rule):
    """linear(linear(x, A), B, b) → linear(x, B·A, b) where that takes fewer weights."""

    root = ops.Linear

    def __init__(self, module: Module, routed: set[Op]) -> None:
        self.module, self.routed = module, routed

    def rewrite(self, op: ops.Linear, rw: Rewriter) -> Sequence[Value]:
        """The one linear."""
        rw.check(op in self.routed, "it belongs to no router")
        inner = rw.need(op.x.op, ops.Linear, "what it projects is no projection")
        rw.check(len(inner.y.uses) == 1, "the projection before it is used elsewhere")
        rw.check(inner.bias is None, "the projection before it has a bias")
        names = [weight_of(linear, rw) for linear in (op, inner)]
        b, a = (self.module.weights[name] for name in names)
        (m, k), n = b.sizes, a.sizes[1]
        rw.check(m * n < m * k + k * n, "one projection takes as many weights as two")
        rw.check(m * k * n <= LARGEST, "the product of its weights is too large")
        weight = declare(self.module, rw, joined(names), Product(b, a))
        folded = rw.emit(op.clone(x=inner.x, weight=weight))
        self.routed.add(folded)
        return [folded.y]


class FoldTwoLogits(Rule):
    """z[i] - z[j] of z = linear(x, W, b) with two rows → one linear with their difference."""

    root = ops.Sub

    def __init__(self, module: Module, routed: set[Op]) -> None:
        self.module, self.routed = module, routed

    def rewrite(self, op: ops.Sub, rw: Rewriter) -> Sequence[Value]:
        """The one logit."""
        rw.check(op.a.type == op.b.type, "its operands differ in shape")
        parts = [_logit(value, rw) for value in op.operands]
        linear = rw.need(parts[0].x.op, ops.Linear, "the logits come from no projection")
        rw.check(linear in self.routed, "it belongs to no router")
        dims, lead = {part.dim for part in parts}, linear.y.shape[:-1]
        rows = [(part.start, part.stop) for part in parts]
        each = linear.y.shape[-1] == 2 and dims == {len(lead)} and sorted(rows) == [(0, 1), (1, 2)]
        rw.check(each and parts[1].x is linear.y, "they are not the two logits of one projection")
        rw.check(len(linear.y.uses) == 2, "the logits are used elsewhere")
        rw.check(op.y.shape in (lead, (*lead, 1)), "the logits are in another shape")
        name = weight_of(linear, rw)
        weight = self._difference(name, rows, rw)
        bias = None
        if linear.bias is not None:
            known = rw.need(linear.bias.op, ops.Weight, "the bias is no weight")
            bias = self._difference(known.weight, rows, rw)
        folded = rw.emit(linear.clone(weight=weight, bias=bias, reinfer=True))
        self.routed.add(folded)
        if folded.y.type == op.y.type:
            return [folded.y]
        return [rw.emit(ops.Reshape(folded.y, shape=op.y.shape, loc=op.loc)).y]

    def _difference(self, name: str, rows: Sequence[tuple[int, int]], rw: Rewriter) -> Value:
        """One row of a weight or bias minus the other."""
        expr = self.module.weights[name]
        parts = tuple(lazy.Slice(expr, 0, *row) for row in rows)
        return declare(self.module, rw, f"{name}.difference", Mix(parts, (1.0, -1.0)))


def weight_of(linear: ops.Linear, rw: Rewriter) -> str:
    """The name of the weight of a projection in float32.

    Raises:
        Refusal: it is computed, or the projection has another type.
    """
    weight = rw.need(linear.weight.op, ops.Weight, "a factor is no weight")
    rw.check(linear.y.dtype == DType.F32, "the router computes in the model's type")
    return weight.weight


def _logit(value: Value, rw: Rewriter) -> ops.Slice:
    """The slice that a value was before it was reshaped; nothing else uses either.

    Raises:
        Refusal: it was none.
    """
    rw.check(len(value.uses) == 1, "the logits are used elsewhere")
    if isinstance(value.op, ops.Reshape):
        return _logit(value.op.x, rw)
    return rw.need(value.op, ops.Slice, "no difference of logits")

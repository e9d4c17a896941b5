"""The pass `group-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Rewriter, Rule, Statistics, apply_rules
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare


@dataclass(frozen=True)
class GroupExperts(Pass):
    """`map_experts` whose body is a SwiGLU feed-forward becomes one `grouped_experts`.

    Before::

        %y = map_experts %x, %i, %w, [%gate_up, %down] (%e, %gu, %d) {
          %h = linear %e, %gu
          %a = mul silu(slice(%h, first half)), slice(%h, second half)
          yield linear(%a, %d)
        }

    After::

        %y = grouped_experts %x, %i, %w, %gate_up, %down

    Only the tokens that chose an expert meet its weights from here on: sums may be ordered
    differently.
    """

    name: ClassVar[str] = "group-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Apply the rule until it no longer fires."""
        apply_rules(module, [GroupSwiglu(module)], statistics)


class GroupSwiglu(Rule):
    """map_experts of silu(gate x) · up x → grouped_experts."""

    root = ops.MapExperts

    def __init__(self, module: Module) -> None:
        self.module = module

    def rewrite(self, op: ops.MapExperts, rw: Rewriter) -> Sequence[Value]:
        """The grouped op."""
        rw.check(op.y.type == op.x.type, "the experts change the type of the tokens")
        tokens, *params = op.body.args
        stacked = dict(zip(params, op.params, strict=True))
        down = rw.need(op.body.terminator.operands[0].op, ops.Linear, "the body ends in no linear")
        rw.check(down.bias is None and down.weight in stacked, "the down projection is another")
        product = rw.need(down.x.op, ops.Mul, "no product of gate and up")
        for gated, up in ((product.a, product.b), (product.b, product.a)):
            if isinstance(gated.op, ops.SiLU):
                gate_up = self._gate_up(gated.op.x, up, tokens, stacked, rw)
                return [
                    rw.emit(
                        ops.GroupedExperts(
                            op.x,
                            op.index,
                            op.weight,
                            gate_up,
                            stacked[down.weight],
                            apply=op.apply,
                            loc=op.loc,
                        )
                    ).y
                ]
        rw.refuse("the gate's activation is not silu")

    def _gate_up(
        self, gate: Value, up: Value, tokens: Value, stacked: dict[Value, Value], rw: Rewriter
    ) -> Value:
        """The stacked weight [E, 2I, D] that gate and up come from."""
        if isinstance(gate.op, ops.Slice):
            both = rw.need(gate.op.x.op, ops.Linear, "gate and up are no slices of a linear")
            other = rw.need(up.op, ops.Slice, "only the gate is a slice")
            half = lazy.sizes(both.y.shape[-1:])[0] // 2
            rw.check(other.x is both.y, "gate and up are slices of two things")
            first = (gate.op.start, gate.op.stop) == (0, half)
            second = (other.start, other.stop) == (half, lazy.sizes(both.y.shape[-1:])[0])
            rw.check(first and second, "gate and up are not the two halves")
            rw.check(self._plain(both, tokens, stacked), "gate and up are no plain projection")
            return stacked[both.weight]
        parts = [rw.need(v.op, ops.Linear, "gate or up is no linear") for v in (gate, up)]
        rw.check(all(self._plain(p, tokens, stacked) for p in parts), "no plain projections")
        rw.check(gate.type == up.type, "gate and up differ in width")
        used = [rw.need(stacked[p.weight].op, ops.Weight, "a param is no weight") for p in parts]
        names = [weight.weight for weight in used]
        expr = lazy.Concat(tuple(self.module.weights[name] for name in names), 1)
        return declare(self.module, rw, f"{names[0]}.gate_up", expr)

    def _plain(self, op: Op, tokens: Value, stacked: dict[Value, Value]) -> bool:
        return (
            isinstance(op, ops.Linear)
            and op.bias is None
            and op.x is tokens
            and op.weight in stacked
        )

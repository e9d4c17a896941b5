"""The pass `compact-tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, Module, ops
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.ir.types import dim_names, product
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.token_rows import ArmRows


@dataclass(frozen=True)
class CompactTokens(Pass):
    """A masked arm computes only the tokens that its mask lets through.

    Before::

        %y = if any(%m) { %h = linear %x, %w  yield %x + where(%m, %h, 0) } else { yield %x }

    After::

        %y = if any(%m) {
          %r = rows %m, dim="N0" : i64[N0]
          %xr = gather_rows %x, %r : f32[N0, 8]
          %h = linear %xr, %w : f32[N0, 8]
          %yr = add %xr, %h : f32[N0, 8]
          %y = scatter_rows %x, %r, %yr : f32[B, T, 8]
          yield %y
        } else { yield %x }

    What an arm yields for the other tokens is worked out with the mask taken to be false: a value
    from outside becomes the base of the scatter; anything else (an adapter) is computed on the
    other tokens' rows. An arm that is not understood stays masked, with the reason.
    """

    name: ClassVar[str] = "compact-tokens"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Compact every arm that a token mask guards."""
        for function in module.functions.values():
            values = [*function.args, *(v for op in function.body.walk() for v in op.results)]
            taken = dim_names(dim for value in values for dim in value.shape)
            self._block(function.body, taken, statistics)

    def _block(self, block: Block, taken: set[str], statistics: Statistics) -> None:
        for op in block.ops:
            for inner in op.regions.values():
                self._block(inner, taken, statistics)
            if isinstance(op, ops.If) and op.role != "expert":
                try:
                    _compact(op, taken)
                    statistics.fired[self.name] += 1
                except Refusal as refusal:
                    statistics.refuse(self.name, op, refusal)


def _compact(op: ops.If, taken: set[str]) -> None:
    rw = Rewriter(Block(), [])
    condition = rw.need(op.cond.op, ops.Any, "the condition is not any(mask)")
    mask = condition.x
    rw.check(mask.type.rank == 2, "the mask is not [B, T]")
    rw.check(op.lowering != "branch", "it was chosen to stay a branch")
    rw.check(product(mask.shape) != 1, "there is one token: nothing to compact")
    rw.check(not any(isinstance(o, ops.Rows) for o in op.then.ops), "it is compact already")
    rows = ArmRows(op.then, mask, taken, rw)
    try:
        values = [rows.dense(value) for value in op.then.terminator.operands]
    except Refusal:
        for emitted in reversed(rows.block.ops):
            emitted.forget()
        raise
    rows.block.append(ops.Yield(values))
    for old in op.then.ops:
        old.forget()
    op.then.ops = []
    for new in rows.block.ops:
        op.then.append(new)

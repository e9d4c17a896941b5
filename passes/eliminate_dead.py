"""The pass `eliminate-dead`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, Module, Op, ops
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Removes ops whose results nobody uses, unused results of `if`, and unused weights.

    Before::

        %a, %b = if %c { %d = silu %x  yield %x, %d } else { yield %x, %x }
        return %a

    After::

        %a = if %c { yield %x } else { yield %x }
        return %a
    """

    name: ClassVar[str] = "eliminate-dead"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Walk backwards, users before what they use."""
        for function in module.functions.values():
            self._block(function.body, statistics)
        used = {op.weight for op in module.walk() if isinstance(op, ops.Weight)}
        for name in [name for name in module.weights if name not in used]:
            del module.weights[name]
            statistics.fired["unused-weight"] += 1

    def _block(self, block: Block, statistics: Statistics) -> None:
        kept: list[Op] = []
        for op in reversed(block.ops):
            if not op.terminator and not any(value.uses for value in op.results):
                op.forget()
                statistics.fired[self.name] += 1
                continue
            if isinstance(op, ops.If) and not all(value.uses for value in op.results):
                op = drop_results(op, [i for i, v in enumerate(op.results) if v.uses])
                op.parent = block
                statistics.fired["unused-result"] += 1
            for inner in op.regions.values():
                self._block(inner, statistics)
            kept.append(op)
        block.ops = kept[::-1]


def drop_results(op: ops.If, keep: list[int]) -> ops.If:
    """The conditional with only the results `keep`; takes over the arms of `op`.

    The caller puts it into the block in the place of `op`.
    """
    for arm in (op.then, op.otherwise):
        end = arm.terminator
        values = [end.operands[i] for i in keep]
        end.forget()
        arm.ops.pop()
        arm.append(ops.Yield(values))
    new = op.clone(reinfer=True, then=op.then, otherwise=op.otherwise)
    for index, value in zip(keep, new.results, strict=True):
        value.name = op.results[index].name
        op.results[index].replace_by(value)
    op.cond.uses.pop(op, None)
    return new

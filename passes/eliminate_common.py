"""The pass `eliminate-common`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, Module, Op, Value
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext


def signature(op: Op, operands: list[Value] | None = None) -> Hashable:
    """What makes two ops compute the same: class, operands, attributes, result types."""
    values = op.operands if operands is None else operands
    segments = tuple((s.start, s.stop) for s in op.segments.values())
    facts = tuple((k, repr(v)) for k, v in op.attributes.items())  # -0.0 equals 0.0, in text not
    return (type(op), tuple(map(id, values)), segments, facts, tuple(v.type for v in op.results))


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Computes the same thing once; an op may reuse one of an enclosing block.

    Before::

        %a = silu %x
        %y = if %c { %b = silu %x  yield %b } else { yield %x }

    After::

        %a = silu %x
        %y = if %c { yield %a } else { yield %x }
    """

    name: ClassVar[str] = "eliminate-common"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """One walk over every function, with what is known in each scope."""
        for function in module.functions.values():
            self._block(function.body, {}, statistics)

    def _block(self, block: Block, outer: dict[Hashable, Op], statistics: Statistics) -> None:
        # `added` takes back on leaving what this block put into the shared table.
        added: list[Hashable] = []
        kept: list[Op] = []
        for op in block.ops:
            if op.regions or op.terminator or op.introduces():
                for inner in op.regions.values():
                    self._block(inner, outer, statistics)
                kept.append(op)
                continue
            key = signature(op)
            known = outer.get(key)
            if known is None:
                outer[key] = op
                added.append(key)
                kept.append(op)
                continue
            for old, new in zip(op.results, known.results, strict=True):
                new.name = new.name or old.name
                old.replace_by(new)
            op.forget()
            statistics.fired[self.name] += 1
        block.ops = kept
        for key in added:
            del outer[key]

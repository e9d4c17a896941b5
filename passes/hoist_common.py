"""The pass `hoist-common`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.eliminate_common import signature
from liquidc.passes.eliminate_dead import drop_results


@dataclass(frozen=True)
class HoistCommon(Pass):
    """What both arms of an `if` compute alike moves above it.

    Before::

        %y, %k = if %c { %n = append %past, %new, ...  yield %a, %n }
                  else { %n = append %past, %new, ...  yield %x, %n }

    After::

        %n = append %past, %new, ...
        %y = if %c { yield %a } else { yield %x }

    Under the cache policy own that is the key/value projection and the append. With `append=arm`
    the appends (and what reads them) stay in the arms.
    """

    append: str = "above"

    name: ClassVar[str] = "hoist-common"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def __post_init__(self) -> None:
        if self.append not in ("above", "arm"):
            raise InputError(f"append is above or arm, not {self.append!r}")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Inner conditionals first."""
        for function in module.functions.values():
            self._block(function.body, statistics)

    def _block(self, block: Block, statistics: Statistics) -> None:
        out: list[Op] = []
        for op in block.ops:
            for inner in op.regions.values():
                self._block(inner, statistics)
            if isinstance(op, ops.If):
                hoisted = self._hoist(op, block)
                statistics.fired[self.name] += len(hoisted)
                out += hoisted
                op = _skip_outer_results(op, statistics)
                op.parent = block
                if not op.results:
                    op.forget()
                    continue
            out.append(op)
        block.ops = out

    def _hoist(self, op: ops.If, block: Block) -> list[Op]:
        """The ops taken out of both arms, in order."""
        local = {id(v) for arm in op.regions.values() for o in arm.ops for v in o.results}
        known: dict[Hashable, list[Op]] = {}
        for other in op.otherwise.ops:
            known.setdefault(signature(other), []).append(other)
        hoisted: list[Op] = []
        for mine in list(op.then.ops):
            if not self._movable(mine) or any(id(v) in local for v in mine.operands):
                continue
            twins = known.get(signature(mine), [])
            if not twins:
                continue
            op.then.ops.remove(mine)
            mine.parent = block
            hoisted.append(mine)
            local -= {id(v) for v in mine.results}
            for twin in twins:
                op.otherwise.ops.remove(twin)
                for old, new in zip(twin.results, mine.results, strict=True):
                    old.replace_by(new)
                twin.forget()
            known = {}
            for other in op.otherwise.ops:
                known.setdefault(signature(other), []).append(other)
        return hoisted

    def _movable(self, op: Op) -> bool:
        if op.terminator or op.regions or op.introduces():
            return False
        return self.append == "above" or not isinstance(op, ops.Append | ops.AppendRows)


def _skip_outer_results(op: ops.If, statistics: Statistics) -> ops.If:
    """`op` without the results that both arms take from the same value outside."""
    inside = {id(o) for arm in op.regions.values() for o in arm.ops}
    ends: list[tuple[Value, Value]] = list(
        zip(op.then.terminator.operands, op.otherwise.terminator.operands, strict=True)
    )
    keep: list[int] = []
    for i, (a, b) in enumerate(ends):
        if a is b and (a.op is None or id(a.op) not in inside):
            a.name = a.name or op.results[i].name
            op.results[i].replace_by(a)
            statistics.fired["outer-result"] += 1
        else:
            keep.append(i)
    return op if len(keep) == len(ends) else drop_results(op, keep)

"""The pass `fix-depth`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from liquidc.errors import InputError, UnsupportedError
from liquidc.ir import Block, Function, Module, Value, ops
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.gate_arms import gates_of, inline_arm, inline_masked
from liquidc.passes.specialize_decode import know_mask, substitute

PATH = "path_"
"""Functions of fixed depth are named after their path: `@path_0110`."""
ON_PATH = "on_path"
"""Their last result: whether all gates decided as the path says."""


@dataclass(frozen=True)
class FixDepth(Pass):
    """Functions without control flow, for targets that can't branch.

    Before::

        func @prefill(...) { ...  %y = if any(%m) { %h = ...  yield %x + where(%m, %h, 0) } ... }

    After::

        func @prefill(...) { ...  %h = ...  %y = %x + where(%m, %h, 0) ... }
        func @path_0(...)  { ...  %y = %x ...           return ..., not any(%m) }
        func @path_1(...)  { ...  %h = ...  %y = %x + %h ...  return ..., any(%m) }

    @prefill computes every layer under its mask. Beside it stand functions for one token of one
    row, each for one of the `paths` most frequent depth paths of the profile: they run the path's
    layers and no other, still evaluate every gate, and say whether all decided so. A host calls
    the one that it expects; the cache beyond its length is scratch, so on a miss it calls @prefill
    with the same arguments.
    """

    paths: int = 4

    name: ClassVar[str] = "fix-depth"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def __post_init__(self) -> None:
        if self.paths < 0:
            raise InputError(f"paths is 0 or more, not {self.paths}")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Add the paths, then mask @prefill.

        Raises:
            InputError: a number of paths is given, and no profile to take them from.
        """
        if context.profile is None and self.paths != FixDepth.paths:
            raise InputError(f"the pass {self.name}: paths= takes a profile; give --profile")
        function = module.functions.get("prefill")
        if function is None or not any(isinstance(op, ops.If) for op in function.body.walk()):
            return
        profile, chosen = context.profile, list[str]()
        count = len(gates_of(function))
        if profile is not None and count and profile.paths.gates == len(profile.gates) == count:
            chosen = [path for path, _ in profile.paths.top(self.paths)]
        for path in chosen:
            module.add(straight_line(function, path))
            statistics.fired["path"] += 1
        for made in module.functions.values():
            self._mask(made, statistics)
        facts = {path: profile.paths.counts[path] / profile.tokens for path in chosen if profile}
        statistics.facts[self.name] = {"paths": facts}

    def _mask(self, function: Function, statistics: Statistics) -> None:
        """Take every conditional away.

        Raises:
            UnsupportedError: one can't be: its arms are not the same where the mask is false.
        """
        while (op := _innermost(function.body)) is not None:
            rw = Rewriter(cast(Block, op.parent), [])
            try:
                inline_masked(op, rw)
            except Refusal as refusal:
                where = f"{op.label or 'a conditional'} at {op.loc}" if op.loc else op.label
                raise UnsupportedError(
                    f"{where}: can't be computed without control flow: {refusal.reason}"
                ) from None
            statistics.fired[self.name] += 1


def _innermost(block: Block) -> ops.If | None:
    """A conditional that holds no other."""
    for op in block.walk():
        if isinstance(op, ops.If):
            inner = [o for arm in op.regions.values() for o in arm.walk() if isinstance(o, ops.If)]
            if not inner:
                return op
    return None


def straight_line(function: Function, path: str) -> Function:
    """`function` for one token of one row whose gates decide as `path` says, digit by digit."""
    made = substitute(function, {"B": 1, "T": 1})
    made.name = PATH + path
    verdicts: list[Value] = []
    for gate in gates_of(made):
        runs = path[gate.number] == "1"
        place = cast(Block, gate.op.parent)
        held = ops.Any(gate.op.mask, dims=(0, 1))
        checks: list[ops.Any | ops.Not] = [held] if runs else [held, ops.Not(held.y)]
        for check in reversed(checks):
            check.parent = place
            place.ops.insert(place.ops.index(gate.op) + 1, check)
        verdicts.append(checks[-1].y)
        for conditional in gate.conditionals:
            arm = conditional.then if runs else conditional.otherwise
            know_mask(arm, gate.op.mask, known=runs)
            inline_arm(conditional, arm)
    returned = made.returned
    made.body.ops.pop().forget()
    agree = verdicts[0]
    for verdict in verdicts[1:]:
        agree = made.body.append(ops.And(agree, verdict)).y
    made.body.append(ops.Return([*returned, agree]))
    made.result_names = (*made.result_names, ON_PATH)
    return made

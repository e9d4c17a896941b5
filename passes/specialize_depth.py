"""The pass `specialize-depth`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, ops
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.gate_arms import Gate, gates_of, inline_masked
from liquidc.passes.speculate import speculate
from liquidc.profile import Profile


@dataclass(frozen=True)
class SpecializeDepth(Pass):
    """What a profile says about gates is used, and checked: results stay as they are.

    Before::

        %y1 = if any(%m1) { ...  yield %x + where(%m1, %h, 0) } else { yield %x }
        %y2 = if any(%m2) { ... } else { ... }

    After::

        %y1 = %x + where(%m1, %h, 0)                       (gate 1 nearly always fires)
        %ok, %a = if one token { ... every gate evaluated ... }
        %y2 = if %ok { yield %a } else { if any(%m2) { ... } else { ... } }

    Layers that ran for at least `always` of the profile's tokens lose their conditional; their
    gates still decide, by their masks. A depth path that at least `hot` of the tokens took becomes
    straight-line code for one token, which evaluates every gate on its way; if one decides
    otherwise, the general code computes the token again. Of the paths, the longest run of gates is
    taken whose most frequent decisions are that frequent.
    """

    always: float = 0.99
    hot: float = 0.9

    name: ClassVar[str] = "specialize-depth"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"
    needs: ClassVar[Need] = "gates"

    def __post_init__(self) -> None:
        if not (0 <= self.always <= 1 and 0 <= self.hot <= 1):
            raise InputError("always and hot are shares of tokens, from 0 to 1")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Specialise every function."""
        profile = context.need_profile(self.name)
        if profile.paths.gates != len(profile.gates):
            profile = None  # only the beginnings of the paths are known
        for function in module.functions.values():
            gates = gates_of(function)
            count = max((gate.number for gate in gates), default=-1) + 1
            if profile is not None and count > len(profile.gates):
                raise InputError(
                    f"the pass {self.name}: the profile has {len(profile.gates)} gates, not {count}"
                )
            told: dict[str, Any] = {"always": [], "path": "", "refused": {}}
            if profile is not None and not _specialised(function):
                self._paths(function, gates, profile, told, statistics)
                self._always(gates, profile, told, statistics)
            statistics.facts[self.name] = told

    def _always(
        self, gates: list[Gate], profile: Profile, told: dict[str, Any], statistics: Statistics
    ) -> None:
        """Take the conditional from layers that nearly always run."""
        for gate in gates:
            if profile.rate(gate.number) < self.always:
                continue
            for conditional in gate.conditionals:
                rw = Rewriter(Block(), [])
                try:
                    inline_masked(conditional, rw)
                except Refusal as refusal:
                    told["refused"][str(gate.number)] = refusal.reason
                    statistics.refuse("always-run", conditional, refusal)
                    continue
                statistics.fired["always-run"] += 1
                told["always"].append(gate.number)

    def _paths(
        self,
        function: Function,
        gates: list[Gate],
        profile: Profile,
        told: dict[str, Any],
        statistics: Statistics,
    ) -> None:
        """Straight-line code for the longest run of gates whose decisions are mostly the same."""
        found = best_run([gate.number for gate in gates], profile, self.hot)
        if found is None:
            return
        start, path, share = found
        chosen = gates[start : start + len(path)]
        rw = Rewriter(Block(), [])
        try:
            speculate(function, chosen, path, rw)
        except Refusal as refusal:
            told["refused"]["path"] = refusal.reason
            statistics.refuse("hot-path", chosen[0].op, refusal)
            return
        statistics.fired["hot-path"] += 1
        told["path"] = path
        told["path_gates"] = [gate.number for gate in chosen]
        told["path_share"] = share
        told["miss_rate"] = 1 - share


def _specialised(function: Function) -> bool:
    return any(isinstance(op, ops.If) and op.role == "path" for op in function.body.walk())


def best_run(numbers: list[int], profile: Profile, least: float) -> tuple[int, str, float] | None:
    """The longest run of consecutive gates that mostly decide alike: start, decisions, share.

    The share is that of the tokens whose first gate decides as the path says: the others are not
    tried. Of runs of one length the most frequent wins, then the first.
    """
    for length in range(len(numbers), 1, -1):
        best: tuple[float, int, str] | None = None
        for start in range(len(numbers) - length + 1):
            counts: dict[str, int] = {}
            for path, count in profile.paths.counts.items():
                part = "".join(path[n] for n in numbers[start : start + length])
                counts[part] = counts.get(part, 0) + count
            part = min(counts, key=lambda p: (-counts[p], p))
            first = sum(count for p, count in counts.items() if p[0] == part[0])
            share = counts[part] / first
            if share >= least and (best is None or (share, -start) > (best[0], -best[1])):
                best = (share, start, part)
        if best is not None:
            return best[1], best[2], best[0]
    return None

"""The pass `fix-gates`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Value, ops
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.gate_arms import Gate, drop_results, gates_of, inline_arm, unread_caches


@dataclass(frozen=True)
class FixGates(Pass):
    """Gates that almost never or almost always fire are decided at compile time.

    Before::

        %m, %p = depth_gate %score, ...
        %c = any %m
        %y = if %c { %h = linear %x, %w  yield %x + where(%m, %h, 0) } else { yield %x }

    After::

        %_, %p = fixed_gate %valid, run=true, ...
        %h = linear %x, %w
        %y = %x + where(%valid, %h, 0)

    That is a gate fixed to run. If it is fixed to skip, %y is %x: the layer's weights are gone,
    and so is its cache if nothing reads it any more.

    Which gates: those that ran for at most `never` of the profile's tokens and those that ran for
    at least `always`; or, with `gates`, a digit for each gate: 0 skips, 1 runs, `.` stays free.
    This changes results. `liquidc compile --specialize budget` finds the gates whose fixing stays
    within a budget, measures what it costs, and refuses when that is too much.
    """

    gates: str = ""
    never: float = 0.01
    always: float = 0.99

    name: ClassVar[str] = "fix-gates"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"
    needs: ClassVar[Need] = "gates"

    def __post_init__(self) -> None:
        if set(self.gates) - set("01."):
            raise InputError(f"gates is a digit 0, 1 or a dot for each gate, not {self.gates!r}")
        if self.gates and (self.never, self.always) != (FixGates.never, FixGates.always):
            raise InputError("gates names what is fixed: leave never= and always= out")
        if not 0 <= self.never < self.always <= 1:
            raise InputError("never and always are shares of tokens, never less than always")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Fix gates in every function."""
        for function in module.functions.values():
            gates, before = gates_of(function), _gone(function)
            wanted = self._wanted(gates, _gates_ever(function), context)
            told: dict[str, Any] = {"gates": wanted, "skip": [], "run": [], "refused": {}}
            for gate in gates:
                if wanted[gate.number] != ".":
                    self._fix(gate, wanted[gate.number] == "1", told, statistics)
            gone = _gone(function) - before
            told["caches"] = [name for name in unread_caches(function) if _layer(name) in gone]
            drop_results(function, told["caches"])
            statistics.facts[self.name] = told
            _lower_floors(function, gone)

    def _wanted(self, gates: list[Gate], ever: int, context: PassContext) -> str:
        """A digit for each gate that the model ever had."""
        count = max((gate.number for gate in gates), default=-1) + 1
        if self.gates or not count:
            if len(self.gates) < count or len(self.gates) > ever > 0:
                raise InputError(f"the pass {self.name}: {len(self.gates)} digits for {ever} gates")
            return self.gates
        profile = context.need_profile(self.name)
        if len(profile.gates) < count:
            raise InputError(
                f"the pass {self.name}: the profile has {len(profile.gates)} gates, not {count}"
            )
        rates = [profile.rate(number) for number in range(len(profile.gates))]
        return "".join("0" if r <= self.never else "1" if r >= self.always else "." for r in rates)

    def _fix(self, gate: Gate, run: bool, told: dict[str, Any], statistics: Statistics) -> None:
        """Fix one gate, or say why not."""
        op = gate.op
        block = cast(Block, op.parent)
        rw = Rewriter(block, [])
        try:
            rw.check(bool(gate.conditionals), "no conditional asks whether any of its tokens runs")
            rw.check(_only_reported(op.p), "its probability scales the layer's result")
        except Refusal as refusal:
            told["refused"][str(gate.number)] = refusal.reason
            statistics.refuse(self.name, op, refusal)
            return
        fixed = ops.FixedGate(
            op.valid,
            layer=op.layer,
            gate=op.gate,
            run=run,
            threshold=op.threshold,
            compare=op.compare,
            reserved=op.reserved,
            loc=op.loc,
        )
        block.insert_before(op, fixed)
        fixed.p.name, fixed.mask.name = op.p.name, op.mask.name
        for conditional in gate.conditionals:
            arm = conditional.then if run else conditional.otherwise
            inline_arm(conditional, arm)
        op.mask.replace_by(op.valid if run else fixed.mask)
        op.p.replace_by(fixed.p)
        op.detach()
        told["run" if run else "skip"].append(gate.number)
        statistics.fired[self.name] += 1


def _only_reported(p: Value) -> bool:
    """Whether a probability goes nowhere but into the function's results."""
    return all(
        isinstance(user, ops.Return)
        or (isinstance(user, ops.Reshape | ops.Concat) and _only_reported(user.y))
        for user in p.uses
    )


def _layer(name: str) -> int:
    """The layer of `present.3.key`."""
    return int(name.split(".")[1])


def _gates_ever(function: Function) -> int:
    """How many gates a function has, fixed ones included."""
    found = [op for op in function.body.walk() if isinstance(op, ops.DepthGate | ops.FixedGate)]
    return max((op.gate for op in found), default=-1) + 1


def _gone(function: Function) -> set[int]:
    """Layers that never run."""
    found = [op for op in function.body.walk() if isinstance(op, ops.FixedGate)]
    return {op.layer for op in found if not op.run}


def _lower_floors(function: Function, gone: set[int]) -> None:
    """`remaining` counts the layers that can still run: those in `gone` no longer do."""
    for op in function.body.walk():
        if isinstance(op, ops.DepthGate):
            lost = sum(1 for layer in gone if layer >= op.layer)
            op.set_attribute("remaining", op.remaining - lost)

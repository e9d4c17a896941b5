"""The pass `choose-lowering`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Value, ops
from liquidc.ir.cost import Cost, Place, costs
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.ir.weights import sizes
from liquidc.machine import DEFAULT, MachineTable, Work, expected, read_table
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.gate_arms import Gate, check_masked, gates_of, inline_arm


@dataclass(frozen=True)
class ChooseLowering(Pass):
    """How each gate is computed is chosen by what it is expected to cost.

    Before::

        %y1 = if any(%m1) { ... } else { yield %x }
        %y2 = if any(%m2) { ... } else { ... }

    After::

        %y1 = %x + where(%m1, %h, 0)                             (mask)
        %y2 = if any(%m2), lowering="compact" { ... } else { ... }

    A `branch` computes all tokens if one of them runs, `compact` those that run, a `mask` all of
    them always, without a conditional. Their times come from a table measured on a machine
    (`liquidc.machine`), the rates at which gates run from the profile, or `rate` without one. A
    function that has to serve prefill and decode is weighed by `prompt` tokens in one call and
    `generated` calls of one token.
    """

    prompt: int = 128
    generated: int = 128
    rate: float = 0.5

    name: ClassVar[str] = "choose-lowering"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"
    needs: ClassVar[Need] = "gates"

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.generated < 0:
            raise InputError("prompt is 1 token or more, generated 0 or more")
        if not 0 <= self.rate <= 1:
            raise InputError("rate is a share of tokens, from 0 to 1")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Choose for every gate of every function.

        Raises:
            InputError: a rate is given besides a profile, which has one for each gate.
        """
        if context.profile is not None and self.rate != ChooseLowering.rate:
            raise InputError(f"the pass {self.name}: the profile gives the rates: leave rate= out")
        table = context.machine or read_table(DEFAULT)
        told: list[dict[str, Any]] = []
        for function in module.functions.values():
            for gate in [gate for gate in gates_of(function) if gate.conditionals]:
                rate = (
                    self.rate if (profile := context.profile) is None else profile.rate(gate.number)
                )
                calls = self._calls(module, gate)
                times = _total(table, _work(module, function, gate), calls, rate)
                if gate.op.valid.shape[1] == 1:
                    del times["compact"]  # there is one token
                refused = _refusal(gate)
                if refused:
                    del times["mask"]
                chosen = min(times, key=lambda name: times[name])
                statistics.fired[f"lower-by-{chosen}"] += _apply(gate, chosen)
                told.append(
                    {
                        "function": function.name,
                        "gate": gate.number,
                        "layer": gate.op.layer,
                        "calls": _text(calls),
                        "lowering": chosen,
                        "run_rate": rate,
                        "us": {name: round(time / 1000, 1) for name, time in times.items()},
                        "reason": _reason(chosen, times, refused),
                    }
                )
        source = "assumed" if context.profile is None else "profile"
        if told:
            statistics.facts[self.name] = {
                "machine": {"name": table.name, "tools": table.tools, "threads": table.threads},
                "rates": source,
                "gates": told,
            }

    def _calls(self, module: Module, gate: Gate) -> list[tuple[int, int]]:
        """Tokens of a call and how many such calls, for the function that a gate is in."""
        if gate.op.valid.shape[1] == 1:
            return [(1, 1)]
        prefill = [(self.prompt, 1)]
        return prefill if "decode" in module.functions else [*prefill, (1, self.generated)]


def _work(module: Module, function: Function, gate: Gate) -> Work:
    """What stands behind a gate."""
    arms = [op.then for op in gate.conditionals]
    inside = [op for arm in arms for op in arm.walk()]
    values = [value for arm in arms for value in arm.terminator.operands]
    used = costs(module, function).get(Place(gate.op.layer, gate.number), Cost()).weights
    experts, share = 0, 0.0
    for op in inside:
        if isinstance(op, ops.GroupedExperts):
            weights = (op.gate_up, op.down)
            experts += sum(prod(sizes(weight.shape)) * weight.dtype.bytes for weight in weights)
            share = sizes(op.index.shape[-1:])[0] / sizes(op.down.shape[:1])[0]
    return Work(
        weights=max(0, used - round(experts * share)),
        experts=experts,
        share=share,
        ops=len(inside),
        conditionals=len(arms),
        width=max((_token_bytes(value) for value in values), default=0),
    )


def _token_bytes(value: Value) -> int:
    """Bytes of one token in a value [B, T, width]; 0 for what does not go by token."""
    if value.type.rank != 3 or not isinstance(value.shape[2], int):
        return 0
    return value.shape[2] * value.dtype.bytes


def _total(
    table: MachineTable, work: Work, calls: list[tuple[int, int]], rate: float
) -> dict[str, float]:
    """The expected time of all calls by lowering; of equal ones the first is taken."""
    each = [(count, expected(table, work, tokens, rate)) for tokens, count in calls]
    return {
        name: sum(count * getattr(times, name) for count, times in each)
        for name in ("branch", "compact", "mask")
    }


def _refusal(gate: Gate) -> str:
    """Why a gate's layer can't be computed under its mask; empty if it can."""
    try:
        for conditional in gate.conditionals:
            check_masked(conditional, Rewriter(Block(), []))
    except Refusal as refusal:
        return refusal.reason
    return ""


def _apply(gate: Gate, chosen: str) -> int:
    """Lower a gate's conditionals; returns how many were not lowered so before."""
    other = [op for op in gate.conditionals if op.lowering != chosen]
    for conditional in other:
        if chosen == "mask":
            inline_arm(conditional, conditional.then)
        else:
            conditional.attributes["lowering"] = chosen
    return len(other)


def _reason(chosen: str, times: dict[str, float], refused: str) -> str:
    least = max(times[chosen], 1.0)
    longer = [f"{name} {time / least:.2f}" for name, time in times.items() if name != chosen]
    reason = f"expected to be fastest: {', '.join(longer)} times as long"
    return f"{reason}; no mask: {refused}" if refused else reason


def _text(calls: list[tuple[int, int]]) -> str:
    """The calls in words."""
    return " and ".join(
        f"{count} call{'s' * (count > 1)} of {tokens} token{'s' * (tokens > 1)}"
        for tokens, count in calls
    )

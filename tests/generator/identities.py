"""What conditionals are, before a pass and after it: who they are stays, or they are gone.

A conditional that is gone has a reason: nobody used its results, or the pass took it away for what
it computes in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from liquidc.ir import Block, Function, Module, Value, ops
from liquidc.passes.base import Pass
from liquidc.passes.choose_lowering import ChooseLowering
from liquidc.passes.fix_depth import FixDepth
from liquidc.passes.fold_identity_experts import FoldIdentityExperts
from liquidc.passes.hoist_common import HoistCommon
from liquidc.passes.specialize_depth import SpecializeDepth
from liquidc.passes.stack_experts import StackExperts

Identity = tuple[str, str, int, int, int, int]
"""Label, role, gate, region, layer and expert."""
Reason = Callable[[ops.If], bool]


def identity(op: ops.If) -> Identity:
    """What a conditional is."""
    return op.label, op.role, op.gate, op.region, op.layer, op.expert


def _is_expert(op: ops.If) -> bool:
    return op.role == "expert"


def _is_gate(op: ops.If) -> bool:
    return op.role == "gate"


REASONS: dict[type[Pass], Reason] = {
    ChooseLowering: _is_gate,  # a mask
    FixDepth: lambda op: True,  # no control flow is left
    FoldIdentityExperts: _is_expert,
    # Both arms give the same values, once what they compute alike stands before them.
    HoistCommon: lambda op: (
        [type(v.op) for v in op.then.terminator.operands]
        == [type(v.op) for v in op.otherwise.terminator.operands]
    ),
    SpecializeDepth: _is_gate,  # straight-line code
    StackExperts: _is_expert,
}
"""Which conditionals a pass may take away; other passes take none."""


def assert_identities(step: Pass, before: Module, after: Module) -> None:
    """Assert that conditionals keep what they are, the lowering too unless the pass chooses it."""
    chooses = isinstance(step, ChooseLowering)
    for name, function in before.functions.items():
        old = [op for op in function.body.walk() if isinstance(op, ops.If)]
        new = [op for op in after.functions[name].body.walk() if isinstance(op, ops.If)]
        known = {(identity(op), op.lowering) for op in old}
        for op in new:
            made = isinstance(step, SpecializeDepth) and op.role == "path"
            told = [(identity(op), lowering) for lowering in ("", "branch", "compact")]
            kept = told if chooses else [(identity(op), op.lowering)]
            assert made or known.intersection(kept), f"@{name}, {step.name}: made {op!r}"
        left, used = Counter(map(identity, new)), used_values(function)
        reason = REASONS.get(type(step), lambda op: False)
        for op in old:
            if left[identity(op)] > 0:
                left[identity(op)] -= 1
            else:
                alive = used.intersection(op.results)
                assert reason(op) or not alive, f"@{name}, {step.name}: lost {op!r}"


def used_values(function: Function) -> set[Value]:
    """The values on which what a function returns depends."""
    used: set[Value] = set()
    pending = list(function.returned)
    while pending:
        value = pending.pop()
        if value in used or value.op is None:
            continue
        used.add(value)
        pending += value.op.operands
        at, chosen = value.op.results.index(value), isinstance(value.op, ops.If)
        for arm in value.op.regions.values():
            ends = _yielded(arm)
            pending += [ends[at]] if chosen else ends
    return used


def _yielded(arm: Block) -> list[Value]:
    return arm.terminator.operands

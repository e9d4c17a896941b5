"""What the generated modules and their calls contain, over a fixed number of seeds."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from liquidc.ir import Op, ops
from liquidc.ir.core import OPS
from liquidc.ir.rewriter import Statistics
from tests.generator.check import STEPS, Run, run, transformed
from tests.generator.modules import Example, example

SEEDS = 240
RULES = {
    "always-run",
    "compact-tokens",
    "eliminate-common",
    "eliminate-dead",
    "fix-depth",
    "fold-identity-experts",
    "fold-linear-chain",
    "fold-operation",
    "fold-two-logits",
    "fold-weight",
    "fold-where",
    "fuse-linear",
    "fuse-shared-experts",
    "group-swiglu",
    "hoist-common",
    "hot-path",
    "lower-by-branch",
    "lower-by-compact",
    "lower-by-mask",
    "merge-reshapes",
    "order-experts",
    "outer-result",
    "path",
    "skip-identity",
    "specialize-decode",
    "stack-earlier",
    "stack-experts",
    "sum-of-one",
    "unused-result",
    "unused-weight",
}
"""Everything that the passes count."""


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(random.Random(seed)) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def calls(examples: list[Example]) -> list[tuple[str, Example, Run]]:
    """Every call by its regime."""
    return [
        (regime, made, run(made.module, made, function, inputs, exact=False))
        for made in examples
        for function, regime, inputs in made.calls
    ]


def conditionals(made: Example) -> list[ops.If]:
    return [op for op in made.module.walk() if isinstance(op, ops.If)]


def classes(found: list[Op]) -> set[type[Op]]:
    return {type(op) for op in found}


def test_every_op_class_occurs(examples: list[Example]) -> None:
    found = classes([op for made in examples for op in made.module.walk()])
    assert set(OPS.values()) == found


def test_every_op_class_that_has_a_place_in_an_arm_occurs_in_one(examples: list[Example]) -> None:
    arms = [op.then for made in examples for op in conditionals(made) if op.role != "expert"]
    missing = set(OPS.values()) - classes([op for arm in arms for op in arm.ops])
    # The first five belong to the function, a gate decides outside its arm, a share is used in an
    # expert's region only.
    assert missing <= {
        ops.Return,
        ops.TakeTokens,
        ops.Embed,
        ops.Iota,
        ops.DepthGate,
        ops.FixedGate,
        ops.ExpertWeight,
    }


def test_conditionals_are_nested(examples: list[Example]) -> None:
    nested = {
        (outer.role, outer.region, inner.role, inner.region)
        for made in examples
        for outer in conditionals(made)
        for inner in outer.walk()
        if isinstance(inner, ops.If) and inner is not outer
    }
    gate, inner, expert = ("gate", 0), ("gate", 1), ("expert", -1)
    assert {(*gate, *inner), (*gate, *expert), (*inner, *expert)} <= nested


def test_caches_are_appended_to_in_one_arm_in_both_and_outside(examples: list[Example]) -> None:
    places = Counter[tuple[bool, ...]]()
    for made in examples:
        for op in conditionals(made):
            places[tuple(ops.Append in classes(arm.ops) for arm in op.regions.values())] += 1
    assert places[True, True] >= 10
    assert places[True, False] >= 10
    bodies = [made.module.functions["prefill"].body.ops for made in examples]
    assert sum(ops.Append in classes(body) for body in bodies) >= 10


def test_all_gated_layers_some_and_none_run(calls: list[tuple[str, Example, Run]]) -> None:
    shares: dict[str, set[float]] = {"skip": set(), "run": set(), "mixed": set()}
    for regime, _, call in calls:
        masks = [x for name, x in call.outputs.items() if name.startswith("gates.")]
        if masks:
            shares[regime].add(float(torch.stack(masks).float().mean()))
    assert shares["skip"] == {0.0}
    assert max(shares["run"]) == 1.0
    assert {0.0, 1.0} < shares["mixed"]


def test_some_experts_and_all_experts_are_empty(calls: list[tuple[str, Example, Run]]) -> None:
    used = Counter[str]()
    for _, made, call in calls:
        experts = [op for op in conditionals(made) if op.role == "expert"]
        for layer in {op.layer for op in experts}:
            total = sum(op.layer == layer for op in experts) // 2
            ran = sum(role == "expert" and at == layer for _, role, _, _, at, _ in call.ran)
            used["none" if ran == 0 else "all" if ran == total else "some"] += 1
    assert min(used[kind] for kind in ("none", "some", "all")) >= 10


def test_every_rule_of_every_pass_fires(examples: list[Example]) -> None:
    fired = Statistics()
    for made in examples:
        for step in STEPS.values():
            transformed(step, made, fired)
        if set(+fired.fired) == RULES:
            return
    assert set(+fired.fired) == RULES

"""Lossy expert passes on generated modules: valid and runnable afterwards, whatever the profile."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidc.ir import Module, ops, parse_module, print_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.registry import PASSES
from liquidc.passes.routed_experts import routers
from tests.generator.modules import Example, example
from tests.generator.profiles import profile_of
from tests.generator.test_properties import EXAMPLES, FEW, MANY

BEFORE = ("fold-constants", "fold-identity-experts", "stack-experts", "group-experts")
RATIOS = (0.25, 0.5, 0.75)


def changed(name: str, made: Example, rng: random.Random) -> tuple[Module, Module, Counter[str]]:
    """The module before and after the pass."""
    before, statistics = made.module.clone(), Statistics()
    for step in BEFORE:
        PASSES[step]().run(before, Statistics())
    after = before.clone()
    context = PassContext(profile_of(made, rng), made)
    PASSES[name](ratio=rng.choice(RATIOS)).run(after, statistics, context)
    said = statistics.facts[name]["layers"]
    assert len(said) == len(routers(after.functions["prefill"]))
    assert statistics.fired[name] == sum("reason" not in entry for entry in said)
    return before, after, statistics.fired


def check(name: str, made: Example, seed: int) -> None:
    before, after, _ = changed(name, made, random.Random(seed))
    verify(after)
    text = print_module(after)
    assert print_module(parse_module(text)) == text
    for function, _, inputs in made.calls:
        old = Interpreter(before, made).run(function, inputs)
        new = Interpreter(after, made).run(function, inputs)
        assert old.keys() == new.keys()
        for key, value in new.items():
            assert (value.dtype, value.shape) == (old[key].dtype, old[key].shape)
            if value.is_floating_point():
                assert bool(value.isfinite().all())
    experts = sum(isinstance(op, ops.GroupedExperts | ops.MapExperts) for op in before.walk())
    assert experts == sum(
        isinstance(op, ops.GroupedExperts | ops.MapExperts) for op in after.walk()
    )


@pytest.mark.parametrize("name", ["prune-experts", "merge-experts"])
@FEW
@given(EXAMPLES, st.integers(0, 99))
def test_valid_and_runnable(name: str, made: Example, seed: int) -> None:
    check(name, made, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-experts", "merge-experts"])
@MANY
@given(EXAMPLES, st.integers(0, 99))
def test_valid_and_runnable_on_many(name: str, made: Example, seed: int) -> None:
    check(name, made, seed)


@pytest.mark.parametrize("name", ["prune-experts", "merge-experts"])
def test_both_passes_fire_on_generated_modules(name: str) -> None:
    fired = Counter[str]()
    for seed in range(40):
        fired += changed(name, example(random.Random(seed)), random.Random(seed))[2]
    assert fired[name] >= 5

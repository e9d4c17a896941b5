"""Every pass keeps its contract on generated modules."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liquidc.ir import parse_module, print_module, verify
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from tests.generator.check import STEPS, check, transformed
from tests.generator.modules import Example, example


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A generated module with its calls."""
    return example(draw(st.randoms(use_true_random=False)))


EXAMPLES = examples()
FEW = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=150)
OFTEN, ALWAYS = range(500), range(500, 12_000)
"""Seeds of modules that the passes share out: in every run of the tests, and in the long one."""


@FEW
@given(EXAMPLES)
def test_text_round_trip(made: Example) -> None:
    text = print_module(made.module)
    again = parse_module(text)
    verify(made.module)
    verify(again)
    assert print_module(again) == text
    assert (again.weights, again.attributes) == (made.module.weights, made.module.attributes)


@pytest.mark.parametrize("name", STEPS)
@FEW
@given(EXAMPLES)
def test_pass_keeps_its_contract_and_a_second_run_changes_nothing(name: str, made: Example) -> None:
    once = check(STEPS[name], made)
    assert print_module(transformed(STEPS[name], once)) == print_module(once.module)


@settings(FEW, max_examples=5)
@given(EXAMPLES)
def test_passes_keep_their_contracts_on_what_others_made(made: Example) -> None:
    for name in DEFAULT_PIPELINE:
        made = check(PASSES[name](), made)


def check_seeds(name: str, seeds: range) -> None:
    """Check a pass on its share of the seeds; names the seed that fails."""
    for seed in seeds[list(STEPS).index(name) :: len(STEPS)]:
        try:
            check(STEPS[name], example(random.Random(seed)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("name", STEPS)
def test_pass_keeps_its_contract_on_its_share_of_many_modules(name: str) -> None:
    check_seeds(name, OFTEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_pass_keeps_its_contract_on_its_share_of_more_modules(name: str) -> None:
    check_seeds(name, ALWAYS)


@pytest.mark.slow
@settings(FEW, max_examples=100)
@given(EXAMPLES)
def test_passes_keep_their_contracts_on_what_others_made_of_many(made: Example) -> None:
    for name in DEFAULT_PIPELINE:
        made = check(PASSES[name](), made)

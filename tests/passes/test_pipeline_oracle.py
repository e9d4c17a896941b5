"""The traced model after the default passes, run by the interpreter, against the oracle."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from liquidc.facts import model_info
from liquidc.ir import Function, Module, Op, ops, parse_module, print_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.fix_depth import FixDepth
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from tests.frontend.test_trace import CASES, Weights, stepper, traced_by_name
from tests.oracle.drive import drive
from tests.oracle.grid import Case
from tests.oracle.reference import assert_matches, reference, tolerance

FEW = (
    "own-layer-ffn-glm",
    "own-attn_ffn-delta-llama4",
    "drop-layer-ffn-qwen2",
    "drop-layer-both-deepseek_v2",
    "inherit-layer-both-granite",
    "tie-drop-ge",
    "own-ffn-delta-sigmoid_sum",
    "ungated-longcat",
)
"""Every policy, gates of one and of two sublayers, weights on the input and the output.

Identity experts. Shared experts as wide as the others, twice as wide with a share, and of other
widths.
"""


FORMS = (
    "fold-constants",
    "eliminate-common",
    "hoist-common",
    "fold-identity-experts",
    "stack-experts",
    "group-experts",
)
"""Passes before gates are lowered."""


@cache
def optimised(name: str) -> tuple[Module, Statistics]:
    """A case's module after the default passes, valid after each, and what they did."""
    module, statistics = traced_by_name(name).clone(), Statistics()
    for step in DEFAULT_PIPELINE:
        PASSES[step]().run(module, statistics)
        verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)) == text
    return module, statistics


def in_arms(module: Module, kind: type[Op]) -> list[Op]:
    """The ops of a class that stand in an arm of a conditional."""
    found = [op for op in module.functions["prefill"].body.walk() if isinstance(op, kind)]
    return [op for op in found if op.parent and not isinstance(op.parent.parent, Function)]


def assert_equals_the_oracle(case: Case, batches: slice) -> None:
    module, _ = optimised(case.name)
    exact = Interpreter(module, Weights(case), exact=True)
    for expected in reference(case)[batches]:
        for function, chunk in (("prefill", None), ("prefill", 3), ("decode", 1)):
            outputs = drive(case, expected.batch, stepper(exact, function), chunk)
            assert_matches(expected, outputs, tolerance(case.config, np.float64))
            np.testing.assert_array_equal(outputs["kv_len"], expected.kv_len)


@pytest.mark.parametrize("name", FEW)
def test_optimised_trace_matches_the_oracle(name: str) -> None:
    assert_equals_the_oracle(CASES[name], slice(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_optimised_trace_matches_the_oracle_on_every_batch(name: str) -> None:
    assert_equals_the_oracle(CASES[name], slice(None))


@pytest.mark.parametrize("name", CASES)
def test_every_case_lowers_in_every_form(name: str) -> None:
    """As a branch, on compacted rows and under a mask: no gated layer refuses a form."""
    module = traced_by_name(name).clone()
    del module.functions["decode"]
    for step in FORMS:
        PASSES[step]().run(module, Statistics())
    gated = [op for op in module.walk() if isinstance(op, ops.If)]
    compact, masked, told = module.clone(), module.clone(), Statistics()
    for step in ("fuse-linear", "compact-tokens"):
        PASSES[step]().run(compact, told)
    assert told.fired["compact-tokens"] == len(gated), told.near_misses["compact-tokens"]
    FixDepth().run(masked, Statistics())
    assert not [op for op in masked.walk() if isinstance(op, ops.If)]
    for lowered in (compact, masked):
        verify(lowered)


@pytest.mark.parametrize("name", FEW)
def test_arms_are_compact_and_experts_grouped(name: str) -> None:
    module, statistics = optimised(name)
    assert not in_arms(module, ops.Attend)
    assert not [op for op in module.walk() if isinstance(op, ops.ExpertMask | ops.MapExperts)]
    for rule in ("compact-tokens", "stack-experts", "group-swiglu"):
        assert rule not in statistics.near_misses, statistics.near_misses[rule]
    if name.startswith("own"):
        assert not in_arms(module, ops.Append)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("own-attn_ffn-delta-llama4", 1), ("drop-layer-ffn-qwen2", 2), ("tie-drop-ge", 0)],
)
def test_shared_experts_are_experts_where_their_width_fits(name: str, fused: int) -> None:
    module, _ = optimised(name)
    assert {info.shared for info in model_info(module, "", "").experts} == {fused}
    moe, count = CASES[name].moe, len(in_arms(module, ops.GroupedExperts))
    assert count == (len(moe["layers"]) if fused else 4)

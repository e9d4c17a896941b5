"""The traced model with order-experts among the default passes, against the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from liquidc.ir import Module, ops, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.observers import ModelObserver
from liquidc.passes.base import PassContext
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from liquidc.profile import Profile
from liquidc.profiling import profile_corpus
from tests.frontend.test_trace import CASES, Weights, stepper, traced
from tests.oracle.drive import drive
from tests.oracle.grid import Case
from tests.oracle.reference import assert_matches, reference, tolerance
from tests.passes.test_lossy_oracle import Traced

AT = DEFAULT_PIPELINE.index("group-experts") + 1
PIPELINE = (*DEFAULT_PIPELINE[:AT], "order-experts", *DEFAULT_PIPELINE[AT:])
FEW = ("own-attn_ffn-both-mixtral", "inherit-layer-both-granite", "own-attn-both-gpt_oss")


def profiled(case: Case, directory: Path) -> Profile:
    """A profile of a case's batches."""
    prompts = [prompt for batch in case.batches()[:2] for prompt in batch.prompts]
    corpus = directory / "ids.jsonl"
    corpus.write_text("\n".join(json.dumps({"ids": prompt}) for prompt in prompts))
    return profile_corpus(ModelObserver(Traced(case), None), corpus, directory / "profile.json")


def ordered(case: Case, profile: Profile) -> tuple[Module, Statistics]:
    """The case's module after the default passes with order-experts, valid after each."""
    module, statistics = traced(case), Statistics()
    for name in PIPELINE:
        PASSES[name]().run(module, statistics, PassContext(profile, Weights(case)))
        verify(module)
    return module, statistics


@pytest.mark.parametrize("name", FEW)
def test_ordered_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module, statistics = ordered(case, profiled(case, tmp_path))
    said = statistics.facts["order-experts"]["layers"]
    changed = [entry for entry in said if "order" in entry]
    assert statistics.fired["order-experts"] == len(changed) >= 1
    for entry in changed:
        assert sorted(entry["order"]) == list(range(case.moe["num_experts"]))
        assert entry["cut"]["after"] < entry["cut"]["before"]
        assert 1 <= entry["groups_per_token"]["after"] < entry["groups_per_token"]["before"] <= 2
    exact = Interpreter(module, Weights(case), exact=True)
    for expected in reference(case)[:2]:
        for function, chunk in (("prefill", None), ("decode", 1)):
            outputs = drive(case, expected.batch, stepper(exact, function), chunk)
            assert_matches(expected, outputs, tolerance(case.config, np.float64))


@pytest.mark.parametrize("name", FEW)
def test_arms_stay_compact(name: str, tmp_path: Path) -> None:
    """Only tokens that run have numbers to change: the others' are -1."""
    case = CASES[name]
    module, statistics = ordered(case, profiled(case, tmp_path))
    found = [op for op in module.functions["prefill"].body.walk() if isinstance(op, ops.Renumber)]
    said = statistics.facts["order-experts"]["layers"]
    assert len(found) == sum("order" in entry for entry in said)
    assert "compact-tokens" not in statistics.near_misses

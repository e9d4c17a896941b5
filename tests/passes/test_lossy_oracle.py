"""The lossy expert passes against the oracle: their scores, and what they compute afterwards."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from liquidc.ir import Module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.observers import ModelObserver
from liquidc.passes.base import PassContext
from liquidc.passes.merge_experts import MergeExperts
from liquidc.passes.prune_experts import PruneExperts
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from liquidc.profiling import profile_corpus
from tests.frontend.test_trace import CASES, Weights, stepper, traced
from tests.oracle.drive import drive
from tests.oracle.grid import Case
from tests.oracle.liquid_numpy import Oracle, route, silu
from tests.oracle.reference import assert_matches, run, tolerance

FEW = (
    "drop-layer-both-deepseek_v2",
    "own-attn_ffn-delta-llama4",
    pytest.param("own-layer-both-deepseek_v3", marks=pytest.mark.slow),
    pytest.param("own-attn-both-gpt_oss", marks=pytest.mark.slow),
)
"""Groups, weights on the input, groups with a selection bias, a router's bias."""


GROUPED = DEFAULT_PIPELINE.index("group-experts") + 1
STEPS = {"prune-experts": PruneExperts(ratio=0.5), "merge-experts": MergeExperts(ratio=0.5)}


class Watched(Oracle):
    """Keeps, by layer and expert, weight · ‖output‖ of each token, the weights normalised."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.config, case.weights())
        self.seen: defaultdict[tuple[int, int], list[float]] = defaultdict(list)

    def feed_forward(self, layer: int, z: NDArray[Any]) -> tuple[NDArray[Any], list[int], float]:
        name, moe = f"model.layers.{layer}.mlp", self.moe
        if f"{name}.gate.weight" in self.weights:
            bias = self.weights.get(f"{name}.gate.e_score_correction_bias")
            logits = self.linear(f"{name}.gate", z, moe["router_bias"])
            experts, weights, _ = route(logits, moe, bias)
            for expert, weight in zip(experts, weights, strict=True):
                on_input = moe["apply"] == "input"
                x, share = (weight * z, 1.0) if on_input else (z, weight / sum(weights))
                both = self.weights[f"{name}.experts.gate_up_proj"][expert] @ x
                gate, up = np.split(both, 2)
                y = self.weights[f"{name}.experts.down_proj"][expert] @ (silu(gate) * up)
                self.seen[layer, expert].append(share * float(np.linalg.norm(y)))
        return super().feed_forward(layer, z)


@cache
def whole(name: str) -> Module:
    """A case's module after the default passes up to the one that groups its experts."""
    module = traced(CASES[name])
    for step in DEFAULT_PIPELINE[:GROUPED]:
        PASSES[step]().run(module, Statistics())
    return module


class Traced:
    """A case whose module was traced before."""

    type, sha256 = "case", "0" * 64

    def __init__(self, case: Case) -> None:
        self.case, self.weights = case, Weights(case)

    def trace(self) -> Module:
        return whole(self.case.name).clone()


def lossy(step: str, case: Case, directory: Path) -> tuple[Module, list[dict[str, Any]], Watched]:
    """A case's module after the default passes with a lossy one, by a profile of its batches."""
    watched, ids = Watched(case), []
    for prompt in (p for batch in case.batches()[:2] for p in batch.prompts):
        ids.append(json.dumps({"ids": prompt}))
        sequence = watched.sequence()
        for token in prompt:
            sequence.step(token)
    (directory / "ids.jsonl").write_text("\n".join(ids))
    observer = ModelObserver(Traced(case), None)
    profile = profile_corpus(observer, directory / "ids.jsonl", directory / "profile.json")
    module, statistics = Traced(case).trace(), Statistics()
    STEPS[step].run(module, statistics, PassContext(profile, Weights(case)))
    verify(module)
    for name in DEFAULT_PIPELINE[GROUPED:]:
        PASSES[name]().run(module, Statistics())
    return module, statistics.facts[step]["layers"], watched


@pytest.mark.parametrize("name", FEW)
def test_pruned_by_the_scores_of_reap_it_is_the_model_without_those_experts(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    module, said, watched = lossy("prune-experts", case, tmp_path)
    groups, count = case.moe["n_group"], case.moe["num_experts"]
    weights = case.weights()
    (left,) = {len(entry["kept"]) for entry in said}
    assert left < count
    for entry in said:
        layer = entry["layer"]
        scores = np.array([np.mean(watched.seen[layer, e] or [0.0]) for e in range(count)])
        for removed in entry["removed"]:
            assert removed["score"] == pytest.approx(scores[removed["expert"]], rel=1e-4)
            assert removed["tokens"] == len(watched.seen[layer, removed["expert"]])
        best = [sorted(part, reverse=True)[: left // groups] for part in np.split(scores, groups)]
        assert sorted(scores[e] for e in entry["kept"]) == sorted(s for part in best for s in part)
        for key, value in weights.items():
            if f"layers.{layer}.mlp.gate." in key or f"layers.{layer}.mlp.experts." in key:
                weights[key] = value[entry["kept"]]
    smaller = {**case.config, "moe": {**case.config["moe"], "num_experts": left}}
    assert_equals(case, Oracle(smaller, weights), module)


@pytest.mark.parametrize("name", FEW)
def test_merged_it_is_the_model_whose_experts_are_those_of_their_groups(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    module, said, watched = lossy("merge-experts", case, tmp_path)
    weights = {name: value.astype(np.float64) for name, value in case.weights().items()}
    source, count = Interpreter(module, Weights(case), exact=True), case.moe["num_experts"]
    for entry in said:
        mlp = f"model.layers.{entry['layer']}.mlp"
        load = [len(watched.seen[entry["layer"], e]) for e in range(count)]
        rows = weights[f"{mlp}.gate.weight"]
        dominant = sorted(sorted(range(count), key=lambda e: (-load[e], e))[: -(-count // 2)])
        assert [group[0] for group in entry["groups"]] == dominant
        assert sorted(e for group in entry["groups"] for e in group) == list(range(count))
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for number, (first, *others) in enumerate(entry["groups"]):
            for e in others:
                assert unit[e] @ unit[first] == max(unit[e] @ unit[d] for d in dominant)
            for part in ("gate_up_proj", "down_proj"):
                merged = source.weight(f"{mlp}.experts.{part}.merged")
                weights[f"{mlp}.experts.{part}"][[first, *others]] = merged[number].numpy()
    assert_equals(case, Oracle(case.config, weights), module)


def assert_equals(case: Case, oracle: Oracle, module: Module) -> None:
    """The module computes what the oracle does, in every way of running it."""
    exact = Interpreter(module, Weights(case), exact=True)
    batch = case.batches()[1]
    expected = run(oracle, batch)
    for function, chunk in (("prefill", None), ("decode", 1)):
        outputs = drive(case, batch, stepper(exact, function), chunk)
        assert_matches(expected, outputs, tolerance(case.config, np.float64))

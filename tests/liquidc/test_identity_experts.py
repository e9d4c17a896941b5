"""Identity experts from the model directory to engines, profiles and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import liquidc
from liquidc.facts import main_function
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.loss import layer_cost
from liquidc.ir.cost import Cost, costs
from liquidc.ir.rewriter import Statistics
from liquidc.observers import ModelObserver
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.passplan import plan_passes, run_passes
from liquidc.pipeline import open_model
from liquidc.profile import UNIT
from liquidc.profiling import profile_corpus
from liquidc.reference import Reference
from liquidc.trace_proof import prove
from tests.liquidc.conftest import CONFIG, save_model

TEXT = "What a profile counts: tokens, gates, experts; 17 of them, or 42. " * 3
MOE = {"num_experts": 4, "num_zero_experts": 4, "num_experts_per_tok": 2}
IDENTITY: dict[str, Any] = {**CONFIG, "moe": {**MOE, "moe_intermediate_size": 16}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("identity") / "model", IDENTITY)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_an_engine_computes_the_others_for_their_tokens_alone(
    target: str, directory: Path, tmp_path: Path
) -> None:
    with liquidc.compile(directory, tmp_path / "engine", target=target) as engine:
        ids = engine.encode(TEXT[:60])
        proof, result = prove(engine, [ids], 0), engine.evaluate(ids)
        infos = engine.manifest.model.experts
    assert [(info.experts, info.identity, info.shared) for info in infos] == [(8, 4, 0)] * 4
    assert proof.holds
    assert sorted(proof.experts_traced) == [0, 1, 2, 3]
    assert max(max(counts) for counts in proof.experts.values()) == 3
    assert result.experts.max() >= 4
    for layer, counts in proof.experts.items():
        chosen = result.experts[layer]
        assert sum(counts.values()) == int(((chosen >= 0) & (chosen < 4)).sum())


def test_tokens_and_shares_of_a_profile(directory: Path, tmp_path: Path) -> None:
    observer = ModelObserver(open_model(directory), directory / "tokenizer.json")
    (tmp_path / "corpus.txt").write_text(TEXT)
    profile = profile_corpus(observer, tmp_path / "corpus.txt", tmp_path / "profile.json")
    for experts in profile.experts:
        assert len(experts.load) == 8
        assert sum(experts.load) == 2 * experts.tokens
        assert experts.saliency is not None
        assert [n > 0 for n in experts.saliency] == [n > 0 for n in experts.load]
        assert sum(experts.load[4:]) > 0
    with liquidc.compile(
        directory, tmp_path / "engine", target="null", profile=tmp_path / "profile.json"
    ):
        page = (tmp_path / "engine" / "report.html").read_text()
    assert "the last 4 give back their input and cost nothing" in page
    assert "its router chooses among 8 experts, 4 have weights" in page


def test_the_share_of_an_identity_expert_times_its_input_is_its_part(directory: Path) -> None:
    """With every expert but those at 0, saliency is ‖x‖ times the share: at most ‖x‖ a token."""
    observer = ModelObserver(open_model(directory), directory / "tokenizer.json")
    seen = observer.observe(list(range(40)))
    for layer, parts in seen.saliency.items():
        used = seen.experts[layer] >= 4
        tokens = int(used.any(-1).sum())
        # The tokens stand behind an RMS norm of weight 1, so ‖x‖ = √32 but for eps.
        assert sum(parts[4:]) / UNIT <= tokens * np.sqrt(32) * 1.001
        both = int(used.all(-1).sum())
        assert sum(parts[4:]) / UNIT >= both * np.sqrt(32) * 0.99


def test_a_chosen_one_costs_nothing(directory: Path) -> None:
    traced = open_model(directory).trace()
    compiled = run_passes(traced, plan_passes(DEFAULT_PIPELINE, ()), Statistics())
    config = LiquidConfig.from_dict(IDENTITY)
    for module in (traced, compiled):
        found = costs(module, main_function(module))
        on = sum((cost for place, cost in found.items() if place.ran), Cost())
        layers = sum(layer_cost(config, layer, 10).full for layer in range(4))
        assert on.flops + 10 * on.key_flops == layers + 2 * 32 * 256


def test_an_engine_is_the_model(directory: Path, tmp_path: Path) -> None:
    with liquidc.compile(directory, tmp_path / "engine", target="onnxruntime") as engine:
        ids = engine.encode(TEXT[:60])
        ours = engine.evaluate(ids)
        theirs = Reference.load(directory, engine.manifest.model.sha256).evaluate(ids)
    np.testing.assert_allclose(ours.logits[0], theirs.logits, atol=1e-4)

"""The proof that skipping is real where experts are computed under other numbers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import liquidc
from liquidc.backends.base import Guard, Runner
from liquidc.machine import DEFAULT
from liquidc.observers import ModelObserver
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.pipeline import open_model
from liquidc.profiling import profile_corpus
from liquidc.session import DepthControls
from liquidc.trace_proof import prove

AT = DEFAULT_PIPELINE.index("group-experts") + 1
TEXT = "What a profile counts: tokens, gates, experts; 17 of them, or 42. " * 9


@pytest.fixture(scope="module")
def profile(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profile")
    (directory / "corpus.txt").write_text(TEXT)
    observer = ModelObserver(open_model(model_directory), model_directory / "tokenizer.json")
    profile_corpus(observer, directory / "corpus.txt", directory / "profile.json")
    return directory / "profile.json"


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
@pytest.mark.parametrize("step", ["order-experts", "merge-experts{ratio=0.5}"])
def test_experts_are_counted_where_they_are_computed(
    step: str, target: str, model_directory: Path, profile: Path, tmp_path: Path
) -> None:
    passes = (*DEFAULT_PIPELINE[:AT], step, *DEFAULT_PIPELINE[AT:])
    with liquidc.compile(
        model_directory, tmp_path / "engine", target=target, passes=passes, profile=profile
    ) as engine:
        proof = prove(engine, [engine.encode(TEXT[:50]), engine.encode(TEXT[20:60])], 4)
        placed = {info.layer: info.places for info in engine.manifest.model.experts if info.places}
    assert proof.holds
    assert placed
    for layer, places in placed.items():
        kept = [0, 1, 2, 3] if step == "order-experts" else [0, 1]
        assert len(places) == 4
        assert sorted(set(places)) == kept
        more = {expert: count + 1 for expert, count in proof.experts[layer].items()}
        assert not replace(proof, experts={**proof.experts, layer: more}).holds


def test_the_choice_of_experts_is_reported_as_without_the_pass(
    model_directory: Path, profile: Path, tmp_path: Path
) -> None:
    results = []
    for step in ((), ("order-experts",)):
        passes = (*DEFAULT_PIPELINE[:AT], *step, *DEFAULT_PIPELINE[AT:])
        path = tmp_path / "-".join(("engine", *step))
        with liquidc.compile(model_directory, path, passes=passes, profile=profile) as engine:
            results.append(engine.evaluate(engine.encode(TEXT[:100])))
    before, after = results
    assert (before.experts == after.experts).all()
    assert (before.gates == after.gates).all()
    assert abs(before.logits - after.logits).max() < 1e-4


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_code_for_an_expected_path_is_counted_when_it_was_right(
    target: str, model_directory: Path, profile: Path, tmp_path: Path
) -> None:
    at = DEFAULT_PIPELINE.index("fuse-linear")
    step = "specialize-depth{always=1,hot=0}"
    passes = (*DEFAULT_PIPELINE[:at], step, *DEFAULT_PIPELINE[at:])
    with liquidc.compile(
        model_directory, tmp_path / "engine", target=target, passes=passes, profile=profile
    ) as engine:
        guards, gates = list[Guard](), np.zeros(2, np.int64)

        def work(runner: Runner) -> None:
            session = engine.with_runner(runner).session(capacity=60)
            results = [session.prefill(engine.encode(TEXT[:20]))]
            for force in [*itertools.product((-1, 1), repeat=2)] * 3:
                results.append(session.step([65], depth=DepthControls(gate_force=force)))
            for result in results:
                gates[...] += result.gates.sum((1, 2))
            assert runner.guard is not None
            guards.append(runner.guard)

        trace = engine.runner.profile(work)
    assert (guards[0].tried, guards[0].missed) == (6, 3)
    assert trace.regions == {(gate, 0): count for gate, count in enumerate(gates.tolist())}


@pytest.mark.parametrize("lowering", ["branch", "compact", "mask"])
def test_each_lowering_computes_the_tokens_that_it_says(
    lowering: str, model_directory: Path, profile: Path, tmp_path: Path
) -> None:
    """The machine of the table makes one lowering free of what the others cost."""
    dear = {"branch": "find_rows", "compact": "product", "mask": "conditional"}[lowering]
    table = json.loads(DEFAULT.read_text())
    table |= {"op": 0, "conditional": 0, "find_rows": 0, "move_row": 0}
    table["product"] = [0] * len(table["rows"])
    table[dear] = [n * 1e6 for n in table["rows"]] if dear == "product" else 1e9
    (tmp_path / "table.json").write_text(json.dumps(table))
    with liquidc.compile(
        model_directory, tmp_path / "engine", profile=profile, machine=tmp_path / "table.json"
    ) as engine:
        found = {gate.lowering for gate in engine.manifest.model.gates}
        proof = prove(engine, [engine.encode(TEXT[:60])], 4)
    assert lowering in found
    assert proof.holds
    assert not replace(proof, gates_traced=(1, *proof.gates_traced[1:])).holds
    assert (proof.computed == proof.gates) == (lowering == "compact")

"""What lossy expert passes cost: by hand, in numpy, and on the way through a compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import Module, parse_module, verify
from liquidc.ir.rewriter import Statistics
from liquidc.lossy import COLUMNS, LayerError, measure, note, table
from liquidc.observers import ModelObserver
from liquidc.passes.base import Pass
from liquidc.passes.merge_experts import MergeExperts
from liquidc.passes.prune_experts import PruneExperts
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.passplan import plan_passes, run_passes
from liquidc.pipeline import CompileOptions, compile_model, open_model
from liquidc.profiling import profile_corpus
from liquidc.records import to_json
from liquidc.runtime import load
from tests.oracle.liquid_numpy import route, silu
from tests.passes.routed import READ, WEIGHTS, Tensors, profiled

ROUTER = {"score": "softmax", "n_group": 1, "num_experts_per_tok": 2, "post": "renorm"}
ROUTER |= {"renorm_eps": 0.0, "routed_scaling_factor": 1.0}
MODEL = f"""
module @m
weight @embed : f32[11, 8] = tensor("embed", f32[11, 8])
{WEIGHTS}
func @prefill(%input_ids: i64[B, T], %lengths: i64[B])
    -> (logits: f32[B, T, 8], experts: i64[1, B, T, 2]) {{{READ}
  %embed = weight weight="embed" : f32[11, 8]
  %x = embed %input_ids, %embed : f32[B, T, 8]
  %t = constant value=[true] : bool[]
  %m = broadcast %t, shape=["B", "T"] : bool[B, T]
  %l = linear %x, %r : f32[B, T, 4]
  %i, %s = route %l, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
  %y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 8]
  %all = reshape %i, shape=[1, "B", "T", 2] : i64[1, B, T, 2]
  return %y, %all
}}
"""
SEQUENCES = ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 0])


@pytest.fixture
def source() -> Tensors:
    made = Tensors()
    made.tensors["embed"] = torch.randn(11, 8, generator=torch.Generator().manual_seed(5))
    return made


def changed(step: Pass, source: Tensors, load: tuple[int, ...]) -> tuple[Module, Module, Any]:
    """The module before and after a pass, and what the pass says."""
    before, statistics = parse_module(MODEL.replace("\n    ->", " ->")), Statistics()
    verify(before)
    after = before.clone()
    scores = [1.0 + n for n in load]
    step.run(after, statistics, replace(profiled(load, scores), source=source))
    verify(after)
    return before, after, statistics.facts[step.name]


def experts(source: Tensors, token: int, numbers: list[int]) -> tuple[np.ndarray, list[int]]:
    """The experts' output for a token when only those with these numbers are there."""
    weights = {name: t.double().numpy() for name, t in source.tensors.items()}
    x = weights["embed"][token]
    chosen, shares, _ = route(weights["r"][numbers] @ x, ROUTER, None)
    y = np.zeros(8)
    for expert, share in zip((numbers[i] for i in chosen), shares, strict=True):
        gate, up = np.split(weights["gu"][expert] @ x, 2)
        y += share * (weights["d"][expert] @ (silu(gate) * up))
    return y, [numbers[i] for i in chosen]


def test_nothing_changed_costs_nothing(source: Tensors) -> None:
    before, _, _ = changed(PruneExperts(), source, (9, 9, 9, 1))
    (layer,) = measure(before, before.clone(), source, SEQUENCES)
    assert layer == LayerError(0, 11, 0.0, 1.0)


def test_pruning_costs_what_numpy_says(source: Tensors) -> None:
    before, after, said = changed(PruneExperts(), source, (9, 1, 9, 9))
    (layer,) = measure(before, after, source, SEQUENCES)
    error = size = kept = 0.0
    for token in range(11):
        y, chosen = experts(source, token, [0, 1, 2, 3])
        error += ((y - experts(source, token, [0, 2, 3])[0]) ** 2).sum()
        size += (y**2).sum()
        kept += sum(e != 1 for e in chosen) / 2
    assert layer.tokens == 11
    assert layer.error == pytest.approx(error / size, rel=1e-5)
    assert layer.overlap == pytest.approx(kept / 11)
    assert 0 < layer.error
    assert layer.overlap < 1
    row = ("0", "11", f"{error / size:.3%}", f"{kept / 11:.1%}", "0, 1, 2, 3")
    note([layer], said)
    assert table(said) == [row]
    assert len(COLUMNS) == len(row)
    assert set(to_json(layer)) == {"layer", "tokens", "error", "overlap"}


def test_merging_keeps_the_choice_and_costs_what_the_weights_cost(source: Tensors) -> None:
    load = (9, 1, 9, 9)
    before, after, _ = changed(MergeExperts(keep=3), source, load)
    (layer,) = measure(before, after, source, SEQUENCES)
    assert layer.error > 1e-3
    assert layer.overlap == 1.0
    for name in ("gu", "d"):
        source.tensors[name][:] = source.tensors[name][:1].clone()
    (same,) = measure(*changed(MergeExperts(keep=3), source, load)[:2], source, SEQUENCES)
    assert same.error < 1e-12


def test_without_tokens_it_is_refused(source: Tensors) -> None:
    before, after, _ = changed(PruneExperts(), source, (9, 1, 9, 9))
    with pytest.raises(InputError, match="give calibration data"):
        measure(before, after, source, [[]])


@pytest.mark.parametrize("name", ["prune-experts", "merge-experts"])
def test_an_engine_after_a_lossy_pass(name: str, model_directory: Path, tmp_path: Path) -> None:
    opened = open_model(model_directory)
    observer = ModelObserver(opened, model_directory / "tokenizer.json")
    text = tmp_path / "corpus.txt"
    text.write_text("What a profile counts: tokens, gates, experts; 17 of them, or 42. " * 9)
    profile = profile_corpus(observer, text, tmp_path / "profile.json")
    passes = (*DEFAULT_PIPELINE, f"{name}{{keep=3}}", "eliminate-dead")
    results = []
    for target in ("null", "onnxruntime"):
        options = CompileOptions(target, passes, profile=tmp_path / "profile.json")
        compiled = compile_model(model_directory, tmp_path / target, options)
        assert len(compiled.statistics.facts[name]["layers"]) == len(profile.experts) == 4
        assert compiled.statistics.fired[name] == 4
        with load(tmp_path / target) as engine:
            ids = engine.encode(text.read_text())[:60]
            results.append(engine.evaluate(ids))
            (count,) = {info.experts for info in engine.manifest.model.experts}
            assert count == (3 if name == "prune-experts" else 4)
    null, onnx = results
    np.testing.assert_array_equal(null.experts, onnx.experts)
    assert null.experts.max() == count - 1
    np.testing.assert_allclose(null.logits, onnx.logits, rtol=1e-3, atol=1e-3)

    before = run_passes(opened.trace(), plan_passes(DEFAULT_PIPELINE, ()), Statistics())
    after, said = before.clone(), Statistics()
    context = replace(profiled((1, 1), layers=0), profile=profile, source=opened.weights)
    plan_passes([passes[-2]], ())[0].instance.run(after, said, context)
    errors = measure(before, after, opened.weights, [ids])
    assert [e.layer for e in errors] == [0, 1, 2, 3]
    assert all(0 <= e.error < 2 and 0 < e.overlap <= 1 for e in errors), errors
    assert errors[0].error > 0.01
    assert errors[0].tokens == 60 > errors[1].tokens > 0
    (first,) = (e["starved"] for e in said.facts[name]["layers"] if e["layer"] == 0)
    assert first == [e for e, n in enumerate(profile.experts[0].load) if n < 32]

"""What is skipped costs nothing: caches stay where they are, and skipped weights aren't read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import liquidc
from liquidc.backends.base import RunnerOptions
from liquidc.backends.onnxruntime import runner as runner_module
from liquidc.backends.onnxruntime.backend import MODEL
from liquidc.backends.onnxruntime.runner import OrtCache, OrtRunner
from liquidc.backends.weights_file import NAME
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.session import DepthControls
from liquidc.trace_proof import prove
from tests.oracle.drive import CAPACITY, controls
from tests.oracle.engines import engine, model
from tests.oracle.grid import grid
from tests.oracle.reference import tolerance

CASES = {case.name: case for case in grid()}
CHUNK = 2
"""Tokens of a call; padding may leave its keys and values in the slots after a row's last."""
POLICIES = ["own-layer-ffn-glm", "drop-layer-ffn-qwen2", "inherit-layer-both-granite"]
PROVED = [*POLICIES, "drop-attn_ffn-both-glm", "own-ffn-both-llama4", "drop-attn-ffn-gpt_oss"]


@pytest.mark.parametrize("name", POLICIES)
def test_the_cache_stays_in_place(
    name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers keep their addresses; slots that no call reached keep their bytes."""
    monkeypatch.setattr(runner_module, "LOG_SEVERITY", 2)
    case = CASES[name]
    batch = case.batches()[1]
    with engine(case, tmp_path / "engine", "onnxruntime") as loaded:
        runner = OrtRunner(tmp_path / "engine", loaded.manifest, RunnerOptions(threads=1))
        cache = runner.new_cache(len(batch.prompts), CAPACITY)
        assert isinstance(cache, OrtCache)
        for buffer in cache.buffers.values():
            buffer.numpy()[...] = 7
        addresses = {key: buffer.data_ptr() for key, buffer in cache.buffers.items()}
        for piece in batch.chunks(CHUNK):
            outputs = runner.step(controls(case, piece), cache)
            assert not any(key.startswith("present") for key in outputs)
        assert {key: buffer.data_ptr() for key, buffer in cache.buffers.items()} == addresses
        for layer, lengths in enumerate(cache.kv_len):
            for part in ("key", "value"):
                held = cache.buffers[f"past.{layer}.{part}"].numpy()
                for row, length in enumerate(lengths):
                    assert (held[row, :, length + CHUNK :] == 7).all()
                    assert not (held[row, :, :length] == 7).all() or not length
        runner.close()
    assert "in-place" not in capfd.readouterr().err


@pytest.mark.parametrize("name", POLICIES)
def test_padding_next_to_a_full_cache(name: str, tmp_path: Path) -> None:
    """A nearly full row meets a longer row in one call, then rests while it is full."""
    case = CASES[name]
    ids = [token for batch in case.batches()[:3] for p in batch.prompts for token in p]
    assert len(ids) > 18
    with engine(case, tmp_path / "engine", "onnxruntime") as loaded:
        want = loaded.logits(ids[:18])
        session = loaded.session(batch=2, capacity=18)
        session.prefill([ids[:16], ids[:3]])
        both = session.prefill([ids[16:18], ids[3:17]], every=True).logits
        last = session.step([0, ids[17]], active=[False, True]).logits
    bound = tolerance(case.config) * np.abs(want).max()
    np.testing.assert_allclose(both[0, :2], want[16:18], rtol=0, atol=bound)
    np.testing.assert_allclose(both[1], want[3:17], rtol=0, atol=bound)
    np.testing.assert_allclose(last[1, 0], want[17], rtol=0, atol=bound)


@pytest.mark.parametrize("name", PROVED)
def test_the_profile_agrees_with_the_gates(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with engine(case, tmp_path / "engine", "onnxruntime") as loaded:
        prompts = [list(prompt) for prompt in case.batches()[1].prompts]
        proof = prove(loaded, prompts, 4)
    assert proof.gates == proof.gates_traced
    assert proof.holds
    assert 0 < sum(proof.gates) < len(proof.gates) * proof.tokens
    assert sorted(proof.experts_traced) == [info.layer for info in loaded.manifest.model.experts]


def test_a_fused_shared_expert_computes_the_tokens_that_run(tmp_path: Path) -> None:
    case = CASES["drop-layer-ffn-qwen2"]
    prompts = [list(prompt) for prompt in case.batches()[1].prompts]
    path = tmp_path / "engine"
    with liquidc.compile(model(case), path, passes=DEFAULT_PIPELINE) as fused:
        proof = prove(fused, prompts, 4)
        infos = fused.manifest.model.experts
        got = fused.logits(prompts[0])
    with engine(case, tmp_path / "apart", "onnxruntime") as apart:
        want = apart.logits(prompts[0])
        assert {info.shared for info in apart.manifest.model.experts} == {0}
    assert proof.holds
    assert {(info.experts, info.shared) for info in infos} == {(5, 2)}
    assert all(proof.experts_traced[info.layer][6] > 0 for info in infos)
    bound = tolerance(case.config) * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def run_weights(directory: Path) -> set[str]:
    """Initialisers that only the run arms of gated layers name."""
    graph = onnx.load(directory / MODEL, load_external_data=False).graph
    inside: set[str] = set()
    outside: set[str] = set()

    def walk(part: onnx.GraphProto, run: bool) -> None:
        for node in part.node:
            (inside if run else outside).update(node.input)
            gated = any('"gate"' in entry.value for entry in node.metadata_props)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g, run or (gated and attribute.name == "then_branch"))

    walk(graph, False)
    external = {tensor.name for tensor in graph.initializer if tensor.external_data}
    return (inside - outside) & external


@pytest.mark.parametrize("name", POLICIES)
def test_skipped_weights_are_not_read(name: str, tmp_path: Path) -> None:
    """NaN in every weight that only run arms use changes no bit when all gates are off."""
    case = CASES[name]
    ids = [token for prompt in case.batches()[1].prompts for token in prompt]
    off = DepthControls(gate_force=(-1,) * case.num_gates)
    with engine(case, tmp_path / "engine", "onnxruntime") as loaded:
        want = loaded.logits(ids, depth=off)
        path, manifest = tmp_path / "engine", loaded.manifest
    names = run_weights(path)
    assert len(names) >= 3 * len(case.gate["layers"])
    weights = bytearray((path / NAME).read_bytes())
    for tensor in onnx.load(path / MODEL, load_external_data=False).graph.initializer:
        if tensor.name in names:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(place["offset"]), int(place["length"])
            weights[start : start + length] = np.full(length // 4, np.nan, "f4").tobytes()
    (path / NAME).write_bytes(weights)
    runner = OrtRunner(path, manifest, RunnerOptions(threads=1))
    poisoned = loaded.with_runner(runner)
    np.testing.assert_array_equal(poisoned.logits(ids, depth=off), want)
    on = DepthControls(gate_force=(1,) * case.num_gates)
    assert np.isnan(poisoned.logits(ids, depth=on)).all()
    runner.close()

"""Engines without control flow: no If anywhere, the same results, guesses that are checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from liquidc.backends.base import RunnerOptions
from liquidc.manifest import MANIFEST
from liquidc.pipeline import CompileOptions, compile_model
from liquidc.runtime import load
from liquidc.session import DepthControls
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import ok

POLICIES = ("own", "drop", "inherit")
CONFIGS = {
    policy: {**CONFIG, "depth_gate": {"layers": [1, 2], "kv_policy": policy}} for policy in POLICIES
} | {
    "sublayers": {
        **CONFIG,
        "depth_gate": {"layers": [1, 2], "scope": "attn_ffn", "skip_path": "adapter"},
    }
}


@pytest.fixture(scope="module", params=CONFIGS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, a profile, and engines with and without control flow."""
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "model", CONFIGS[request.param])
    data = root / "text.txt"
    data.write_text("All these words, 12 + 7 = 19, to be run. " * 20)
    ok("profile", model, "--data", data, "-o", root / "p.json")
    compile_model(model, root / "branching", CompileOptions())
    options = CompileOptions(target="onnxruntime-fixed", profile=root / "p.json")
    compile_model(model, root / "fixed", options)
    return root


def kinds(graph: onnx.GraphProto) -> set[str]:
    found = {node.op_type for node in graph.node}
    inner = [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
    return found.union(*(kinds(g) for g in inner)) if inner else found


def test_there_is_no_control_flow(engines: Path) -> None:
    files = sorted((engines / "fixed").glob("*.onnx"))
    assert len(files) >= 2
    for path in files:
        model = onnx.load(path, load_external_data=False)
        assert not kinds(model.graph) & {"If", "Loop", "Scan", "SequenceMap"}, path.name
    both = onnx.load(engines / "branching" / "model.onnx", load_external_data=False)
    assert "If" in kinds(both.graph)


@pytest.mark.parametrize("speculate", [False, True])
def test_it_computes_the_same(engines: Path, speculate: bool) -> None:
    """Prefill, then decode; with guesses, some are right and some wrong."""
    prompt = list(b"The end of all these words")
    with (
        load(engines / "branching") as general,
        load(engines / "fixed", options=RunnerOptions(speculate=speculate)) as fixed,
    ):
        sessions = [engine.session(capacity=100) for engine in (general, fixed)]
        old, new = (session.prefill(prompt) for session in sessions)
        for token in range(60):
            scale = np.abs(old.logits).max()
            np.testing.assert_allclose(new.logits, old.logits, atol=1e-4 * scale)
            np.testing.assert_array_equal(new.gates, old.gates)
            np.testing.assert_array_equal(new.experts, old.experts)
            np.testing.assert_array_equal(sessions[0].kv_len, sessions[1].kv_len)
            following = [(token * 37 + 11) % 256]
            old, new = (session.step(following) for session in sessions)
        guard = fixed.runner.guard
        assert guard is not None
        assert guard.tried == (60 if speculate else 0)
        if speculate:
            assert 0 < guard.missed < guard.tried


def test_a_forced_path_is_never_missed(engines: Path) -> None:
    paths = json.loads((engines / "fixed" / MANIFEST).read_bytes())["artifact"]["paths"]
    with load(engines / "branching") as general, load(engines / "fixed") as fixed:
        for path in paths:
            force = tuple(1 if digit == "1" else -1 for digit in path)
            depth = DepthControls(gate_force=force)
            sessions = [engine.session(capacity=20) for engine in (general, fixed)]
            for token in b"forced words":
                old, new = (session.step([token], depth=depth) for session in sessions)
                scale = np.abs(old.logits).max()
                np.testing.assert_allclose(new.logits, old.logits, atol=1e-4 * scale)
                assert [str(int(g)) for g in new.gates[:, 0, 0]] == list(path)
        assert fixed.runner.guard is not None
        assert fixed.runner.guard.tried == 12 * len(paths)
        assert fixed.runner.guard.missed == 0


def test_what_the_manifest_says(engines: Path) -> None:
    manifest = json.loads((engines / "fixed" / MANIFEST).read_bytes())
    guard = manifest["artifact"]["guard"]
    profile = json.loads((engines / "p.json").read_bytes())
    counts = profile["paths"]["counts"]
    for told in guard["paths"]:
        assert told["share"] == counts[told["path"]] / profile["tokens"]
        assert told["bytes"] <= guard["masked_bytes"]
    shares = [told["share"] for told in guard["paths"]]
    assert shares == sorted(shares, reverse=True)
    expected = guard["paths"][0]["bytes"] + (1 - shares[0]) * guard["masked_bytes"]
    assert guard["guarded_bytes"] == pytest.approx(expected)
    assert guard["speculate"] == (expected < guard["masked_bytes"])
    assert set(manifest["fidelity"]["paths"]) == {told["path"] for told in guard["paths"]}
    for figures in manifest["fidelity"]["paths"].values():
        assert figures["kl_nats"] > 0


def test_batches_and_prompts_use_the_masked_graph(engines: Path) -> None:
    with (
        load(engines / "branching") as general,
        load(engines / "fixed", options=RunnerOptions(speculate=True)) as fixed,
    ):
        rows = [list(b"one row"), list(b"and another")]
        old, new = (e.session(batch=2, capacity=20).prefill(rows) for e in (general, fixed))
        np.testing.assert_allclose(new.logits, old.logits, atol=1e-4 * np.abs(old.logits).max())
        assert fixed.runner.guard is not None
        assert fixed.runner.guard.tried == 0


def test_without_a_profile_there_is_the_masked_graph_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    compile_model(model, tmp_path / "engine", CompileOptions(target="onnxruntime-fixed"))
    assert [p.name for p in (tmp_path / "engine").glob("*.onnx")] == ["model.onnx"]
    with load(tmp_path / "engine") as engine:
        assert len(list(engine.generate("x", 4))) == 4

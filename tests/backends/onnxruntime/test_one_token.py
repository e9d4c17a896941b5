"""Calls of one token have forms of attention of their own, for few slots and for many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from liquidc.backends.base import RunnerOptions
from liquidc.backends.onnxruntime import emit_attend
from liquidc.backends.onnxruntime import runner as runner_module
from liquidc.backends.onnxruntime.runner import OrtRunner
from tests.backends.onnxruntime.test_attention import attentions
from tests.oracle.drive import drive
from tests.oracle.engines import engine, stepper
from tests.oracle.grid import edge_cases, grid
from tests.oracle.reference import assert_matches, reference, tolerance

CASES = {case.name: case for case in [*grid(), *edge_cases()]}
MANY = 4
"""Slots that count as many here: as many as heads share a key/value head in these models."""
FORMS = {
    "drop-layer-both-deepseek_v2": {"one", "several", "long"},
    "own-layer-ffn-glm": {"one", "each", "long"},
    "inherit-layer-both-granite": {"one", "each", "long"},
    "drop-attn_ffn-delta-glm": {"one", "several", "long"},
    "ungated-dense": {"short", "long"},
    "ungated-mixtral": {"short", "long"},
}
"""Models, and the forms that their engines must hold."""


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_what_the_oracle_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Token by token, over caches that grow from few slots to many, in place."""
    monkeypatch.setattr(emit_attend, "LONG", MANY)
    monkeypatch.setattr(runner_module, "LOG_SEVERITY", 2)
    case = CASES[name]
    path = tmp_path / "engine"
    longest = 0
    with engine(case, path, "onnxruntime") as loaded:
        runner = OrtRunner(path, loaded.manifest, RunnerOptions(threads=1))
        for expected in reference(case):
            if len(expected.batch.prompts) > 1:
                continue
            outputs = drive(case, expected.batch, stepper(runner), 1)
            assert_matches(expected, outputs, tolerance(case.config))
            np.testing.assert_array_equal(outputs["kv_len"], expected.kv_len)
            longest = max(longest, int(outputs["kv_len"].max()))
        runner.close()
    assert longest > MANY + 1
    assert "in-place" not in capfd.readouterr().err
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    names = [node.name for node in attentions(graph)]
    found = {part for name in names for part in name.split("/")[:-1]}
    assert found >= FORMS[name], found

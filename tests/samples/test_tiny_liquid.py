"""The trained sample: it is there, has learnt what its report says, and the report is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from liquidc.frontend.gate_hooks import random_gates
from liquidc.frontend.model import LiquidForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "tiny-liquid"
REPORT = json.loads((SAMPLE / "training_report.json").read_text())
SCRIPT = ROOT / "samples" / "train_tiny.py"
PYTHON = (3, 11, 7)
"""The Python whose `pydoc_data.topics` the sample was trained on."""
sys.path.insert(0, str(ROOT / "samples"))

import tiny_data  # noqa: E402
import tiny_report  # noqa: E402


def test_files() -> None:
    names = {path.name for path in SAMPLE.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "heldout.txt",
        "model.safetensors",
        "tokenizer.json",
        "training_report.json",
        "training_report.md",
    }
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 16 * 2**20


def test_it_has_learnt() -> None:
    r = REPORT
    assert r["bits_per_byte"] < 0.75 * r["bits_per_byte_trigram"]
    assert r["random_mask_worse_by"]["errors"] >= 3
    assert r["random_mask_worse_by"]["bits"] > 0.1
    assert r["fixed_set_worse_by"]["errors"] >= 3
    assert len(r["fixed_set"]) >= sum(r["run_rates"])
    assert sum(0.2 <= rate <= 0.8 for rate in r["run_rates"]) >= 2
    assert abs(r["gated_layers_run"] - 0.55) < 0.05
    assert r["depth_deviation"] > 0.3
    assert r["expert_share_least"] > 0.01
    assert r["decisions_within_0.02"] < 0.02
    assert r["flips"]["int8 per row"] < 0.003


def test_the_report_is_of_these_weights() -> None:
    """Every eighth window, evaluated again: within four standard errors of the whole."""
    model = LiquidForCausalLM.from_directory(SAMPLE).eval()
    windows = tiny_data.windows((SAMPLE / "heldout.txt").read_text(), tiny_report.LENGTH)[::8]
    result = tiny_report.evaluate(model, windows)
    error = float(result.by_window.std()) / len(windows) ** 0.5
    assert abs(result.bpb - REPORT["bits_per_byte"]) < 4 * error
    for rate, told in zip(result.gates.float().mean((1, 2)), REPORT["run_rates"], strict=True):
        assert abs(float(rate) - told) < 0.05


@pytest.mark.skipif(
    sys.version_info[:3] != PYTHON, reason="the documentation of another Python is another text"
)
def test_heldout_text_is_not_trained_on() -> None:
    corpus = tiny_data.build(REPORT["seed"], problems=2000)
    assert corpus.heldout == (SAMPLE / "heldout.txt").read_text()
    train = bytes(corpus.prose.tolist()).decode()
    long = [line for line in corpus.heldout.splitlines() if len(line) > 40]
    assert len(long) > 300
    assert not [line for line in long if line in train]
    assert corpus.to_profile() == (SAMPLE.parent / "corpus.txt").read_bytes()


@pytest.mark.parametrize("text", ["", "plain", "ünïcode → 🙂", "a\tb\n\r\n", "\x00\x7f"])
def test_bytes_are_tokens(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_rounding_and_random_gates_restore_the_model() -> None:
    model = LiquidForCausalLM.from_directory(SAMPLE).eval()
    windows = tiny_data.windows((SAMPLE / "heldout.txt").read_text(), 64)[:2]
    before = tiny_report.evaluate(model, windows)
    for change in (
        tiny_report.rounded(model, 4, 32),
        random_gates(model, [0.5] * 6, 1),
    ):
        with change:
            assert not torch.equal(tiny_report.evaluate(model, windows).bits, before.bits)
        assert torch.equal(tiny_report.evaluate(model, windows).bits, before.bits)


def test_training_refuses_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    cases = {
        "exists: --force replaces it": ["--out", str(tmp_path)],
        "--steps must be 1 or more": ["--out", str(tmp_path / "new"), "--steps", "0"],
    }
    for message, options in cases.items():
        command = [sys.executable, str(SCRIPT), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.slow
def test_training_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / name), "--steps", "3"]
        subprocess.run(command, check=True, capture_output=True)
    for path in (tmp_path / "a").iterdir():
        if "report" not in path.name:
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

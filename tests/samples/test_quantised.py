"""The sample in few bits, on held-out text: what the thresholds of each scheme promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.liquidc.test_cli import call

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "tiny-liquid"
WINDOWS = 64
"""Of 256 tokens, an eighth of which `verify` takes unless it is told."""
pytestmark = pytest.mark.slow


def build(directory: Path, scheme: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the compile measured in the interpreter, and `verify` against PyTorch."""
    engine = directory / "engine"
    text = ("--calibration", ROOT / "samples" / "corpus.txt") if "gptq" in scheme else ()
    made = call("compile", SAMPLE, "-o", engine, "--quantize", scheme, *text, "--json")
    assert made.exit_code == 0, made.stderr
    done = call("verify", engine, "--windows", WINDOWS, "--prompts", 1, "--json")
    return json.loads(made.stdout), json.loads(done.stdout)


def test_eight_bits(tmp_path: Path) -> None:
    _, told = build(tmp_path, "int8{method=gptq}")
    assert told["passed"], told["failures"]
    assert abs(told["bits_per_byte"] / told["bits_per_byte_reference"] - 1) <= 0.002
    assert told["top1_agreement"] >= 0.99
    assert told["gate_flips"] / told["gate_decisions"] <= 0.003


def test_four_bits_by_calibration_are_better_than_by_rounding(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    free, told = build(tmp_path / "a", "int4{method=gptq}")
    rounded_free, rounded = build(tmp_path / "b", "int4")
    assert told["passed"], told["failures"]
    assert told["bits_per_byte"] <= told["bits_per_byte_reference"] * 1.02
    assert told["top1_agreement"] >= 0.95
    assert told["gate_flips"] / told["gate_decisions"] <= 0.02
    for key in ("kl_nats", "gate_flips"):
        assert told[key] < rounded[key]
        assert free["fidelity"][key] < rounded_free["fidelity"][key]
    assert told["top1_agreement"] > rounded["top1_agreement"]
    assert free["fidelity"]["bits_per_byte"] < rounded_free["fidelity"]["bits_per_byte"]

"""What the bench times, and what it says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.suite.__main__ import FEW_BITS, OURS, PEERS, judged
from bench.suite.cases import BOUNDS, CASES, LEVELS, Case, applies, forces, rows

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = [*OURS, *PEERS, *FEW_BITS]


@pytest.mark.parametrize(("level", "on"), [("100 %", 8), ("75 %", 6), ("50 %", 4), ("0 %", 0)])
def test_a_level_forces_its_share_of_the_gates(level: str, on: int) -> None:
    for force in forces(level, 8, 3):
        assert (force.count(1), force.count(-1)) == (on, 8 - on)


def test_patterns_change_from_token_to_token() -> None:
    first, second, third = forces("alternating", 4, 3)
    assert first == [-one for one in second] == third
    assert len({tuple(force) for force in forces("random", 8, 9)}) > 5
    assert forces("random", 8, 9) == forces("random", 8, 9)
    assert forces("learnt", 2, 1) == [[0, 0]]


def test_every_row_has_its_reference_in_every_case() -> None:
    every = rows(ALL)
    assert {row.contender for row in every} == set(ALL)
    for case in CASES:
        names = {row.name for row in every if applies(row, case)}
        wanted = {f"{row.reference}, 100 %" for row in every if applies(row, case)}
        assert wanted <= names
    assert {f"liquidc, {level}" for level in LEVELS} <= {
        row.name for row in every if applies(row, CASES[0])
    }


def test_every_bound_is_of_a_row_that_is_measured() -> None:
    every = rows(ALL)
    for bound in BOUNDS:
        held = [case for case in CASES if bound.case(case)]
        assert held
        for case in held:
            names = {row.name for row in every if applies(row, case)}
            assert bound.row in names or "llama" in bound.row


def test_medians_are_judged() -> None:
    told = [{"row": "liquidc, 50 %", "ratio": 0.55}, {"row": "OpenVINO, 100 %", "ratio": 1.2}]
    found = judged("dense", "drop", Case("decode", 16), told)
    assert [(b["row"], b["kept"]) for b in found] == [
        ("liquidc, 50 %", False),
        ("OpenVINO, 100 %", True),
    ]
    assert judged("moe", "drop", Case("prefill", 128), told) == []


@pytest.mark.slow
def test_the_sample_beside_pytorch(tmp_path: Path) -> None:
    """Peers agree with us before they are timed; the figures are whole."""
    out = tmp_path / "suite.json"
    options = ["--shape", "sample", "--case", "0", "--case", "4", "--turns", "3", "--json", out]
    command = [sys.executable, "-m", "bench.suite", *options, "--only", "PyTorch eager"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=environment)
    (found,) = json.loads(out.read_text())["found"]
    assert [case["kind"] for case in found["cases"]] == ["decode", "prefill"]
    decode = {row["row"]: row for row in found["cases"][0]["rows"]}
    assert decode["liquidc, 100 %"]["ratio"] == 1.0
    assert decode["liquidc, 0 %"]["bytes_needed"] < decode["liquidc, 100 %"]["bytes_needed"]
    assert "PyTorch eager, 50 %" in decode
    assert found["memory"]["liquidc"]["loaded_bytes"] > 10**7
    assert found["missing"] == {}

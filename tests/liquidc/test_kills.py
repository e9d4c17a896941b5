"""Outputs whose writers are killed at any moment: the next run ends with the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mode", "kind", "kills"),
    [
        ("few", "engine", 200),
        ("few", "checkpoint", 80),
        pytest.param("all", "engine", 700, marks=pytest.mark.slow),
        pytest.param("all", "checkpoint", 300, marks=pytest.mark.slow),
        pytest.param("chains", "engine", 500, marks=pytest.mark.slow),
        pytest.param("chains", "checkpoint", 300, marks=pytest.mark.slow),
    ],
)
def test_a_kill_before_any_call_wedges_nothing(
    mode: str, kind: str, kills: int, tmp_path: Path
) -> None:
    assert count_kills(mode, kind, tmp_path) >= kills


@pytest.mark.slow
def test_compiles_that_are_killed_at_random(model_directory: Path, tmp_path: Path) -> None:
    assert count_kills("compiles", str(model_directory), tmp_path) >= 200


def count_kills(mode: str, kind: str, place: Path) -> int:
    """Run `kills.py`, which fails if what comes after a kill is wrong."""
    command = [sys.executable, "-m", "tests.liquidc.kills", mode, kind, str(place)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads don't outlive a fork
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(place.iterdir()) == []
    return int(done.stdout)

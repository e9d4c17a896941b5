"""Outputs whose writers are killed at any moment: the next run ends with the same bytes."""

from __future__ import annotations

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
    command = [sys.executable, "-m", "tests.liquidc.kills", mode, kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= kills
    assert list(tmp_path.iterdir()) == []

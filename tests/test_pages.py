"""docs/transformers.md and docs/liquify.md: their commands and Python run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.liquidc.conftest import CONFIG, save_model
from tests.test_readme import ROOT, run


def code(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(page: str, place: Path) -> list[str]:
    """Those of a page, one after the other; what they print."""
    lines = [shlex.split(line) for block in code(page, "sh") for line in block.splitlines()]
    assert all(words[0] == "liquidc" for words in lines)
    return [run(place, [sys.executable, "-m", "liquidc.cli.main", *w[1:]]) for w in lines]


def test_transformers(tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (script,) = code("transformers.md", "python")
    assert run(tmp_path, [sys.executable, "-c", script]).startswith("The with statement")
    run(tmp_path, [sys.executable, "-m", "liquidc.cli.main", "compile", "build/saved", "-o", "e"])
    (told,) = run_commands("transformers.md", tmp_path)
    assert "of bfloat16 in 1 files of weights" in told


def test_liquify(tmp_path: Path) -> None:
    save_model(tmp_path / "static", {**CONFIG, "num_hidden_layers": 6, "depth_gate": {}})
    (tmp_path / "text.txt").write_text((ROOT / "samples" / "corpus.txt").read_text()[:4000])
    untouched, shorter, tuned, _ = run_commands("liquify.md", tmp_path)
    assert "3 of 6 layers gated" in untouched
    assert "never" in shorter
    assert "at random" in tuned
    assert (tmp_path / "engine" / "manifest.json").exists()

"""The README's commands and Python run as they stand; its numbers are those of the report."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAMPLE = ROOT / "samples" / "tiny-liquid"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sample where the README expects it, and a sixteenth of its corpus."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "samples").mkdir()
    for path in (ROOT / "samples").iterdir():
        (directory / "samples" / path.name).symlink_to(path)
    corpus = directory / "samples" / "corpus.txt"
    text = corpus.read_text(encoding="utf-8")
    corpus.unlink()
    corpus.write_text(text[: len(text) // 16], encoding="utf-8")
    (directory / "build").mkdir()
    return directory


def run(place: Path, command: list[str]) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_commands(place: Path) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("liquidc ")
    ]
    assert {words[1] for words in commands} >= {"compile", "run", "verify", "bench", "inspect"}
    outputs = [run(place, [sys.executable, "-m", "liquidc.cli.main", *w[1:]]) for w in commands]
    assert "passed" in next(o for o, w in zip(outputs, commands, strict=True) if w[1] == "verify")


@pytest.fixture(scope="module")
def printed(place: Path) -> str:
    """What the Python block prints; it leaves an engine in build/from-python."""
    (code,) = blocks("python")
    return run(place, [sys.executable, "-c", code])


def test_python(printed: str) -> None:
    assert len(printed.splitlines()) >= 32


@pytest.mark.usefixtures("printed")
def test_without_liquidc(place: Path) -> None:
    """The sample script writes what the engine itself writes, with liquidc out of reach."""
    engine = place / "build" / "from-python"
    script = ROOT / "samples" / "run_with_onnxruntime.py"
    blocked = (
        "import runpy, sys; sys.modules['liquidc'] = None; sys.path = [p for p in sys.path if p];"
        f"sys.argv = ['x', {str(engine)!r}, 'The with statement'];"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    last = run(place, [sys.executable, "-c", blocked]).split("layers\n")[-1].rstrip("\n")
    command = f"run {engine} --prompt 'The with statement' --max-new-tokens 32 --json"
    told = json.loads(run(place, [sys.executable, "-m", "liquidc.cli.main", *shlex.split(command)]))
    assert last == told["text"]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_numbers_are_those_of_the_report() -> None:
    report = json.loads((SAMPLE / "training_report.json").read_text())
    for key in ("bits_per_byte", "bits_per_byte_trigram", "bits_per_byte_fixed_set"):
        assert f"{report[key]:.3f}" in README

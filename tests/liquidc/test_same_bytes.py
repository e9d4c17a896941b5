"""The same inputs give the same bytes, whatever threads, locale, zone, hash seed or directory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from liquidc.heldout import Scorer
from liquidc.lossy import _Comparing  # pyright: ignore[reportPrivateUsage]
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "tiny-liquid"
CORPUS = ROOT / "samples" / "corpus.txt"
SURROUNDINGS = (
    {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"},
    {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8"},
    {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "99", "TZ": "America/Lima", "LC_ALL": "POSIX"},
)
MEASURED = {
    "int4": ("--quantize", "int4"),
    "mixed": ("--quantize", "mixed", "--target-size", "9MB"),
    "gptq": ("--quantize", "int4{method=gptq}", "--calibration", CORPUS),
    "cache": ("--quantize-cache", "int8", "--calibration", CORPUS),
    "budget": ("--profile", "PROFILE", "--specialize", "budget", "--max-kl", "0.01"),
    "prune": ("--profile", "PROFILE", "--add-pass", "prune-experts{ratio=0.25}"),
    "merge": ("--profile", "PROFILE", "--add-pass", "merge-experts{ratio=0.25}"),
    "paths": ("--profile", "PROFILE", "--target", "onnxruntime-fixed"),
}


def run(surroundings: dict[str, str], where: Path, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    command = [sys.executable, "-m", "liquidc.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def hashes(engine: Path) -> dict[str, str]:
    files = [path for path in sorted(engine.rglob("*")) if path.is_file()]
    return {
        path.relative_to(engine).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def compiled(model: Path, tmp_path: Path, *options: object) -> Iterator[dict[str, str]]:
    """The files of engines that were compiled in other surroundings, each from another place."""
    for number, surroundings in enumerate(SURROUNDINGS):
        where = tmp_path / f"at {number}"
        where.mkdir()
        run(surroundings, where, "compile", model, "-o", f"{'deeper/' * number}engine", *options)
        yield hashes(where / f"{'deeper/' * number}engine")


def test_a_measured_compile(model_directory: Path, tmp_path: Path) -> None:
    first, *others = compiled(model_directory, tmp_path, "--target", "null", "--quantize", "int4")
    assert first.keys() >= {"manifest.json", "report.html", "weights.bin"}
    assert all(other == first for other in others)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "sample.json"
    run({}, path.parent, "profile", SAMPLE, "--data", CORPUS, "-o", path, "--max-tokens", 4000)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_compile_of_the_sample(name: str, profile: Path, tmp_path: Path) -> None:
    """Its windows are long enough for torch to split their sums among threads."""
    options = [profile if word == "PROFILE" else word for word in MEASURED[name]]
    first, *others = compiled(SAMPLE, tmp_path, *options)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int4"},
        {"quantize": "mixed", "max_kl": 0.05},
        {"specialize": "budget", "max_kl": 0.05},
        {"add": ("prune-experts{keep=3}",)},
    ],
)
def test_what_is_sealed_is_computed_on_one_thread(
    options: dict[str, Any],
    model_directory: Path,
    profile_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that runs the model sees more, and the caller's number is what it was."""
    seen: list[int] = []
    decided, op = Scorer.decided, _Comparing._op  # pyright: ignore[reportPrivateUsage]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            seen.append(torch.get_num_threads())
            return function(*given, **named)

        return call

    monkeypatch.setattr(Scorer, "decided", watched(decided))
    monkeypatch.setattr(_Comparing, "_op", watched(op))
    if options.keys() & {"specialize", "add"}:
        options = {**options, "profile": profile_file}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compile_model(model_directory, tmp_path / "e", CompileOptions("null", **options))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}

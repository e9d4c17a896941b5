"""What a dry run says a compile will take, beside what it took."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from liquidc.dryrun import dry_run
from liquidc.estimate import Estimate, Work, estimate
from liquidc.ir import parse_module
from liquidc.passlog import weights_in_use
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions
from tests.liquidc.test_cli import ok


def files(engine: Path) -> int:
    return sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": "int4{block=16}"},
        {"target": "onnxruntime"},
        {"profile": True, "add": ("prune-experts{keep=2}",)},
        {"profile": True, "target": "onnxruntime-fixed"},
    ],
)
def test_bytes_are_what_is_written(
    options: dict[str, Any], model_directory: Path, profile_file: Path, tmp_path: Path
) -> None:
    """Those of the weights exactly, those of all files nearly."""
    given = {"target": "null", **options}
    given |= {"profile": profile_file} if "profile" in given else {}
    asked = CompileOptions(**given)
    told = dry_run(model_directory, tmp_path / "engine", asked).estimate
    assert list(tmp_path.iterdir()) == []
    compiled = compile_model(model_directory, tmp_path / "engine", asked)
    if given["target"] == "null":
        module = parse_module((compiled.engine / "module.ir").read_text())
        assert told.weights_bytes == weights_in_use(module)
    assert not told.at_most
    assert 0.7 < told.engine_bytes / files(compiled.engine) < 1.4


def test_what_is_chosen_by_measuring_is_a_bound(model_directory: Path, tmp_path: Path) -> None:
    options = {"target": "null", "quantize": "mixed{block=16}"}
    whole = dry_run(model_directory, None, CompileOptions("null")).estimate
    budget = dry_run(model_directory, None, CompileOptions(**options, max_kl=0.1)).estimate
    assert budget.at_most
    assert budget.weights_bytes == whole.weights_bytes
    sized = dry_run(model_directory, None, CompileOptions(**options, target_size=120_000)).estimate
    assert sized.weights_bytes == 120_000 < whole.weights_bytes
    assert sized.seconds > whole.seconds
    assert sized.peak_memory_bytes >= whole.peak_memory_bytes


def test_counts_become_amounts() -> None:
    """More work takes more time and memory, and none of them bytes of the engine."""
    text = """module @m

weight @w : f32[4096, 1024] = tensor("w", f32[4096, 1024])

func @prefill(%x: f32[B, 1024]) -> (y: f32[B, 4096]) {
  %w = weight weight="w" : f32[4096, 1024]
  %y = linear %x, %w : f32[B, 4096]
  return %y
}
"""
    module = parse_module(text)
    idle = estimate(module, module, Work(), checkpoint=2**24, copied=100)
    busy = estimate(
        module, module, Work(tokens=10**6, calls=1, copies=40), checkpoint=2**24, copied=100
    )
    assert idle.weights_bytes == busy.weights_bytes == 2**24
    assert idle.engine_bytes == busy.engine_bytes > 2**24 + 100
    assert busy.seconds - idle.seconds > 10**6 * 2**23 / 1e12
    assert busy.peak_memory_bytes - idle.peak_memory_bytes > 30 * 2**24
    assert Work(1, 2, 3, 4) + Work(5, 6, 1, 9) == Work(6, 8, 3, 9)


def test_it_is_told_as_an_estimate(model_directory: Path) -> None:
    told = ok("compile", model_directory, "--target", "null", "--dry-run")["estimate"]
    assert told.keys() == {field.name for field in fields(Estimate)}
    assert "torch" in told["measured_on"]

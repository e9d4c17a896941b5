"""Stored weights against the checkpoint: what a damaged engine can't hide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liquidc.backends.base import StoredWeight
from liquidc.backends.registry import get_backend
from liquidc.engine import read_manifest
from liquidc.frontend.checkpoint import CheckpointSource
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions
from liquidc.weight_check import check_weights

FORMATS = {"": (), "int8": ("int8",), "int4": ("int4", "int8"), "fp8": ("e4m3",)}
SCHEMES = (
    "",
    "int8{block=16}",
    "int4{block=16}",
    "int4{block=16,symmetric=false}",
    "fp8{block=16}",
)


def stored(engine: Path) -> dict[str, StoredWeight]:
    manifest = read_manifest(engine)
    return get_backend(manifest.target["name"]).stored_weights(engine, manifest)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_holds_the_checkpoint(
    scheme: str, target: str, model_directory: Path, tmp_path: Path
) -> None:
    options = CompileOptions(target=target, quantize=scheme)
    engine = compile_model(model_directory, tmp_path / "engine", options).engine
    source = CheckpointSource(model_directory)
    weights = stored(engine)
    found = check_weights(weights, source)
    assert all(finding.fits for finding in found)
    formats = {finding.format for finding in found}
    assert formats == {"f32", *FORMATS[scheme.partition("{")[0]]}
    codes = [finding for finding in found if finding.format != "f32"]
    assert all(finding.error > 0 for finding in codes)
    for finding in (found[0], *codes[:2]):
        for change in CHANGES:
            weight = weights[finding.name]
            rows = weight.expr.sizes[0]
            changed = change(weight.read(0, rows))
            if torch.equal(changed, weight.read(0, rows)):
                continue
            wrong = replace(weight, read=lambda a, b, t=changed: t[a:b])
            told = check_weights({**weights, finding.name: wrong}, source)
            assert [f.name for f in told if not f.fits] == [finding.name], change.__name__


def zeroed(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rows in another order."""
    return x.roll(1, 0)


def swapped(x: torch.Tensor) -> torch.Tensor:
    """The low code where the high one was, and so on, or neighbours exchanged."""
    return x.flip(-1)


CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (zeroed, turned, swapped)


def test_scales_of_a_cache_are_positive_and_finite(model_directory: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(str([i % 50 for i in range(512)]))
    options = CompileOptions(quantize_cache="int8", calibration=ids)
    engine = compile_model(model_directory, tmp_path / "engine", options).engine
    source, weights = CheckpointSource(model_directory), stored(engine)
    scales = [f for f in check_weights(weights, source) if f.format == "scale"]
    assert len(scales) == 8
    assert all(finding.fits for finding in scales)
    name = scales[3].name
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        changed = weights[name].read(0, weights[name].expr.sizes[0]).clone()
        changed.view(-1)[2] = bad
        wrong = replace(weights[name], read=lambda a, b, t=changed: t[a:b])
        told = check_weights({**weights, name: wrong}, source)
        assert [f.name for f in told if not f.fits] == [name]

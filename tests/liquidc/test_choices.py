"""Lowerings that a compile asks for: what the engine then says, holds, proves and computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import liquidc
from liquidc.backends.registry import get_backend
from liquidc.engine import read_manifest
from liquidc.errors import InputError
from liquidc.frontend.checkpoint import CheckpointSource
from liquidc.pipeline import Compiled, compile_model
from liquidc.plan import CompileOptions, make_plan
from liquidc.trace_proof import prove
from liquidc.weight_check import check_weights

SCHEMES = ("int8{block=16}", "int4{block=16}", "int4{block=16,symmetric=false}")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def compiled(model: Path, output: Path, **options: object) -> Compiled:
    return compile_model(model, output, replace(CompileOptions(), **options))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("choice", "readers"),
    [("portable_weights", ["DequantizeLinear"]), ("fused_experts", ["MatMulNBits", "QMoE"])],
)
def test_an_engine_holds_the_checkpoint(
    choice: str, readers: list[str], scheme: str, model_directory: Path, tmp_path: Path
) -> None:
    made = compiled(model_directory, tmp_path / "engine", quantize=scheme, **{choice: True})
    assert made.manifest.artifact["codes_read_by"] == readers
    manifest = read_manifest(made.engine)
    stored = get_backend("onnxruntime").stored_weights(made.engine, manifest)
    found = check_weights(stored, CheckpointSource(model_directory))
    assert all(finding.fits for finding in found)
    assert {finding.format for finding in found} >= {scheme[:4], "f32"}
    (name,) = [finding.name for finding in found if finding.format == scheme[:4]][:1]
    weight = stored[name]
    wrong = replace(weight, read=lambda a, b: weight.read(a, b) ^ 128)
    told = check_weights({**stored, name: wrong}, CheckpointSource(model_directory))
    assert [finding.name for finding in told if not finding.fits] == [name]


def test_portable_weights_without_control_flow(model_directory: Path, tmp_path: Path) -> None:
    options = {"target": "onnxruntime-fixed", "quantize": "int8{block=16}"}
    made = compiled(model_directory, tmp_path / "engine", portable_weights=True, **options)
    assert made.manifest.artifact["codes_read_by"] == ["DequantizeLinear"]
    usual = compiled(model_directory, tmp_path / "usual", **options)
    a, b = (liquidc.load(x.engine).logits(IDS) for x in (made, usual))
    assert abs(a - b).max() < 0.05 * abs(b).max()


def test_the_proof_says_what_it_can_t_show(model_directory: Path, tmp_path: Path) -> None:
    options = {"quantize": "int8{block=16}", "fused_experts": True}
    engine = liquidc.load(compiled(model_directory, tmp_path / "engine", **options).engine)
    proof = prove(engine, [IDS], 4)
    layers = [info.layer for info in engine.manifest.model.experts]
    assert proof.holds
    assert proof.experts_fused == frozenset(layers)
    assert proof.experts_traced == {}
    assert proof.report()["experts_not_shown_layers"] == layers
    assert proof.report()["experts_traced_layers"] == []
    assert not replace(proof, experts_fused=frozenset()).holds


@pytest.mark.parametrize("choice", ["portable_weights", "fused_experts"])
def test_a_target_without_it_says_so(choice: str) -> None:
    flag = f"--{choice.replace('_', '-')}"
    with pytest.raises(InputError, match=f"the target null has no {flag}"):
        make_plan(replace(CompileOptions(target="null"), **{choice: True}))

"""Calibration: which tokens count, what is stored, what falls back and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liquidc.calibrated import CalibratedSource
from liquidc.errors import InputError
from liquidc.ir import Module, parse_module
from liquidc.ir.interpreter import Interpreter, first_call
from liquidc.ir.quantised import Codes
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import materialize
from liquidc.passes.base import PassContext
from liquidc.passes.calibrate import LEAST
from liquidc.passes.gptq import gptq, inverse_factor
from liquidc.passes.quantize import Quantize
from liquidc.passes.stream import Calibration

TEXT = """
module @m
weight @embed : f32[64, 32] = tensor("embed", f32[64, 32])
weight @in : f32[16, 32] = tensor("in", f32[16, 32])
weight @gated : f32[32, 32] = tensor("gated", f32[32, 32])
weight @gate_up : f32[4, 32, 32] = tensor("gate_up", f32[4, 32, 32])
weight @down : f32[4, 32, 16] = tensor("down", f32[4, 32, 16])
weight @other : f32[16, 32] = tensor("other", f32[16, 32])
func @prefill(%input_ids: i64[B, T], %lengths: i64[B]) -> (y: f32[B, T, 32], z: f32[B, T, 16]) {
  %table = weight weight="embed" : f32[64, 32]
  %x = embed %input_ids, %table : f32[B, T, 32]
  %half = constant value=32 : i64[]
  %mask = lt %input_ids, %half : bool[B, T]
  %some = any %mask, dims=[0, 1], keep=false : bool[]
  %y = if %some, label="layer0" : f32[B, T, 32] {
    %w = weight weight="gated" : f32[32, 32]
    %h = linear %x, %w : f32[B, T, 32]
    %four = constant value=4 : i64[]
    %e = minimum %input_ids, %four : i64[B, T]
    %index = reshape %e, shape=["B", "T", 1] : i64[B, T, 1]
    %one = constant value=1.0 : f32[]
    %weights = broadcast %one, shape=["B", "T", 1] : f32[B, T, 1]
    %gu = weight weight="gate_up" : f32[4, 32, 32]
    %d = weight weight="down" : f32[4, 32, 16]
    %out = grouped_experts %h, %index, %weights, %gu, %d, apply="output" : f32[B, T, 32]
    yield %out
  } else {
    yield %x
  }
  %v = weight weight="in" : f32[16, 32]
  %z = linear %y, %v : f32[B, T, 16]
  return %y, %z
}
func @decode(%input_ids: i64[B, T], %lengths: i64[B]) -> (z: f32[B, T, 16]) {
  %table = weight weight="embed" : f32[64, 32]
  %x = embed %input_ids, %table : f32[B, T, 32]
  %v = weight weight="other" : f32[16, 32]
  %z = linear %x, %v : f32[B, T, 16]
  return %z
}
"""
IDS = [[(7 * i + 3 * row) % 64 if i % 3 else i % 5 for i in range(40)] for row in range(11)]


class Source:
    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(*weight.sizes, generator=made)
            for name, weight in parse_module(TEXT).weights.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


def run(directory: Path, **options: object) -> tuple[Module, Statistics, CalibratedSource]:
    module, statistics = parse_module(TEXT), Statistics()
    source = CalibratedSource(Source(), directory / "calibrated")
    calibration = Calibration(IDS, "abc", source, source, lambda *_: None)
    chosen = Quantize(scheme="int4", head="same", method="gptq", **options)  # type: ignore[arg-type]
    chosen.run(module, statistics, PassContext(None, source, calibration=calibration))
    return module, statistics, source


def entry(statistics: Statistics, name: str) -> dict[str, object]:
    return statistics.facts["quantize"]["weights"][name]


def test_only_tokens_that_run_the_layer_and_use_the_expert_count(tmp_path: Path) -> None:
    _, statistics, _ = run(tmp_path)
    ids = [i for row in IDS for i in row]
    ran = [i for i in ids if i < 32]
    assert entry(statistics, "gated")["tokens"] == [len(ran)]
    used = [sum(i == expert for i in ran) for expert in range(4)]
    assert entry(statistics, "gate_up")["tokens"] == used
    assert entry(statistics, "in")["tokens"] == [len(ids)]
    assert statistics.facts["quantize"]["calibration"] == {"data": "abc", "tokens": len(ids)}


def test_a_starved_expert_is_rounded_to_the_nearest_and_listed(tmp_path: Path) -> None:
    module, statistics, source = run(tmp_path)
    told = entry(statistics, "down")
    starved = [e for e, tokens in enumerate(told["tokens"]) if tokens < LEAST]  # type: ignore[arg-type]
    assert starved
    assert told["nearest"] == starved
    assert told["reason"] == f"fewer than {LEAST} tokens"
    made = materialize(module.weights["down.codes"], source)
    expr = module.weights["down.codes"]
    assert isinstance(expr, Codes)
    nearest = materialize(Codes(expr.x, "int4", expr.block, True), source)
    same = [torch.equal(a, b) for a, b in zip(made, nearest, strict=True)]
    assert [e for e, equal in enumerate(same) if equal] == starved


def test_what_no_text_reaches_is_rounded_to_the_nearest_and_listed(tmp_path: Path) -> None:
    module, statistics, _ = run(tmp_path)
    assert entry(statistics, "other") == {
        "scheme": "int4",
        "block": 32,
        "symmetric": True,
        "bytes": 16 * (16 + 4),
        "bytes_float": 16 * 32 * 4,
        "method": "nearest",
        "tokens": [],
        "nearest": [0],
        "reason": "no text reaches it",
    }
    assert '"gptq"' not in str(module.weights["other.codes"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_is_calibrated_on_what_rounded_layers_before_it_give(
    tmp_path: Path, symmetric: bool
) -> None:
    module, _, source = run(tmp_path, symmetric=symmetric)
    # The input of the last product, from a run of the finished module.
    inputs = first_call(module.functions["prefill"].args, *IDS)
    y = Interpreter(module, source).run("prefill", inputs)["y"].flatten(0, 1).double()
    codes = module.weights["in.codes"]
    assert isinstance(codes, Codes)
    grid = Quantize("int4", symmetric=symmetric)._grid("int4", 32)  # pyright: ignore[reportPrivateUsage]
    wanted = gptq(source.read_rows("in", 0, 16), inverse_factor(y.T @ y), grid)
    made = materialize(codes, source)
    assert torch.equal(made & 15, wanted.codes[..., 0::2])
    assert torch.equal(made >> 4, wanted.codes[..., 1::2])


def test_results_do_not_depend_on_threads_or_on_how_windows_are_grouped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    threads = torch.get_num_threads()
    module, _, source = run(first)
    torch.set_num_threads(threads % 2 + 1)
    try:
        other, _, again = run(second)
    finally:
        torch.set_num_threads(threads)
    for name, expr in module.weights.items():
        assert torch.equal(materialize(expr, source), materialize(other.weights[name], again))


def test_without_text_or_the_codes_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gptq calibrates on text: give it with --calibration"):
        Quantize(scheme="int4", method="gptq").run(parse_module(TEXT), Statistics())
    module, _, _ = run(tmp_path)
    (tmp_path / "new").mkdir()
    fresh = CalibratedSource(Source(), tmp_path / "new" / "calibrated")
    with pytest.raises(InputError, match="calibrated codes are not kept; compile from the model"):
        materialize(module.weights["gated.codes"], fresh)
    with pytest.raises(InputError, match="method is nearest, gptq, not 'awq'"):
        Quantize(method="awq")


def test_as_many_windows_are_run_as_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widest = 2 * 4 * 32 * 40  # two values of 32 floats for the 40 tokens of a window
    monkeypatch.setattr("liquidc.passes.stream.ACTIVATIONS", 5 * widest)
    _, statistics, _ = run(tmp_path)
    assert statistics.facts["quantize"]["calibration"]["tokens"] == 5 * 40
    monkeypatch.setattr("liquidc.passes.stream.ACTIVATIONS", 3 * widest)
    with pytest.raises(InputError, match="to calibrate on 4 windows of 40 tokens takes"):
        run(tmp_path)

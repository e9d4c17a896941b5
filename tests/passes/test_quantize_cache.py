"""quantize-cache: which tokens set the scales, what is told, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import Module, parse_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.ir.types import TensorType
from liquidc.passes.base import PassContext
from liquidc.passes.quantize_cache import HEADROOM, LEAST, QuantizeCache
from liquidc.passes.stream import Calibration

TEXT = """
module @m
weight @table : f32[64, 8] = tensor("table", f32[64, 8])
func @prefill(%input_ids: i64[B, T], %lengths: i64[B], %gate_force: i8[1], %kv_len: i64[B],
  %past.0.key: f32[B, 2, S, 4], %past.0.value: f32[B, 2, S, 4],
  %past.1.key: f32[B, 2, S, 4], %past.1.value: f32[B, 2, S, 4])
  -> (y: f32[B, T, 2, 4], z: f32[B, T, 2, 4], present.0.key: f32[B, 2, S, 4],
  present.0.value: f32[B, 2, S, 4], present.1.key: f32[B, 2, S, 4],
  present.1.value: f32[B, 2, S, 4]) {
  %table = weight weight="table" : f32[64, 8]
  %x = embed %input_ids, %table : f32[B, T, 8]
  %k = reshape %x, shape=["B", "T", 2, 4] : f32[B, T, 2, 4]
  %v = neg %k : f32[B, T, 2, 4]
  %all = ge %input_ids, %zero64 : bool[B, T]
  %some = lt %input_ids, %few : bool[B, T]
  %forced = gt %force, %zero8 : bool[1, 1]
  %wide = broadcast %forced, shape=["B", "T"] : bool[B, T]
  %mask = or %some, %wide : bool[B, T]
  %any = any %mask, dims=[0, 1], keep=false : bool[]
  %one = cast %all, to=i64 : i64[B, T]
  %limit = cumsum %one, dim=1 : i64[B, T]
  %k0 = append %past.0.key, %k, %kv_len, %all : f32[B, 2, S, 4]
  %v0 = append %past.0.value, %v, %kv_len, %all : f32[B, 2, S, 4]
  %y = attend %k, %k0, %v0, %limit, scale=0.5 : f32[B, T, 2, 4]
  %z, %k1, %v1 = if %any, label="layer1" : f32[B, T, 2, 4], f32[B, 2, S, 4], f32[B, 2, S, 4] {
    %kn = append %past.1.key, %k, %kv_len, %mask : f32[B, 2, S, 4]
    %vn = append %past.1.value, %v, %kv_len, %mask : f32[B, 2, S, 4]
    %w = attend %k, %kn, %vn, %limit, scale=0.5 : f32[B, T, 2, 4]
    yield %w, %kn, %vn
  } else {
    yield %k, %past.1.key, %past.1.value
  }
  return %y, %z, %k0, %v0, %k1, %v1
}
""".replace(
    "  %x = embed",
    """  %zero64 = constant value=[0] : i64[]
  %few = constant value=[4] : i64[]
  %zero8 = constant value=[0] : i8[]
  %force = reshape %gate_force, shape=[1, 1] : i8[1, 1]
  %x = embed""",
)
IDS = [[(7 * i + 3 * row) % 32 for i in range(16)] for row in range(5)]


@dataclass
class Store:
    """A table whose column 3 is zero and in which token 40, that no text has, is large."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        table[:, 3] = 0
        table[40] = 100.0
        self.tensors["table"] = table

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]

    def append(self, name: str, type: TensorType, rows: torch.Tensor) -> None:
        assert tuple(rows.shape) == type.shape
        self.tensors[name] = rows

    def scale(self, name: str) -> torch.Tensor:
        return self.tensors[f"calibrated/{name}.scale"]


def run(text: str = TEXT, ids: list[list[int]] = IDS) -> tuple[Module, Statistics, Store]:
    module, statistics, store = parse_module(text), Statistics(), Store()
    verify(module)
    calibration = Calibration(ids, "abc", store, store, lambda *_: None)
    QuantizeCache().run(module, statistics, PassContext(calibration=calibration))
    verify(module)
    return module, statistics, store


def reach(ids: list[int], store: Store) -> torch.Tensor:
    """The largest size of each channel over these tokens."""
    return store.tensors["table"][ids].abs().amax(0).reshape(2, 4)


def test_the_scales_reach_beyond_the_largest_that_the_text_writes() -> None:
    _, statistics, store = run()
    seen = sorted({i for row in IDS for i in row})
    size = reach(seen, store)
    size[0, 3] = size[0].max()  # a channel that is always 0
    for name in ("past.0.key", "past.0.value"):
        torch.testing.assert_close(store.scale(name), size * HEADROOM / 127)
    assert statistics.facts["quantize-cache"] == {
        "scheme": "int8",
        "caches": 4,
        "starved": [],
        "calibration": {"data": "abc", "tokens": 80},
    }


def test_layers_that_few_tokens_reach_are_calibrated_with_all_gates_forced_to_run() -> None:
    natural = {i for row in IDS for i in row if i < 4}
    assert sum(i < 4 for row in IDS for i in row) < LEAST
    _, statistics, store = run()
    assert torch.equal(store.scale("past.1.key"), store.scale("past.0.key"))
    assert statistics.facts["quantize-cache"]["starved"] == []
    unforced = TEXT.replace("%mask = or %some, %wide", "%mask = and %some, %all")
    _, statistics, store = run(unforced)
    assert statistics.facts["quantize-cache"]["starved"] == ["past.1.key", "past.1.value"]
    size = reach(sorted(natural), store)
    size[0, 3] = size[0].max()
    torch.testing.assert_close(store.scale("past.1.key"), size * HEADROOM / 127)


def test_a_cache_that_nothing_reaches_has_scales_all_the_same() -> None:
    nobody = TEXT.replace("%mask = or %some, %wide", "%mask = and %some, %far").replace(
        "  %wide = ", "  %far = gt %input_ids, %few : bool[B, T]\n  %wide = "
    )
    _, statistics, store = run(nobody)
    assert statistics.facts["quantize-cache"]["starved"] == ["past.1.key", "past.1.value"]
    assert (store.scale("past.1.key") == HEADROOM / 127).all()


def test_results_are_near_and_what_is_too_large_is_cut_off() -> None:
    module, _, store = run()
    old, new = Interpreter(parse_module(TEXT), store), Interpreter(module, store)
    inputs = {
        "input_ids": torch.tensor(IDS[:2]),
        "lengths": torch.tensor([16, 16]),
        "gate_force": torch.tensor([1], dtype=torch.int8),
        "kv_len": torch.tensor([0, 3]),
    }
    floats = {
        f"past.{n}.{part}": torch.zeros(2, 2, 32, 4) for n in "01" for part in ("key", "value")
    }
    codes = {name: x.to(torch.int8) for name, x in floats.items()}
    wanted, got = old.run("prefill", inputs | floats), new.run("prefill", inputs | codes)
    # Keys and values move by half a step; so do scores, and attention weights by a share of that.
    step = float(store.scale("past.0.key").max())
    assert float((wanted["y"] - got["y"]).abs().max()) < 8 * step
    assert got["present.0.key"].dtype == torch.int8
    scale = store.scale("past.0.key")
    kept = got["present.0.key"][0, :, :16] * scale[:, None]
    assert float((kept - wanted["present.0.key"][0, :, :16]).abs().max()) <= 0.5001 * step
    inputs["input_ids"] = torch.full((2, 16), 40)
    far = new.run("prefill", inputs | codes)["present.0.key"][0, :, :16]
    assert far.amax() == 127
    assert float((far * scale[:, None]).max()) < 100


def test_a_second_run_changes_nothing() -> None:
    module, _, store = run()
    calibration = Calibration(IDS, "abc", store, store, lambda *_: None)
    statistics = Statistics()
    again = module.clone()
    QuantizeCache().run(again, statistics, PassContext(calibration=calibration))
    assert str(again.functions["prefill"].body.ops) == str(module.functions["prefill"].body.ops)
    assert statistics.facts["quantize-cache"]["caches"] == 0


def test_refusals() -> None:
    with pytest.raises(InputError, match="a cache's scheme is int8, not 'int2'"):
        QuantizeCache(scheme="int2")
    with pytest.raises(InputError, match="calibrates on text: give it with --calibration FILE"):
        QuantizeCache().run(parse_module(TEXT), Statistics())
    other = TEXT.replace("%v = neg %k", "%old = neg %past.0.key : f32[B, 2, S, 4]\n  %v = neg %k")
    with pytest.raises(InputError, match=r"quantize-cache: neg uses the cache %past\.0\.key"):
        run(other)
    large = Store()
    large.tensors["table"][1] = float("inf")
    calibration = Calibration(IDS, "abc", large, large, lambda *_: None)
    with pytest.raises(InputError, match="not finite"):
        QuantizeCache().run(parse_module(TEXT), Statistics(), PassContext(calibration=calibration))

"""`quantize`: which weights become codes, which stay, and what the user is told."""

from __future__ import annotations

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.quantised import round_to_nearest
from liquidc.passes.quantize import Quantize
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

TEXT = """
module @m
weight @w : f32[8, 64] = tensor("w", f32[8, 64])
weight @gate : f32[1, 64] = tensor("gate", f32[1, 64])
weight @head : f32[32, 64] = tensor("head", f32[32, 64])
func @prefill(%x: f32[B, T, 64], %c: bool[], %valid: bool[B, T], %positions: i64[B, T],
    %force: i8[], %bias: f32[B], %floor: i64[B], %executed: i64[B, T])
    -> (y: f32[B, T, 8], logits: f32[B, T, 32], gates: bool[B, T]) {
  %g = weight weight="gate" : f32[1, 64]
  %score = linear %x, %g : f32[B, T, 1]
  %flat = reshape %score, shape=["B", "T"] : f32[B, T]
  %m, %p = depth_gate %flat, %valid, %positions, %force, %bias, %floor, %executed,
      layer=0, gate=0, remaining=1, threshold=0.5 : bool[B, T], f32[B, T]
  %y = if %c, label="layer0" : f32[B, T, 8] {
    %w = weight weight="w" : f32[8, 64]
    %h = linear %x, %w : f32[B, T, 8]
    %silu = silu %h : f32[B, T, 8]
    yield %silu
  } else {
    %w2 = weight weight="w" : f32[8, 64]
    %h2 = linear %x, %w2 : f32[B, T, 8]
    %tanh = tanh %h2 : f32[B, T, 8]
    yield %tanh
  }
  %out = weight weight="head" : f32[32, 64]
  %logits = linear %x, %out : f32[B, T, 32]
  return %y, %logits, %m
}
"""


def test_weights_inside_branches_become_codes_and_routers_stay() -> None:
    run_pass(Quantize(scheme="int4"), TEXT).check("""
        CHECK-DAG: weight @w.codes : u8[8, 2, 16] = codes(tensor("w", f32[8, 64]), "int4", 32, true)
        CHECK-DAG: weight @w.scales : f32[8, 2] = scales(tensor("w", f32[8, 64]), "int4", 32, true)
        CHECK-DAG: weight @head.codes : u8[32, 2, 32] = codes({{.*}}, "int8", 32, true)
        CHECK: func @prefill
        CHECK: linear %x, %g
        CHECK: if %c
        CHECK: %[[C:[0-9]+]] = weight weight="w.codes" : u8[8, 2, 16]
        CHECK: %[[S:[0-9]+]] = weight weight="w.scales" : f32[8, 2]
        CHECK: %[[W:[a-z0-9_]+]] = dequantize %[[C]], %[[S]], format="int4" : f32[8, 64]
        CHECK: linear %x, %[[W]]
        CHECK: } else {
        CHECK: dequantize
        CHECK: linear
    """)


def told(step: Quantize, text: str = TEXT) -> dict[str, dict[str, object]]:
    return run_pass(step, text).statistics.facts["quantize"]


def test_what_is_told() -> None:
    facts = told(Quantize(scheme="int4"))
    assert facts["weights"]["w"] == {
        "scheme": "int4",
        "block": 32,
        "symmetric": True,
        "bytes": 8 * 32 + 8 * 2 * 4,
        "bytes_float": 8 * 64 * 4,
    }
    assert facts["kept"] == {"gate": "a router: it decides"}


@pytest.mark.parametrize(
    ("head", "scheme"), [("int8", "int8"), ("same", "int4"), ("int4", "int4"), ("float", None)]
)
def test_the_head_has_bits_of_its_own(head: str, scheme: str | None) -> None:
    facts = told(Quantize(scheme="int4", head=head))
    if scheme is None:
        assert "head" not in facts["weights"]
        assert facts["kept"]["head"] == "as asked for"
    else:
        assert facts["weights"]["head"]["scheme"] == scheme  # pyright: ignore


def test_the_head_is_never_narrower_than_the_rest() -> None:
    with pytest.raises(InputError, match="head=int4 has no more bits than int8: write head=same"):
        Quantize(scheme="int8", head="int4")


def test_zero_points_are_weights_too() -> None:
    run_pass(Quantize(scheme="int4", symmetric=False, block=16), TEXT).check("""
        CHECK-DAG: weight @w.zeros : u8[8, 2] = zeros(tensor("w", f32[8, 64]), "int4", 16, false)
        CHECK: dequantize %{{.*}}, %{{.*}}, zeros=%{{.*}}, format="int4" : f32[8, 64]
    """)


def test_a_second_run_changes_nothing() -> None:
    for scheme in ("int4", "int8", "fp8"):
        assert_idempotent(Quantize(scheme=scheme), TEXT)


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (96, 32), (48, 16), (40, None)])
def test_blocks_are_halved_until_they_fill_a_row(columns: int, block: int | None) -> None:
    text = f"""
module @m
weight @w : f32[8, {columns}] = tensor("w", f32[8, {columns}])
func @f(%x: f32[B, {columns}]) -> (y: f32[B, 8]) {{
  %w = weight weight="w" : f32[8, {columns}]
  %h = linear %x, %w : f32[B, 8]
  %y = tanh %h : f32[B, 8]
  return %y
}}
"""
    if block is None:
        refused = assert_unchanged(Quantize(scheme="int8"), text)
        reason = refused.statistics.facts["quantize"]["kept"]["w"]
        assert reason == "rows of 40 elements, no multiple of 16"
    else:
        assert told(Quantize(scheme="int8", block=128), text)["weights"]["w"]["block"] == block  # pyright: ignore


def test_options() -> None:
    for wrong in (
        {"scheme": "int3"},
        {"head": "int5"},
        {"block": 24},
        {"block": 8},
        {"scheme": "fp8", "symmetric": False},
    ):
        with pytest.raises(InputError):
            Quantize(**wrong)  # pyright: ignore


EXPERTS = """
module @m
weight @gu : f32[4, 32, 16] = tensor("gu", f32[4, 32, 16])
weight @d : f32[4, 16, 16] = tensor("d", f32[4, 16, 16])
func @f(%x: f32[B, T, 16], %i: i64[B, T, 2], %s: f32[B, T, 2]) -> (y: f32[B, T, 16]) {
  %gu = weight weight="gu" : f32[4, 32, 16]
  %d = weight weight="d" : f32[4, 16, 16]
  %y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 16]
  return %y
}
"""


class Stacks:
    """Random experts, or the same after rounding."""

    def __init__(self, format: str = "", *, symmetric: bool = True) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(shape, generator=numbers)
            for name, shape in (("gu", (4, 32, 16)), ("d", (4, 16, 16)))
        }
        for name, x in self.tensors.items():
            if format:
                codes, scales, zeros = round_to_nearest(x, format, 16, symmetric=symmetric)
                low = {"int4": 8, "int8": 128, "e4m3": 0}[format] if zeros is None else zeros
                values = codes.view(torch.float8_e4m3fn) if format == "e4m3" else codes
                low = low[..., None] if isinstance(low, torch.Tensor) else low
                self.tensors[name] = ((values.float() - low) * scales[..., None]).flatten(-2)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


@pytest.mark.parametrize(
    ("step", "rounded"),
    [
        (Quantize(scheme="int8"), Stacks("int8")),
        (Quantize(scheme="int4"), Stacks("int4")),
        (Quantize(scheme="int4", symmetric=False), Stacks("int4", symmetric=False)),
        (Quantize(scheme="fp8"), Stacks("e4m3")),
    ],
)
def test_experts_compute_with_their_rounded_weights(step: Quantize, rounded: Stacks) -> None:
    numbers = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(2, 3, 16, generator=numbers),
        "i": torch.randint(-1, 4, (2, 3, 2), generator=numbers),
        "s": torch.rand(2, 3, 2, generator=numbers),
    }
    wanted = Interpreter(parse_module(EXPERTS), rounded).run("f", inputs)["y"]
    module = run_pass(step, EXPERTS).module
    got = Interpreter(module, Stacks()).run("f", inputs)["y"]
    assert torch.equal(got, wanted)
    plain = Interpreter(parse_module(EXPERTS), Stacks()).run("f", inputs)["y"]
    assert not torch.equal(got, plain)
    assert (got - plain).norm() < 0.3 * plain.norm()


def test_int8_dynamic_rounds_what_meets_the_weights_and_rows_have_one_scale() -> None:
    run_pass(Quantize(scheme="int8-dynamic"), TEXT).check("""
        CHECK: linear %x, %g :
        CHECK: linear %x, %{{[a-z0-9_]+}}, input_block=32
        CHECK: linear %x, %{{[a-z0-9_]+}}, input_block=32
    """)
    run_pass(Quantize(scheme="int8", block=-1), TEXT).check("""
        CHECK: weight @w.codes : u8[8, 1, 64] = codes({{.*}}, "int8", 64, true)
        CHECK: weight @w.scales : f32[8, 1]
    """)
    run_pass(Quantize(scheme="int8-dynamic"), GROUPED).check("""
        CHECK: grouped_experts {{.*}}, input_block=32, inner_block=16
    """)


GROUPED = """
module @m
weight @gu : f32[4, 32, 32] = tensor("gu", f32[4, 32, 32])
weight @d : f32[4, 32, 16] = tensor("d", f32[4, 32, 16])
func @prefill(%x: f32[B, T, 32], %i: i64[B, T, 2], %s: f32[B, T, 2]) -> (y: f32[B, T, 32]) {
  %gu = weight weight="gu" : f32[4, 32, 32]
  %d = weight weight="d" : f32[4, 32, 16]
  %y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 32]
  return %y
}
"""

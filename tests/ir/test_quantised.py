"""Quantised weights: every element against the formula, any box, any block of rows, the text."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidc.errors import InputError, IRError
from liquidc.ir import parse_module, print_module
from liquidc.ir.quantised import (
    Codes,
    Quantised,
    Scales,
    Zeros,
    dequantise,
    pack,
    round_inputs,
    round_to_nearest,
    unpack,
)
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Stored, evaluate, materialize

KINDS = [
    ("int4", True),
    ("int4", False),
    ("int8", True),
    ("int8", False),
    ("e4m3", True),
]


class Source:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        assert name == "w"
        return self.tensor[start:stop]


def stored(*shape: int) -> Stored:
    return Stored("w", TensorType(DType.F32, shape))


def parts(x: torch.Tensor, format: str, block: int, symmetric: bool) -> list[torch.Tensor | None]:
    expr = stored(*x.shape)
    kinds = (Codes, Scales, Zeros) if not symmetric else (Codes, Scales)
    read = [materialize(kind(expr, format, block, symmetric), Source(x)) for kind in kinds]
    return [*read, None] if symmetric else [*read]


def by_hand(x: np.ndarray, format: str, symmetric: bool) -> np.ndarray:
    """One block, as the formulas say, in float32."""
    one = np.float32(1)
    if not symmetric:
        levels = np.float32(2 ** int(format[3:]) - 1)
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        scale = (high - low) / levels if high > low else one
        zero = np.clip(np.rint(-low / scale), 0, levels)
        return (np.clip(np.rint(x / scale) + zero, 0, levels) - zero) * scale
    largest = x[np.abs(x).argmax()]
    if format == "int4":
        scale = largest / np.float32(-8) if largest else one
        return np.clip(np.rint(x / scale), -8, 7) * scale
    scale = np.abs(largest) / np.float32(127) if largest else one
    return np.clip(np.rint(x / scale), -128, 127) * scale


@pytest.mark.parametrize(("format", "symmetric"), [k for k in KINDS if k[0] != "e4m3"])
@pytest.mark.parametrize("block", [2, 16, 32])
def test_every_element_is_as_the_formula_says(format: str, symmetric: bool, block: int) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(block))
    x[1] = 0
    x[2] = x[2].abs()
    codes, scales, zeros = parts(x, format, block, symmetric)
    assert codes is not None
    assert scales is not None
    got = dequantise(codes, scales, zeros, format).numpy()
    wanted = [by_hand(b, format, symmetric) for b in x.numpy().reshape(-1, block)]
    np.testing.assert_array_equal(got.reshape(-1, block), np.stack(wanted))
    step = scales.abs().repeat_interleave(block, -1).numpy()
    slack = 1.0 if format == "int4" and symmetric else 0.5  # 8 scales above zero are cut to 7
    assert (np.abs(got - x.numpy()) <= slack * step * (1 + 1e-6)).all()


def test_e4m3_keeps_three_bits_of_the_mantissa() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = parts(x, "e4m3", 32, True)
    assert codes is not None
    assert scales is not None
    got = dequantise(codes, scales, None, "e4m3")
    tiny = scales.repeat_interleave(32, -1) * 2**-9  # the smallest step of a subnormal
    assert ((got - x).abs() <= (x.abs() / 16).maximum(tiny / 2) * (1 + 1e-6)).all()
    assert got.abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([2, 4, 16]))
def test_any_box_holds_what_the_whole_holds(seed: int, kind: tuple[str, bool], block: int) -> None:
    rng, (format, symmetric) = random.Random(seed), kind
    x = torch.randn(3, rng.randrange(1, 6), 2 * block * rng.randrange(1, 4))
    for make in (Codes, Scales) if symmetric else (Codes, Scales, Zeros):
        expr: Quantised = make(stored(*x.shape), format, block, symmetric)
        whole = materialize(expr, Source(x))
        assert tuple(whole.shape) == expr.sizes
        box = tuple(sorted(rng.sample(range(size + 1), 2)) for size in expr.sizes)
        bounds = tuple((low, high) for low, high in box)
        read = expr.read(Source(x), bounds)
        assert torch.equal(read, whole[tuple(slice(*b) for b in bounds)])
        rows = torch.cat(list(evaluate(expr, Source(x), block_bytes=1)))
        assert torch.equal(rows, whole)


def test_packing() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack(pack(codes)), codes)
    assert pack(codes[:, :3]).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    x = torch.ones(2, 32)
    x[1, 3] = value
    with pytest.raises(InputError, match="w: a weight to quantise holds inf or NaN"):
        materialize(Codes(stored(2, 32), "int8", 32, True), Source(x))


def test_blocks_of_zeros_have_no_nan() -> None:
    for format, symmetric in KINDS:
        made = round_to_nearest(torch.zeros(1, 32), format, 32, symmetric=symmetric)
        assert made.scales.tolist() == [[1.0]]


def test_the_text_is_read_back() -> None:
    text = """module @m
weight @c : u8[4, 2, 8] = codes(tensor("w", f32[4, 32]), "int4", 16, true)
weight @s : f32[4, 2] = scales(tensor("w", f32[4, 32]), "int4", 16, true)
weight @z : u8[4, 1] = zeros(tensor("w", f32[4, 32]), "int4", 16, false)

"""
    assert print_module(parse_module(text)).strip() == text.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('"int3", 16, true', "format is int4, int8, e4m3"),
        ('"int4", 12, true', "don't fill"),
        ('"int4", 1, true', "a block of 1"),
        ('"e4m3", 16, false', "no zero points"),
    ],
)
def test_what_can_not_be(arguments: str, message: str) -> None:
    with pytest.raises(IRError, match=message):
        parse_module(
            f'module @m\nweight @c : u8[4, 2, 8] = codes(tensor("w", f32[4, 32]), {arguments})\n'
        )


def test_inputs_are_rounded_block_by_block() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, :32] = 0.0
    got = round_inputs(x, 32).unflatten(-1, (-1, 32))
    for block, rounded in zip(x.reshape(-1, 32), got.reshape(-1, 32), strict=True):
        largest = np.float32(block.abs().max())
        step = largest / np.float32(127) if largest else np.float32(1)
        want = np.round(block.numpy() / step).astype(np.float32) * step
        assert np.array_equal(rounded.numpy(), want)
    assert torch.equal(round_inputs(x[:1], 32), round_inputs(x, 32)[:1])

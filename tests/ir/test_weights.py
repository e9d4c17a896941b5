"""Lazy weights: any box of an expression is what torch computes, and only that is read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidc.ir import DType, TensorType, parse_module
from liquidc.ir.rotary import Rotation
from liquidc.ir.semantics import rope
from liquidc.ir.weight_maths import Mix, Product, Take, Xor
from liquidc.ir.weights import (
    Cast,
    Concat,
    Select,
    Slice,
    Stack,
    Stored,
    Transpose,
    WeightExpr,
    evaluate,
    sizes,
)

KINDS = (
    "slice",
    "select",
    "transpose",
    "concat",
    "stack",
    "cast",
    "take",
    "mix",
    "product",
)


class Source:
    """Tensors in memory; counts the elements that are read."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.read = 0

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name]
        rows = (tensor if tensor.dim() else tensor.reshape(1))[start:stop]
        self.read += rows.numel()
        return rows

    def stored(self, *shape: int) -> tuple[WeightExpr, torch.Tensor]:
        name = f"t{len(self.tensors)}"
        count = math.prod(shape)
        self.tensors[name] = torch.arange(count, dtype=torch.float32).reshape(shape) + 1000 * len(
            self.tensors
        )
        return Stored(name, TensorType(DType.F32, shape)), self.tensors[name]


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Source, WeightExpr, torch.Tensor]:
    """An expression and the tensor that it means."""
    source = Source()
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    expr, value = source.stored(*shape)
    for _ in range(draw(st.integers(0, 4))):
        rank = value.dim()
        kind = draw(st.sampled_from(KINDS))
        if kind == "slice" and rank:
            dim = draw(st.integers(0, rank - 1))
            start = draw(st.integers(0, value.shape[dim] - 1))
            stop = draw(st.integers(start + 1, value.shape[dim]))
            expr, value = Slice(expr, dim, start, stop), value.narrow(dim, start, stop - start)
        elif kind == "select" and rank > 1:
            index = draw(st.integers(0, value.shape[0] - 1))
            expr, value = Select(expr, index), value[index]
        elif kind == "transpose" and rank > 1:
            perm = draw(st.permutations(range(rank)))
            expr, value = Transpose(expr, tuple(perm)), value.permute(perm)
        elif kind in ("concat", "stack") and rank:
            other, more = source.stored(*value.shape)
            if value.dtype != torch.float32:
                other, more = Cast(other, expr.type.dtype), more.to(value.dtype)
            if kind == "stack":
                expr, value = Stack((expr, other)), torch.stack([value, more])
            else:
                dim = draw(st.integers(0, rank - 1))
                expr, value = Concat((expr, other), dim), torch.cat([value, more], dim)
        elif kind == "take" and rank:
            dim = draw(st.integers(0, rank - 1))
            index = draw(st.lists(st.integers(0, value.shape[dim] - 1), min_size=1, max_size=4))
            expr = Take(expr, dim, tuple(index))
            value = value.index_select(dim, torch.tensor(index))
        elif kind == "mix":  # small integers: every sum is exact
            expr, value = Mix((expr, expr), (0.5, -2.0)), value * 0.5 + value * -2.0
        elif kind == "product" and rank == 2:
            expr, value = (
                Product(expr, Transpose(expr, (1, 0))),
                (value.double() @ value.double().T).to(value.dtype),
            )
        elif kind == "cast":
            expr, value = Cast(expr, DType.F64), value.double()
    return source, expr, value


@settings(max_examples=200, deadline=None)
@given(expressions(), st.data())
def test_every_box(made: tuple[Source, WeightExpr, torch.Tensor], data: st.DataObject) -> None:
    source, expr, value = made
    assert expr.type.shape == tuple(value.shape)
    box = []
    for size in sizes(expr.type.shape):
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    wanted = value[tuple(slice(*pair) for pair in box)]
    read = expr.read(source, tuple(box))
    assert read.dtype == value.dtype
    assert torch.equal(read, wanted)


@settings(max_examples=100, deadline=None)
@given(expressions(), st.data())
def test_an_entry(made: tuple[Source, WeightExpr, torch.Tensor], data: st.DataObject) -> None:
    """That of the tensor; of a stack, it reads one of the tensors."""
    source, expr, value = made
    if not value.dim():
        return
    index = data.draw(st.integers(0, value.shape[0] - 1))
    entry = expr.entry(index)
    assert entry.type == expr.type.with_shape(*value.shape[1:])
    read = entry.read(source, tuple((0, size) for size in sizes(entry.type.shape)))
    assert torch.equal(read, value[index])
    assert set(entry.sources()) <= set(expr.sources())
    if isinstance(expr, Stack):
        assert len(entry.sources()) < len(expr.sources())


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_evaluated_in_blocks(made: tuple[Source, WeightExpr, torch.Tensor]) -> None:
    source, expr, value = made
    parts = [block.reshape(-1) for block in evaluate(expr, source)]
    assert torch.equal(torch.cat(parts), value.reshape(-1))
    assert set(expr.sources()) <= source.tensors.keys()


@pytest.mark.parametrize("scaling", ["", "yarn(4.0, 32.0, 1.0, 64.0, 1.0, 1.2)"])
def test_a_table_of_angles_is_what_rope_multiplies_with(scaling: str) -> None:
    """A unit vector turns to cosine and sine; blocks of rows change no bit."""
    positions = torch.arange(1000)
    x = torch.zeros(1000, 1, 16)
    x[..., :8] = 1
    turned = rope(x, positions, 10000.0, scaling)[:, 0]
    for part, wanted in zip(("cos", "sin"), turned.chunk(2, -1), strict=True):
        table = Rotation(part, 10000.0, scaling, TensorType(DType.F32, (1000, 8)))
        whole = torch.cat(list(evaluate(table, Source())))
        torch.testing.assert_close(whole, wanted, rtol=0, atol=2e-7)
        assert torch.equal(torch.cat(list(evaluate(table, Source(), 7000))), whole)
        line = f"module @m\nweight @w : {table.type} = {table}\n"
        assert parse_module(line).weights["w"] == table


def test_a_product_is_rounded_once() -> None:
    source = Source()
    source.tensors["a"] = torch.tensor([[1e8, 1.0, -1e8]])
    source.tensors["b"] = torch.tensor([[1e8], [1.0], [1e8]])
    a, b = (
        Stored(name, TensorType(DType.F32, tuple(tensor.shape)))
        for name, tensor in source.tensors.items()
    )
    assert Product(a, b).read(source, ((0, 1), (0, 1))).item() == 1.0


def test_rows_that_are_taken_are_read_alone() -> None:
    source = Source()
    x, _ = source.stored(8, 4)
    Take(x, 0, (7, 1, 3)).read(source, ((1, 3), (0, 4)))
    assert source.read == 2 * 4


def test_flipped_bits_make_codes_signed() -> None:
    source = Source()
    source.tensors["c"] = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    x = Stored("c", TensorType(DType.U8, (8, 32)))
    eight = Xor(x, 0x80).read(source, ((2, 5), (1, 32))).view(torch.int8)
    wanted = source.tensors["c"][2:5, 1:32].int()
    assert torch.equal(eight.int(), wanted - 128)
    four = Xor(x, 0x88).read(source, ((2, 5), (1, 32))).int()
    for shift in (0, 4):
        nibble = (four >> shift) & 15
        signed = nibble - 16 * (nibble > 7).int()
        assert torch.equal(signed, ((wanted >> shift) & 15) - 8)
    text = 'module @m\nweight @w : u8[8, 32] = xor(tensor("c", u8[8, 32]), 136)\n'
    assert parse_module(text).weights["w"] == Xor(x, 0x88)
    for mask, stored in ((256, x), (1, Stored("f", TensorType(DType.F32, (2,))))):
        with pytest.raises(ValueError, match="xor of"):
            Xor(stored, mask)


def test_a_row_of_a_stack_reads_one_part() -> None:
    source = Source()
    parts = [source.stored(8, 16)[0] for _ in range(4)]
    Stack(tuple(parts)).read(source, ((2, 3), (0, 8), (0, 16)))
    assert source.read == 8 * 16
    source.read = 0
    Concat(tuple(parts), 0).read(source, ((9, 11), (0, 16)))
    assert source.read == 2 * 16

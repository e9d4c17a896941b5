"""Products with codes in ONNX Runtime, against the interpreter, within what 8-bit rows allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.quantize import Quantize
from tests.backends.onnxruntime.test_lowering import run, session

LINEAR = """
module @m
weight @w : f32[24, 64] = tensor("w", f32[24, 64])
weight @b : f32[24] = tensor("b", f32[24])
func @prefill(%x: f32[B, T, 64], %c: bool[]) -> (y: f32[B, T, 24]) {
  %y = if %c, label="layer0" : f32[B, T, 24] {
    %w = weight weight="w" : f32[24, 64]
    %b = weight weight="b" : f32[24]
    %h = linear %x, %w, bias=%b : f32[B, T, 24]
    yield %h
  } else {
    %zero = constant value=[0.0] : f32[]
    %o = broadcast %zero, shape=["B", "T", 24] : f32[B, T, 24]
    yield %o
  }
  return %y
}
"""
EXPERTS = """
module @m
weight @gu : f32[4, 64, 32] = tensor("gu", f32[4, 64, 32])
weight @d : f32[4, 32, 32] = tensor("d", f32[4, 32, 32])
func @prefill(%x: f32[B, T, 32], %i: i64[B, T, 2], %s: f32[B, T, 2]) -> (y: f32[B, T, 32]) {
  %gu = weight weight="gu" : f32[4, 64, 32]
  %d = weight weight="d" : f32[4, 32, 32]
  %y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 32]
  return %y
}
"""
STEPS = {
    "int8": Quantize(scheme="int8"),
    "int8, zero points": Quantize(scheme="int8", symmetric=False, block=16),
    "int4": Quantize(scheme="int4"),
    "int4, blocks of 16": Quantize(scheme="int4", block=16),
    "int4, zero points": Quantize(scheme="int4", symmetric=False),
    "int4, an odd number of zero points": Quantize(scheme="int4", symmetric=False, block=64),
    "fp8": Quantize(scheme="fp8"),
    "int8, rows": Quantize(scheme="int8", block=-1),
    "int4, rows": Quantize(scheme="int4", block=-1),
    "int8, rows, zero points": Quantize(scheme="int8", block=-1, symmetric=False),
    "int8-dynamic": Quantize(scheme="int8-dynamic"),
    "int8-dynamic, rows": Quantize(scheme="int8-dynamic", block=-1),
}


class Tensors:
    def __init__(self) -> None:
        numbers = torch.Generator().manual_seed(0)
        shapes = {"w": (24, 64), "b": (24,), "gu": (4, 64, 32), "d": (4, 32, 32)}
        self.tensors = {n: torch.randn(s, generator=numbers) for n, s in shapes.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


def rounding(x: torch.Tensor, w: torch.Tensor, block: int) -> torch.Tensor:
    """How far `x wᵀ` may move when each block of x is rounded to 8 bits: half a step of it.

    The step is the block's largest element / 127; accuracy level 4 of MatMulNBits does that.
    """
    largest = x.abs().unflatten(-1, (-1, block)).amax(-1)
    weights = w.abs().unflatten(-1, (-1, block)).sum(-1)
    return largest @ weights.T / 127 / 2


@pytest.mark.parametrize("name", STEPS)
def test_linear(name: str, tmp_path: Path) -> None:
    module = parse_module(LINEAR)
    STEPS[name].run(module, statistics := Statistics())
    (told,) = statistics.facts["quantize"]["weights"].values()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    interpreter = Interpreter(module, Tensors())
    made = session(module, Tensors(), tmp_path)
    for taken in (True, False):
        inputs = {"x": x, "c": torch.tensor(taken)}
        want = interpreter.run("prefill", inputs)["y"]
        got = run(made, inputs)["y"]
        allowed = torch.full_like(want, 1e-5)
        if taken and name != "fp8" and "dynamic" not in name:
            allowed += rounding(x, Tensors().tensors["w"], told["block"]) * 1.05
        assert ((got - want).abs() <= allowed).all(), float(((got - want).abs() / allowed).max())


@pytest.mark.parametrize("name", STEPS)
def test_experts(name: str, tmp_path: Path) -> None:
    module = parse_module(EXPERTS)
    STEPS[name].run(module, Statistics())
    numbers = torch.Generator().manual_seed(2)
    inputs = {
        "x": torch.randn(2, 5, 32, generator=numbers),
        "i": torch.randint(-1, 4, (2, 5, 2), generator=numbers),
        "s": torch.rand(2, 5, 2, generator=numbers),
    }
    want = Interpreter(module, Tensors()).run("prefill", inputs)["y"]
    got = run(session(module, Tensors(), tmp_path), inputs)["y"]
    error = float((got - want).norm() / want.norm())
    # Two products of rows of 8 bits, unless the interpreter rounds them too.
    assert error < (1e-5 if name == "fp8" or "dynamic" in name else 0.02), error
    none = (inputs["i"] == -1).all(-1)
    assert (got[none] == 0).all()


def test_every_product_inside_a_branch_reads_codes(tmp_path: Path) -> None:
    """The tools of ONNX Runtime leave weights inside an If in float."""
    import onnx

    module = parse_module(LINEAR)
    STEPS["int4"].run(module, Statistics())
    session(module, Tensors(), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (conditional,) = [node for node in model.graph.node if node.op_type == "If"]
    arms = {a.name: [n.op_type for n in a.g.node] for a in conditional.attribute}
    assert "MatMulNBits" in arms["then_branch"]
    assert "Gemm" not in arms["then_branch"]
    assert "w" not in {tensor.name for tensor in model.graph.initializer}


WIDE = LINEAR.replace("64]", "768]")


class Wide(Tensors):
    def __init__(self) -> None:
        super().__init__()
        self.tensors["w"] = torch.randn(24, 768, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_a_scale_for_a_whole_row_still_goes_to_the_fast_kernel(scheme: str, tmp_path: Path) -> None:
    """Its blocks have up to 256 elements; a row of 768 is six of 128 with the same scale."""
    import onnx

    module = parse_module(WIDE)
    Quantize(scheme=scheme, block=-1).run(module, Statistics())
    assert [w.sizes for n, w in module.weights.items() if n == "w.scales"] == [(24, 1)]
    x = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(1))
    inputs = {"x": x, "c": torch.tensor(True)}
    want = Interpreter(module, Wide()).run("prefill", inputs)["y"]
    got = run(session(module, Wide(), tmp_path), inputs)["y"]
    # int8-dynamic: rounded as asked for, then again by the kernel.
    assert ((got - want).abs() <= rounding(x, Wide().tensors["w"], 768) * 1.05 + 1e-4).all()
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (conditional,) = [node for node in model.graph.node if node.op_type == "If"]
    (arm,) = [a.g for a in conditional.attribute if a.name == "then_branch"]
    (node,) = [n for n in arm.node if n.op_type == "MatMulNBits"]
    assert {a.name: a.i for a in node.attribute}["block_size"] == 128

"""Experts as one QMoE, against the interpreter, within what 8-bit rows allow."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from liquidc.backends.base import Choices
from liquidc.errors import UnsupportedError
from liquidc.ir import Module, ops, parse_module, print_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.quantised import dequantise
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import materialize
from liquidc.passes.quantize import Quantize
from tests.backends.onnxruntime.test_lowering import run, session
from tests.backends.onnxruntime.test_quantised import Tensors, rounding

FUSED = Choices(fused_experts=True)
ROUTED = """
module @m
weight @gu : f32[4, 64, 32] = tensor("gu", f32[4, 64, 32])
weight @d : f32[4, 32, 32] = tensor("d", f32[4, 32, 32])
func @prefill(%x: f32[B, T, 32], %i: i64[B, T, 2], %l: f32[B, T, 4], %m: bool[B, T])
    -> (y: f32[B, T, 32], s: f32[B, T, 2]) {
  %gu = weight weight="gu" : f32[4, 64, 32]
  %d = weight weight="d" : f32[4, 32, 32]
  %chosen, %s = route %l, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
  %y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 32]
  return %y, %s
}
"""
STEPS = {
    "int8": Quantize(scheme="int8"),
    "int8, zero points": Quantize(scheme="int8", symmetric=False, block=16),
    "int4": Quantize(scheme="int4"),
    "int4, blocks of 16": Quantize(scheme="int4", block=16),
    "int4, zero points": Quantize(scheme="int4", symmetric=False, block=16),
    "int4, an odd number of zero points": Quantize(scheme="int4", symmetric=False),
    "int8-dynamic": Quantize(scheme="int8-dynamic"),
}
STEEPEST = 1.1
"""The largest slope of silu is 1.0998."""


def quantised(name: str, text: str = ROUTED) -> Module:
    module = parse_module(text)
    STEPS[name].run(module, Statistics())
    return module


def routed(slots: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(*slots.shape[:2], 32, generator=numbers),
        "i": slots,
        "l": torch.randn(*slots.shape[:2], 4, generator=numbers),
        "m": torch.rand(slots.shape[:2], generator=numbers) > 0.1,
    }


ROUTES = {
    "any": torch.randint(0, 4, (2, 9, 2), generator=torch.Generator().manual_seed(4)),
    "empty slots": torch.randint(-1, 4, (2, 9, 2), generator=torch.Generator().manual_seed(5)),
    "nothing but empty slots": torch.full((1, 3, 2), -1),
    "one expert twice": torch.full((1, 3, 2), 2),
    "numbers of identity experts": torch.tensor([[[0, 4], [5, 1], [4, 5]]]),
    "one token": torch.tensor([[[3, 1]]]),
}


def factors(module: Module) -> tuple[list[torch.Tensor], int]:
    """The dequantised weights of gate and up, and of down; and the size of a block."""
    made, block = list[torch.Tensor](), 0
    for op in module.walk():
        if isinstance(op, ops.Dequantize):
            parts = [None if v is None else v.op for v in (op.codes, op.scales, op.zeros)]
            codes, scales, zeros = (
                materialize(module.weights[part.weight], Tensors())
                if isinstance(part, ops.Weight)
                else None
                for part in parts
            )
            assert codes is not None
            assert scales is not None
            made.append(dequantise(codes, scales, zeros, op.format))
            block = op.block
    return made, block


def allowed(module: Module, inputs: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """How far sums of experts may move when the rows of both products are rounded to 8 bits."""
    (gate_up, down), block = factors(module)
    total = torch.full(inputs["x"].shape, 1e-5)
    for expert in range(len(down)):
        share = torch.where(inputs["i"] == expert, weights, 0).sum(-1, keepdim=True)
        gate, up = (inputs["x"] @ gate_up[expert].T).chunk(2, -1)
        of_gate, of_up = rounding(inputs["x"], gate_up[expert], block).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate)
        moved = STEEPEST * of_gate * (up.abs() + of_up) + hidden.abs() * of_up
        largest = (hidden * up).abs() + moved
        total += share * (moved @ down[expert].abs().T + rounding(largest, down[expert], block))
    return total * 1.01


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", STEPS)
def test_experts(name: str, route: str, tmp_path: Path) -> None:
    module, inputs = quantised(name), routed(ROUTES[route])
    want, weights = Interpreter(module, Tensors()).run("prefill", inputs).values()
    got = run(session(module, Tensors(), tmp_path, FUSED), inputs)["y"]
    assert ((got - want).abs() <= allowed(module, inputs, weights)).all()
    assert float((got - want).norm()) <= 0.02 * float(want.norm())
    none = ((inputs["i"] < 0) | (inputs["i"] > 3)).all(-1)
    assert (got[none] == 0).all()


def test_gate_and_up_exchanged_would_be_seen() -> None:
    """silu(gate) · up is no function of both alike; a bound that allows it would show nothing."""
    module, inputs = quantised("int8"), routed(ROUTES["any"])
    (gate_up, down), _ = factors(module)
    want, weights = Interpreter(module, Tensors()).run("prefill", inputs).values()
    swapped = torch.zeros_like(want)
    for expert in range(len(down)):
        share = torch.where(inputs["i"] == expert, weights, 0).sum(-1, keepdim=True)
        gate, up = (inputs["x"] @ gate_up[expert].T).chunk(2, -1)
        swapped += share * ((torch.nn.functional.silu(up) * gate) @ down[expert].T)
    assert ((swapped - want).abs() > allowed(module, inputs, weights)).any()
    assert float((swapped - want).norm()) > 0.02 * float(want.norm())


def test_there_is_one_operator_and_no_conditional(tmp_path: Path) -> None:
    session(quantised("int4"), Tensors(), tmp_path, FUSED)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QMoE") == 1
    assert not {"If", "MatMulNBits", "Gemm"} & set(kinds)


@pytest.mark.parametrize(
    ("scheme", "old", "new", "reason"),
    [
        ("", "", "", "their weights are not quantised"),
        ("fp8", "", "", "no e4m3"),
        ("int8", "%d :", '%d, apply="input" :', "they weigh their inputs"),
        ("int8", "k=2", 'k=2, score="identity"', "negative weights"),
        ("int8", "k=2", "k=2, scaling=-1.0", "negative weights"),
    ],
)
def test_refusals(scheme: str, old: str, new: str, reason: str, tmp_path: Path) -> None:
    module = parse_module(ROUTED.replace(old, new))
    if scheme:
        Quantize(scheme=scheme).run(module, Statistics())
    with pytest.raises(UnsupportedError, match=f"can't be one QMoE: .*{reason}.*--fused-experts"):
        session(module, Tensors(), tmp_path, FUSED)


def test_blocks_differ(tmp_path: Path) -> None:
    text = ROUTED.replace("4, 64, 32", "4, 128, 32").replace("4, 32, 32", "4, 32, 64")
    module = parse_module(text)
    Quantize(block=64).run(module, Statistics())
    with pytest.raises(UnsupportedError, match="blocks of 32 and 64 elements"):
        session(module, Tensors(), tmp_path, FUSED)


def test_blocks_are_too_small(tmp_path: Path) -> None:
    text = print_module(quantised("int8"))
    smaller = {'"int8", 32': '"int8", 8', "1, 32]": "4, 8]", "64, 1]": "64, 4]", "32, 1]": "32, 4]"}
    for old, new in smaller.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(UnsupportedError, match="blocks of 8 elements are no power of two from 16"):
        session(parse_module(text), Tensors(), tmp_path, FUSED)


def test_small_weights_are_ignored(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 skips weights up to 1e-8; the refusal of negative ones rests on that."""
    inputs = routed(ROUTES["one token"])
    inputs |= {"l": torch.zeros(1, 1, 4), "m": torch.tensor([[True]])}
    for scaling, ignored in ((2.2e-8, False), (1.8e-8, True)):  # of two weights of one half
        module = quantised("int8", ROUTED.replace("k=2", f"k=2, scaling={scaling}"))
        y = run(session(module, Tensors(), tmp_path, FUSED), inputs)["y"]
        assert bool((y == 0).all()) == ignored

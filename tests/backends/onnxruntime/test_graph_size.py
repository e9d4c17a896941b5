"""The graph of many experts: what each costs, and the hint to make them one operator."""

from __future__ import annotations

import onnx
import pytest

from liquidc.backends.base import Choices
from liquidc.backends.onnxruntime.emit import lower
from liquidc.backends.registry import get_backend
from liquidc.ir import Module, parse_module
from liquidc.ir.quantised import Quantised
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weight_maths import Take
from liquidc.ir.weights import WeightExpr
from liquidc.passes.quantize import Quantize

STEPS = {
    "float": None,
    "int8": Quantize(scheme="int8", block=16),
    "int4, zero points": Quantize(scheme="int4", symmetric=False, block=16),
    "fp8": Quantize(scheme="fp8", block=32),
}
MAX_BYTES = 3000
"""For an expert: two products, with codes, scales and zero points as initialisers of some 300."""


def stack(name: str, experts: int, shape: str) -> str:
    """A weight of so many tensors of a checkpoint, as families store experts."""
    each = [f'tensor("layers.0.experts.{i}.{name}.weight", f32[{shape}])' for i in range(experts)]
    return f"weight @{name} : f32[{experts}, {shape}] = stack([{', '.join(each)}])\n"


def module(experts: int, step: Quantize | None, layers: int = 1) -> Module:
    text = "module @m\n" + stack("gu", experts, "64, 32") + stack("d", experts, "32, 32")
    text += f"""func @prefill(%x: f32[B, T, 32], %l: f32[B, T, {experts}], %m: bool[B, T])
    -> (y: f32[B, T, 32]) {{
  %gu = weight weight="gu" : f32[{experts}, 64, 32]
  %d = weight weight="d" : f32[{experts}, 32, 32]
  %y0 = cast %x, to=f32 : f32[B, T, 32]
"""
    for layer in range(layers):
        text += f"""
  %i{layer}, %s{layer} = route %l, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
  %y{layer + 1} = grouped_experts %y{layer}, %i{layer}, %s{layer}, %gu, %d : f32[B, T, 32]
"""
    made = parse_module(text + f"  return %y{layers}\n}}\n")
    if step is not None:
        step.run(made, Statistics())
    return made


@pytest.mark.parametrize("portable", [False, True], ids=["codes", "portable"])
@pytest.mark.parametrize("name", STEPS)
def test_an_expert_costs_the_same_in_any_number(name: str, portable: bool) -> None:
    sizes: list[int] = []
    for experts in (32, 128):
        choices = Choices(portable_weights=portable)
        model = lower(module(experts, STEPS[name]), choices=choices).model
        sizes.append(model.ByteSize())
        told = [tensor.doc_string for tensor in weights(model) if ".experts." in tensor.doc_string]
        assert {text.count("tensor(") for text in told} == {1}
    assert (sizes[1] - sizes[0]) / 96 < MAX_BYTES


def weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    arms = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    return [tensor for graph in (model.graph, *arms) for tensor in graph.initializer]


def texts(expr: WeightExpr, index: int) -> str:
    return str(expr.entry(index))


def test_an_expert_in_another_order_names_itself_alone() -> None:
    expr = module(8, None).weights["gu"]
    assert texts(Take(expr, 0, (5, 0, 7)), 0) == texts(expr, 5)


def test_calibrated_codes_of_an_expert_are_those_of_the_stack() -> None:
    made = module(4, Quantize(scheme="int4", block=32))
    for expr in made.weights.values():
        if isinstance(expr, Quantised):
            whole = type(expr)(expr.x, expr.format, expr.block, expr.symmetric, "gptq")
            one = whole.entry(3)
            assert isinstance(one, Quantised)
            assert one.stored == whole.stored
            assert str(one).count("tensor(") == 1
            line = f"module @m\nweight @w : {one.type} = {one}\n"
            assert parse_module(line).weights["w"] == one


@pytest.mark.parametrize(
    ("experts", "layers", "step", "choices", "told"),
    [
        (128, 4, "int8", Choices(), "512 experts become 1024 products in the graph; --fused-exp"),
        (128, 3, "int8", Choices(), None),
        (128, 4, "int8", Choices(fused_experts=True), None),
        (128, 4, "int8", Choices(portable_weights=True), None),
        (128, 4, "float", Choices(), None),
        (128, 4, "fp8", Choices(), None),
    ],
)
def test_one_operator_is_suggested_where_there_is_one(
    experts: int, layers: int, step: str, choices: Choices, told: str | None
) -> None:
    hint = get_backend("onnxruntime").hint(module(experts, STEPS[step], layers), choices)
    assert hint is None if told is None else (hint or "").startswith(told)
    assert get_backend("null").hint(module(4, None), choices) is None

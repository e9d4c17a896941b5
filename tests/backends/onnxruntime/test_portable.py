"""Codes that the standard operator dequantises: the same floats as the interpreter's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from liquidc.backends.base import Choices
from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from tests.backends.onnxruntime.test_lowering import run, session
from tests.backends.onnxruntime.test_quantised import EXPERTS, LINEAR, STEPS, Tensors

PORTABLE = Choices(portable_weights=True)
ODD = "int4, an odd number of zero points"
TYPES = {
    "int8": TensorProto.INT8,
    "int8, zero points": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "int4, blocks of 16": TensorProto.INT4,
    "int4, zero points": TensorProto.UINT4,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int8, rows": TensorProto.INT8,
    "int4, rows": TensorProto.INT4,
    "int8, rows, zero points": TensorProto.UINT8,
    "int8-dynamic": TensorProto.INT8,
    "int8-dynamic, rows": TensorProto.INT8,
}
EPSILON = float(np.finfo(np.float32).eps)


def rounding(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How far sums in float32 of `x wᵀ` may differ: K terms and two roundings in each weight."""
    return (x.shape[-1] + 4) * EPSILON * (x.abs() @ w.abs().T * 1.2 + 1)


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [node for n in graph.node for a in n.attribute for node in nodes(a.g)]
    return [*graph.node, *inner]


@pytest.mark.parametrize("name", STEPS)
def test_linear(name: str, tmp_path: Path) -> None:
    module = parse_module(LINEAR)
    STEPS[name].run(module, Statistics())
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    interpreter = Interpreter(module, Tensors())
    made = session(module, Tensors(), tmp_path, PORTABLE)
    for taken in (True, False):
        inputs = {"x": x, "c": torch.tensor(taken)}
        want, got = interpreter.run("prefill", inputs)["y"], run(made, inputs)["y"]
        assert ((got - want).abs() <= rounding(x, Tensors().tensors["w"])).all()
        assert bool(got.any()) == taken


@pytest.mark.parametrize("name", STEPS)
def test_the_model_keeps_to_the_standard(name: str, tmp_path: Path) -> None:
    """By the checker, and by the reference implementation, which knows no other operators."""
    module = parse_module(LINEAR)
    STEPS[name].run(module, Statistics())
    session(module, Tensors(), tmp_path, PORTABLE)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {node.op_type for node in nodes(model.graph)}
    assert not {node.domain for node in nodes(model.graph)} - {""}
    if name != ODD:
        assert "DequantizeLinear" in kinds
        kept = {tensor.name: tensor for tensor in model.graph.initializer}
        assert kept["w.codes.standard"].data_type == TYPES[name]
        assert list(kept["w.codes.standard"].dims) == [24, 64]
        assert ("w.zeros.standard" in kept) == ("zero points" in name)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    inputs = {"x": x, "c": torch.tensor(True)}
    want = Interpreter(module, Tensors()).run("prefill", inputs)["y"]
    (got,) = ReferenceEvaluator(model).run(None, {"x": x.numpy(), "c": np.array(True)})
    got = torch.from_numpy(np.asarray(got))
    assert ((got - want).abs() <= rounding(x, Tensors().tensors["w"])).all()


@pytest.mark.parametrize("name", STEPS)
def test_experts(name: str, tmp_path: Path) -> None:
    """Gate and up have different rows: exchanged, they would be seen."""
    module = parse_module(EXPERTS)
    STEPS[name].run(module, Statistics())
    numbers = torch.Generator().manual_seed(2)
    inputs = {
        "x": torch.randn(2, 5, 32, generator=numbers),
        "i": torch.randint(-1, 4, (2, 5, 2), generator=numbers),
        "s": torch.rand(2, 5, 2, generator=numbers),
    }
    want = Interpreter(module, Tensors()).run("prefill", inputs)["y"]
    got = run(session(module, Tensors(), tmp_path, PORTABLE), inputs)["y"]
    assert float((got - want).norm() / want.norm()) < 1e-6
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert "MatMulNBits" not in {node.op_type for node in nodes(model.graph)}


def test_onnx_runtime_leaves_it_alone(tmp_path: Path) -> None:
    """It fuses MatMul with a weight [K, N] alone: this form stays float32, and slow (facts.md)."""
    module = parse_module(LINEAR)
    STEPS["int4"].run(module, Statistics())
    session(module, Tensors(), tmp_path, PORTABLE)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    kinds = {node.op_type for node in nodes(optimised.graph)}
    assert "DequantizeLinear" in kinds
    assert "MatMulNBits" not in kinds


@pytest.mark.parametrize("branch", [False, True])
def test_onnx_runtime_fuses_the_other_layout_outside_branches_alone(
    branch: bool, tmp_path: Path
) -> None:
    """ONNX Runtime 1.32 can't load `MatMul` with such a weight in an If: hence `Gemm` [N, K]."""
    size, block = 64, 32
    codes = helper.make_tensor("w", TensorProto.INT4, [size, size], bytes(size * size // 2), True)
    scales = np.ones((size // block, size), np.float32)
    body = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "f"], ["z"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", size])]
    top = [*body, helper.make_node("Identity", ["z"], ["y"])]
    if branch:
        skip = [helper.make_node("Identity", ["x"], ["e"])]
        arms = {
            "then_branch": helper.make_graph(body, "t", [], [onnx.ValueInfoProto(name="z")]),
            "else_branch": helper.make_graph(skip, "e", [], [onnx.ValueInfoProto(name="e")]),
        }
        top = [helper.make_node("If", ["c"], ["y"], **arms)]
        inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", size])
    graph = helper.make_graph(
        top, "g", inputs, [result], [codes, onnx.numpy_helper.from_array(scales, "s")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    data, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    if branch:
        with pytest.raises(Exception, match="Missing required weight: w"):
            ort.InferenceSession(data, options, providers=providers)
        return
    ort.InferenceSession(data, options, providers=providers)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert "MatMulNBits" in {node.op_type for node in nodes(optimised.graph)}


TWICE = """
module @m
weight @c : u8[24, 2, 16] = codes(tensor("w", f32[24, 64]), "int4", 32, false)
weight @s : f32[24, 2] = scales(tensor("w", f32[24, 64]), "int4", 32, false)
weight @z : u8[24, 1] = zeros(tensor("w", f32[24, 64]), "int4", 32, false)
func @prefill(%x: f32[T, 64]) -> (y: f32[T, 24], w: f32[24, 64]) {
  %c = weight weight="c" : u8[24, 2, 16]
  %s = weight weight="s" : f32[24, 2]
  %z = weight weight="z" : u8[24, 1]
  %w = dequantize %c, %s, zeros=%z, format="int4" : f32[24, 64]
  %y = linear %x, %w : f32[T, 24]
  return %y, %w
}
"""


def test_codes_that_two_operators_read(tmp_path: Path) -> None:
    """Each has them in the form that it takes."""
    module = parse_module(TWICE)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    want = Interpreter(module, Tensors()).run("prefill", {"x": x})
    got = run(session(module, Tensors(), tmp_path), {"x": x})
    assert torch.equal(got["w"], want["w"])
    assert float((got["y"] - want["y"]).norm() / want["y"].norm()) < 0.02
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds = {node.op_type for node in nodes(model.graph)}
    assert {"MatMulNBits", "DequantizeLinear"} <= kinds

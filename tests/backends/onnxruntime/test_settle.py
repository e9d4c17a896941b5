"""Codes that only arms inside arms read are held by those arms, and every weight once in a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from liquidc.backends.onnxruntime.settle import settle, stored, weight_name

WIDTH, BLOCK = 64, 32
PRODUCT = (
    f"com.microsoft.MatMulNBits<K = {WIDTH}, N = {WIDTH}, bits = 4, block_size = {BLOCK}, "
    "accuracy_level = 4>"
)
MODEL = f"""<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>
g (float[1,{WIDTH}] x, bool c) => (float[1,{WIDTH}] y) {{
  y = If (c) <
    then_branch = t () => (float[1,{WIDTH}] yt) {{
      yt = If (c) <
        then_branch = tt () => (float[1,{WIDTH}] a) {{ a = {PRODUCT}(x, codes, scales) }},
        else_branch = te () => (float[1,{WIDTH}] b) {{ b = Neg(x) }}
      >
    }},
    else_branch = e () => (float[1,{WIDTH}] ye) {{ ye = OTHER }}
  >
}}"""


def model(other: str = "Abs(x)") -> onnx.ModelProto:
    """A product two conditionals deep, and another arm; its weights are in the model's graph."""
    made = onnx.parser.parse_model(MODEL.replace("OTHER", other))
    numbers = np.random.default_rng(0)
    codes = numbers.integers(0, 256, (WIDTH, WIDTH // BLOCK, BLOCK // 2), np.uint8)
    scales = numbers.random(WIDTH * WIDTH // BLOCK, np.float32)
    for name, array in (("codes", codes), ("scales", scales)):
        tensor = numpy_helper.from_array(array, name)
        tensor.doc_string = "a weight"
        made.graph.initializer.append(tensor)
    return made


def run(made: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inner arm's result."""
    session: Any = ort.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x, "c": np.array(True)})[0]


def names(graph: onnx.GraphProto) -> list[str]:
    """What a graph itself holds."""
    return sorted(tensor.name for tensor in graph.initializer)


def inner(made: onnx.ModelProto) -> onnx.GraphProto:
    """The arm of the product."""
    return made.graph.node[0].attribute[0].g.node[0].attribute[0].g


def test_the_arm_holds_what_it_alone_reads() -> None:
    made = model()
    settle(made.graph)
    assert names(made.graph) == []
    assert names(inner(made)) == ["codes", "scales"]
    assert sorted(map(weight_name, stored(made.graph))) == ["codes", "scales"]


def test_a_weight_that_is_read_outside_too() -> None:
    """The graph around keeps it, and the arm's has another name: one may not hide the other."""
    made = model(f"{PRODUCT}(x, codes, scales)")
    settle(made.graph)
    assert names(made.graph) == ["codes", "scales"]
    assert names(inner(made)) == ["codes#", "scales#"]
    assert {weight_name(tensor) for tensor in stored(made.graph)} == {"codes", "scales"}
    x = np.ones((1, WIDTH), np.float32)
    np.testing.assert_allclose(run(made, x), run(model(), x), rtol=1e-4)


def test_other_operators_read_the_weight_where_it_was() -> None:
    made = model()
    made.graph.initializer[0].data_type = TensorProto.UINT8
    inner(made).node[0].op_type = "Other"
    settle(made.graph)
    assert names(made.graph) == ["codes", "scales"]


@pytest.mark.parametrize("settled", [False, True])
def test_onnx_runtime_does_not_pack_what_lies_two_graphs_out(settled: bool) -> None:
    """The packed product rounds its input to 8 bits, the slow one does not: it shows (facts.md)."""
    made = model()
    if settled:
        settle(made.graph)
    codes, scales = (
        numpy_helper.to_array(t)
        for t in sorted(model().graph.initializer, key=lambda tensor: tensor.name)
    )
    low, high = codes & 15, codes >> 4
    whole = np.stack([low, high], -1).reshape(WIDTH, WIDTH // BLOCK, BLOCK).astype(np.float64)
    weight = ((whole - 8) * scales.reshape(WIDTH, -1, 1)).reshape(WIDTH, WIDTH)
    x = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T
    error = np.abs(run(made, x) - exact).max() / np.abs(exact).max()
    assert (error > 1e-4) == settled

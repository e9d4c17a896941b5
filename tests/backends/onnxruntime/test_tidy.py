"""Nodes that compute nothing new are taken out, in arms too, and the results stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from liquidc.backends.onnxruntime.tidy import arms, tidy

HEAD = '<ir_version: 11, opset_import: ["" : 24]>\n'
X: dict[str, NDArray[Any]] = {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    """How often an operator stands in a graph and its arms."""

    def walk(graph: onnx.GraphProto) -> Iterator[str]:
        for node in graph.node:
            yield node.op_type
            for arm in arms(node):
                yield from walk(arm)

    return Counter(walk(graph))


def results(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Of ONNX Runtime, which optimises nothing itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    made: Any = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return made.run(None, inputs)


def tidied(text: str, *calls: dict[str, NDArray[Any]]) -> Counter[str]:
    """The operators that are left; what they compute must be what the text computes."""
    model = onnx.parser.parse_model(HEAD + text)
    onnx.checker.check_model(model)
    wanted = [results(model, inputs) for inputs in calls]
    names = [output.name for output in model.graph.output]
    tidy(model.graph)
    onnx.checker.check_model(model)
    assert [output.name for output in model.graph.output] == names
    for inputs, before in zip(calls, wanted, strict=True):
        for got, want in zip(results(model, inputs), before, strict=True):
            assert got.dtype == want.dtype
            assert np.array_equal(got, want)
    return kinds(model.graph)


def test_what_nobody_reads() -> None:
    left = tidied("g (float[2,3,4] x) => (float[2,3,4] y) { y = Relu(x) z = Neg(x) w = Abs(z) }", X)
    assert left == {"Relu": 1}


def test_a_constant_that_nobody_reads_goes_and_a_weight_stays() -> None:
    text = "g (float[1] x) => (float[1] y) <float[1] a = {1.0}, float[1] w = {2.0}> { y = Neg(x) }"
    graph = onnx.parser.parse_model(HEAD + text).graph
    graph.initializer[1].doc_string = "a weight"
    tidy(graph)
    assert [tensor.name for tensor in graph.initializer] == ["w"]


def test_a_result_is_called_so_where_it_is_made() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z, float[2,3,4] w) "
        "{ a = Relu(x) y = Identity(a) z = Identity(a) w = Identity(x) }",
        X,
    )
    assert left == {"Relu": 1, "Identity": 2}  # a second name of a value, and that of an argument


def test_reshapes_become_one() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[2,12] y) "
        "<int64[2] flat = {-1, 4}, int64[3] more = {2, 3, 4}, int64[2] last = {0, -1}> "
        "{ a = Reshape(x, flat) b = Reshape(a, more) y = Reshape(b, last) }",
        X,
    )
    assert left == {"Reshape": 1}


def test_a_size_that_the_reshape_before_computes_is_not_guessed() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[6,2,2] y) "
        "<int64[2] flat = {-1, 4}, int64[3] last = {0, 2, 2}> "
        "{ a = Reshape(x, flat) y = Reshape(a, last) }",
        X,
    )
    assert left == {"Reshape": 2}


def test_the_same_is_computed_once() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[2,3,4] y) { a = Relu(x) b = Relu(x) c = Neg(a) d = Neg(b) "
        "y = Mul(c, d) }",
        X,
    )
    assert left == {"Relu": 1, "Neg": 1, "Mul": 1}


def test_other_attributes_are_not_the_same() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[2,3,4] y) "
        "{ a = Softmax<axis = 1>(x) b = Softmax<axis = 2>(x) y = Mul(a, b) }",
        X,
    )
    assert left == {"Softmax": 2, "Mul": 1}


def test_two_results_that_are_the_same() -> None:
    left = tidied(
        "g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) { y = Relu(x) z = Relu(x) }", X
    )
    assert left == {"Relu": 2}


ARMS = """g (float[2,3,4] x, bool c, bool d) => (float[6,4] y, float[6,4] z)
<int64[2] flat = {{-1, 4}}> {{
  {before}
  y = If (c) <
    then_branch = t () => (float[6,4] yt) {{ a = Reshape(x, flat) yt = {one}(a) }},
    else_branch = e () => (float[6,4] ye) {{ b = Reshape(x, flat) ye = Neg(b) }}
  >
  z = If (d) <
    then_branch = t2 () => (float[6,4] zt) {{ a2 = Reshape(x, flat) zt = {one}(a2) }},
    else_branch = e2 () => (float[6,4] ze) {{ b2 = Reshape(y, flat) ze = Neg(b2) }}
  >
}}"""


def both(value: dict[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """Every way through the arms."""
    return [
        value | {"c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)
    ]


def test_a_shape_that_arms_share_is_made_before_them() -> None:
    """What takes time stays in its arm: it must not run where the arm does not."""
    left = tidied(ARMS.format(before="", one="Abs"), *both(X))
    assert left == {"If": 2, "Reshape": 2, "Abs": 2, "Neg": 2}


def test_an_arm_uses_what_was_made_around_it() -> None:
    left = tidied(
        """g (float[2,3,4] x, bool c) => (float[2,3,4] y, float[2,3,4] z) {
          q = Abs(x)
          z = Sqrt(q)
          y = If (c) <
            then_branch = t () => (float[2,3,4] yt) { a = Abs(x) yt = Neg(a) },
            else_branch = e () => (float[2,3,4] ye) { ye = Sqrt(q) }
          >
        }""",
        *({"x": X["x"], "c": np.array(c)} for c in (True, False)),
    )
    assert left == {"Abs": 1, "If": 1, "Neg": 1, "Sqrt": 2}  # a result of an arm is made there


def test_what_an_arm_made_is_not_seen_by_another() -> None:
    left = tidied(
        """g (float[2,3,4] x, bool c) => (float[2,3,4] y, float[2,3,4] z) {
          y = If (c) <
            then_branch = t () => (float[2,3,4] yt) { a = Abs(x) yt = Neg(a) },
            else_branch = e () => (float[2,3,4] ye) { b = Abs(x) ye = Exp(b) }
          >
          q = Abs(x)
          z = Sqrt(q)
        }""",
        *({"x": X["x"], "c": np.array(c)} for c in (True, False)),
    )
    assert left["Abs"] == 3


@pytest.mark.parametrize("times", [2, 3])
def test_again_changes_nothing(times: int) -> None:
    model = onnx.parser.parse_model(HEAD + ARMS.format(before="", one="Abs"))
    tidy(model.graph)
    once = model.SerializeToString(deterministic=True)
    for _ in range(times - 1):
        tidy(model.graph)
    assert model.SerializeToString(deterministic=True) == once


def test_what_one_arm_reads_is_computed_there() -> None:
    text = (
        "g (bool c, float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) { "
        "a = Relu(x) b = Neg(a) d = Neg(x) z = Sqrt(a) "
        "y = If (c) <then_branch = t () => (t1) { t1 = Abs(b) }, "
        "else_branch = e () => (e1) { e1 = Abs(d) }> }"
    )
    calls = [{"c": np.array(value), **X} for value in (True, False)]
    assert tidied(text, *calls) == {"Relu": 1, "Sqrt": 1, "If": 1, "Neg": 2, "Abs": 2}
    graph = onnx.parser.parse_model(HEAD + text).graph
    tidy(graph)
    assert [node.op_type for node in graph.node] == ["Relu", "Sqrt", "If"]  # two read the Relu
    assert [[node.op_type for node in arm.node] for arm in arms(graph.node[-1])] == [
        ["Neg", "Abs"],
        ["Neg", "Abs"],
    ]

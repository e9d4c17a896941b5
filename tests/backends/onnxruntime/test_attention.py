"""What one GroupQueryAttention takes over: appends, rotations, the split of a fused projection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import liquidc
from liquidc.backends.onnxruntime.graph import CONTRIB, IR_VERSION, OPSET
from liquidc.backends.onnxruntime.tidy import arms
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM

LAYER: dict[str, Any] = {
    "model_type": "liquid",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def attentions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """In a graph and its arms."""
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            yield node
        for arm in arms(node):
            yield from attentions(arm)


def attention_of(directory: Path, **config: Any) -> onnx.NodeProto:
    """That of a model of one layer."""
    model = LiquidForCausalLM(LiquidConfig.from_dict({**LAYER, **config}))
    liquidc.compile(model, directory / "engine").close()
    made = onnx.load(directory / "engine" / "model.onnx", load_external_data=False)
    (node,) = attentions(made.graph)
    return node


@pytest.mark.parametrize("width", [8, 16, 24, 32])
def test_heads_of_sixteen_are_rotated_inside(width: int, tmp_path: Path) -> None:
    node = attention_of(tmp_path, head_dim=width)
    told = {attribute.name: attribute.i for attribute in node.attribute}
    assert bool(told.get("do_rotary")) == (width % 16 == 0)
    assert bool(node.input[7]) == (width % 16 == 0)


@pytest.mark.parametrize("norm", ["none", "head"])
def test_one_projection_is_not_split(norm: str, tmp_path: Path) -> None:
    """Queries, keys and values, without a norm between, come in one input."""
    assert (not attention_of(tmp_path, qk_norm=norm).input[1]) == (norm == "none")


def attention(width: int, table: int, total: int) -> Any:
    """Run the bare operator over `total` tokens at once; heads of `width`, `table` angles."""
    zeros = np.zeros((table, width // 2), np.float32)
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "pk", "pv", "last", "total", "cos", "sin"],
        ["y", "nk", "nv"],
        domain=CONTRIB,
        num_heads=1,
        kv_num_heads=1,
        do_rotary=1,
    )
    kinds = dict.fromkeys(("q", "k", "v", "pk", "pv", "y", "nk", "nv"), TensorProto.FLOAT)
    kinds |= dict.fromkeys(("last", "total"), TensorProto.INT32)
    values = {n: helper.make_tensor_value_info(n, kind, None) for n, kind in kinds.items()}
    graph = helper.make_graph(
        [node],
        "one",
        [values[n] for n in node.input[:7]],
        [values[n] for n in node.output],
        [numpy_helper.from_array(zeros, n) for n in ("cos", "sin")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session: Any = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = np.zeros((1, total, width), np.float32)
    past = np.zeros((1, 1, 0, width), np.float32)
    last = np.array([total - 1], np.int32)
    feed = {"q": rows, "k": rows, "v": rows, "pk": past, "pv": past}
    return session.run(None, feed | {"last": last, "total": np.array(total, np.int32)})


def test_facts_of_its_rotation() -> None:
    """See docs/facts.md."""
    attention(16, 8, 8)
    with pytest.raises(Exception, match="multiple of 16"):
        attention(24, 8, 8)
    with pytest.raises(Exception, match="cos_cache"):
        attention(16, 7, 8)

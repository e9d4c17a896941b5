"""The protocol, shown on a decoder that shares no code with the reference model."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import liquidc
from liquidc.frontend.trace import trace
from liquidc.ir import Module, parse_module, print_module
from liquidc.ir.interpreter import Interpreter
from liquidc.runtime import Engine
from tests.frontend import other_model
from tests.frontend.other_model import OtherModel
from tests.oracle.reference import tolerance

IDS = torch.tensor(np.random.default_rng(7).integers(0, other_model.VOCABULARY, (2, 20)))
SIZES = {
    "num_hidden_layers": other_model.LAYERS,
    "hidden_size": other_model.WIDTH,
    "intermediate_size": other_model.EXPERT_WIDTH,
    "num_attention_heads": other_model.HEADS,
    "head_dim": other_model.HEAD_WIDTH,
}
EXACT, SINGLE = tolerance(SIZES, np.float64), tolerance(SIZES, np.float32)
"""Bounds on the error of logits, relative to the largest |logit|; its ten roundings a layer hold
here too: the parallel layer's longest path is shorter."""

Expected = tuple[Tensor, Tensor, Tensor]
"""Logits, gate_p and experts."""


@cache
def model() -> OtherModel:
    """A model with decisive gates; its linear layers' weights are large enough to matter."""
    torch.manual_seed(5)
    built = OtherModel().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
            elif name.endswith("router.weight"):
                parameter.mul_(4)
    return built


@cache
def expected() -> Expected:
    """PyTorch's whole sequences in float64, without the protocol; no decision is close to a tie."""
    exact = OtherModel().double()
    exact.load_state_dict(model().state_dict())
    with torch.no_grad():
        logits, p, experts = exact(IDS)
    assert (p - 0.5).abs().min() > 10 * SINGLE
    gates = p > 0.5
    assert all(0 < layer.double().mean() < 1 for layer in gates)
    assert sorted(experts.unique().tolist()) == [-1, 0, 1, 2, 3]
    return logits, p, experts


class Weights:
    """The model's parameters as a weight source."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one parameter."""
        return model().get_parameter(name).detach()[start:stop]


@cache
def traced() -> Module:
    """The model's IR, read back from its text."""
    return parse_module(print_module(trace(model())))


def interpreted(interpreter: Interpreter, function: str, chunk: int) -> dict[str, Tensor]:
    """All outputs of `IDS`, `chunk` tokens a call."""
    rows, count = IDS.shape
    zeros = torch.zeros(rows, dtype=torch.int64)
    kept: dict[str, Tensor] = {"kv_len": torch.zeros(other_model.LAYERS, rows, dtype=torch.int64)}
    for index, layer in enumerate(model().new_cache(rows, count).layers):
        kept |= {f"past.{index}.key": layer.key, f"past.{index}.value": layer.value}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, count, chunk):
        ids = IDS[:, start : start + chunk]
        inputs = {
            "input_ids": ids,
            "lengths": zeros + ids.shape[1],
            "position_start": zeros + start,
            "logit_index": torch.arange(ids.shape[1]).expand(rows, -1),
            "gate_force": torch.zeros(other_model.LAYERS, dtype=torch.int8),
            "gate_bias": torch.zeros(rows),
            "min_depth": zeros,
        }
        outputs = interpreter.run(function, inputs | kept)
        kept = {"kv_len": outputs["present.kv_len"]} | {
            name.replace("present.", "past."): outputs[name]
            for name in outputs
            if name.startswith("present.") and name != "present.kv_len"
        }
        parts.append(outputs)
    dims = {"logits": 1, "gates": 2, "gate_p": 2, "experts": 2}
    return {name: torch.cat([part[name] for part in parts], dim) for name, dim in dims.items()}


def assert_equal(got: dict[str, Any], rows: slice, bound: float) -> None:
    """Gates and experts exactly, logits and gate_p within the bound."""
    logits, p, experts = (t.numpy() for t in expected())
    logits, p, experts = logits[rows], p[:, rows], experts[:, rows]
    np.testing.assert_array_equal(got["gates"], p > 0.5)
    np.testing.assert_array_equal(got["experts"], experts)
    np.testing.assert_allclose(got["gate_p"], p, rtol=0, atol=bound)
    np.testing.assert_allclose(got["logits"], logits, rtol=0, atol=bound * np.abs(logits).max())


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize(("function", "chunk"), [("prefill", 20), ("prefill", 3), ("decode", 1)])
def test_the_trace_computes_the_model(function: str, chunk: int, exact: bool) -> None:
    interpreter = Interpreter(traced(), Weights(), exact=exact)
    got = interpreted(interpreter, function, chunk)
    assert_equal(got, slice(None), EXACT if exact else SINGLE)


@pytest.fixture(scope="module", params=["null", "onnxruntime"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The model compiled by the target's own passes."""
    output = tmp_path_factory.mktemp("engine") / request.param
    return liquidc.compile(model(), output, target=request.param, verify_each=True)


def test_engines_compute_the_model(engine: Engine) -> None:
    ids = IDS[0].tolist()
    whole = engine.session(capacity=len(ids)).prefill(ids, every=True)
    assert_equal(asdict(whole), slice(0, 1), SINGLE)
    session = engine.session(capacity=len(ids))
    parts = [session.prefill(ids[:9], every=True, chunk=3)]
    parts += [session.step([token]) for token in ids[9:]]
    dims = {"logits": 1, "gates": 2, "gate_p": 2, "experts": 2}
    stepped = {
        name: np.concatenate([getattr(part, name) for part in parts], dim)
        for name, dim in dims.items()
    }
    assert_equal(stepped, slice(0, 1), SINGLE)


def test_ragged_rows_up_to_the_last_position(engine: Engine) -> None:
    """Padding behind a short row has positions beyond the table of the embeddings."""
    session = engine.session(batch=2, capacity=other_model.CONTEXT)
    first, second = IDS[0].tolist(), IDS[1].tolist()
    session.prefill([first[:19], second[:5]])
    got = session.prefill([first[19:], second[5:20]]).logits[:, 0]
    want = expected()[0][:, -1].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=SINGLE * np.abs(want).max())

"""The null target end to end: engine against the model it came from, in every shape of call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import liquidc
from liquidc.backends.base import StageContext
from liquidc.backends.null.backend import link
from liquidc.backends.null.runner import NullRunner
from liquidc.backends.weights_file import ALIGNMENT, WeightsFile, layout, write_weights
from liquidc.errors import EngineError
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.ir import DType, Module, TensorType, ops, parse_module
from liquidc.ir.weights import Stored, Transpose
from liquidc.runtime import Engine
from liquidc.session import DepthControls
from liquidc.trace_proof import prove
from tests.liquidc.conftest import CONFIG

CASES = [
    ("own", "layer"),
    ("drop", "layer"),
    ("inherit", "layer"),
    ("own", "attn_ffn"),
    ("drop", "ffn"),
    ("drop", "attn"),
]
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 24)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LiquidForCausalLM, Engine]:
    """A model with decisive gates and a shared expert of two experts' width, and its engine."""
    policy, scope = request.param
    gate = {"layers": [1, 2], "kv_policy": policy, "scope": scope}
    moe = CONFIG["moe"] | {"shared_intermediate_size": 32, "shared_gate": "sigmoid"}
    config = CONFIG | {"depth_gate": gate, "moe": moe}
    torch.manual_seed(3)
    model = LiquidForCausalLM(LiquidConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "depth_gate" in name:
                parameter.normal_()
            elif "norm" not in name:
                parameter.mul_(8)
    output = tmp_path_factory.mktemp("null") / "engine"
    return model, liquidc.compile(model, output, target="null", verify_each=True)


@torch.no_grad()
def expected(model: LiquidForCausalLM, ids: list[int], **controls: Any) -> Any:
    return model(torch.tensor([ids]), **controls)


def close(a: np.ndarray, b: torch.Tensor) -> None:
    scale = float(b.abs().max())
    np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=2e-5 * scale)


def test_whole_sequences(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    model, engine = pair
    result, want = engine.evaluate(IDS), expected(model, IDS)
    close(result.logits, want.logits)
    close(result.gate_p, want.gate_p)
    assert (result.gates == want.gates.numpy()).all()
    assert (result.experts == want.experts.numpy()).all()
    assert 0 < result.gates.mean() < 1


def test_chunks_and_steps(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    model, engine = pair
    want = expected(model, IDS).logits[0]
    session = engine.session(capacity=len(IDS))
    parts = [
        session.prefill(IDS[:10], every=True, chunk=4).logits[0],
        session.prefill(IDS[10:12], every=True).logits[0],
    ]
    parts += [session.step([token]).logits[0] for token in IDS[12:]]
    close(np.concatenate(parts), want)


def test_ragged_rows_equal_rows_alone(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    model, engine = pair
    rows = [IDS[:9], IDS[9:12], IDS[12:20]]
    session = engine.session(batch=3, capacity=32)
    result = session.prefill(rows, chunk=5)
    for row, ids in enumerate(rows):
        close(result.logits[row, 0], expected(model, ids).logits[0, -1])
        assert not result.gates[:, row, len(ids) :].any()
    result = session.step([1, 2, 3], active=[True, False, True])
    result = session.step([4, 2, 5])
    for row, ids in enumerate([[*rows[0], 1, 4], [*rows[1], 2], [*rows[2], 3, 5]]):
        close(result.logits[row, 0], expected(model, ids).logits[0, -1])


def test_controls(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    model, engine = pair
    count = len(engine.manifest.model.gates)
    force = tuple((-1, 1)[gate % 2] for gate in range(count))
    got = engine.logits(IDS, depth=DepthControls(gate_force=force))
    want = expected(model, IDS, gate_force=torch.tensor(force, dtype=torch.int8))
    close(got, want.logits[0])
    got = engine.logits(IDS, depth=DepthControls(gate_bias=0.7, min_depth=3))
    want = expected(model, IDS, gate_bias=torch.tensor([0.7]), min_depth=torch.tensor([3]))
    close(got, want.logits[0])


def test_work_follows_the_gates(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    _, engine = pair
    proof = prove(engine, [IDS[:8], IDS[8:]], 6)
    assert proof.holds
    assert sum(proof.gates) < len(proof.gates) * proof.tokens
    assert sorted(proof.experts_traced) == [0, 1, 2, 3]
    for layer, info in enumerate(engine.manifest.model.experts):
        assert (info.experts, info.shared) == (4, 2)
        traced = proof.experts_traced[layer]
        assert traced[4] == traced[5]
        wrong = proof.experts_traced | {layer: traced | {5: traced[5] + 1}}
        assert not replace(proof, experts_traced=wrong).holds


def only_in_run_arms(module: Module) -> set[str]:
    """Weights that nothing but the run arms of gates uses."""
    inside: set[str] = set()
    outside: set[str] = set()
    gated = {
        op
        for gate in module.walk()
        if isinstance(gate, ops.If) and gate.role == "gate"
        for op in gate.then.walk()
    }
    for weight in module.walk():
        if isinstance(weight, ops.Weight):
            for user in weight.y.uses:
                (inside if user in gated else outside).add(weight.weight)
    return inside - outside


def test_a_skipped_layer_plays_no_part(pair: tuple[LiquidForCausalLM, Engine]) -> None:
    """NaN in every weight that only run arms use changes no bit when all gates are off."""
    _, shared = pair
    assert shared.path is not None
    runner = NullRunner(shared.path, shared.manifest)
    engine = shared.with_runner(runner)
    count = len(engine.manifest.model.gates)
    off = DepthControls(gate_force=(-1,) * count)
    on = DepthControls(gate_force=(1,) * count)
    want = engine.logits(IDS, depth=off)
    assert np.isfinite(engine.logits(IDS, depth=on)).all()
    names = only_in_run_arms(runner.module)
    assert len(names) >= count
    for name in names:
        runner.weights[name].fill_(torch.nan)
    np.testing.assert_array_equal(engine.logits(IDS, depth=off), want)
    assert np.isnan(engine.logits(IDS, depth=on)).any()
    runner.close()


class Tensors:
    """Weights in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name]
        return (tensor if tensor.dim() else tensor.reshape(1))[start:stop]


def test_weights_file_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.arange(7),
        "d": torch.tensor([True, False]),
    }
    kinds = {"a": DType.F32, "b": DType.BF16, "c": DType.I64, "d": DType.BOOL}
    stored = {n: Stored(n, TensorType(kinds[n], tuple(t.shape))) for n, t in tensors.items()}
    weights: dict[str, Any] = {**stored, "e": Transpose(stored["a"], (1, 0))}
    written: list[int] = []
    offsets = write_weights(tmp_path / "w", weights, Tensors(tensors), written.append)
    assert offsets == layout(weights)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert sum(written) == 60 + 2 + 56 + 2 + 60
    types = {name: expr.type for name, expr in weights.items()}
    file = WeightsFile(tmp_path / "w", types, offsets)
    for wrong in ({}, offsets | {"e": -1}, offsets | {"e": offsets["e"] + 4}):
        with pytest.raises(EngineError, match=r"the weight [a-e] does not lie in it"):
            WeightsFile(tmp_path / "w", types, wrong)
    for name, tensor in (tensors | {"e": tensors["a"].T}).items():
        rows = tensor.shape[0] if tensor.dim() else 1
        read = file.read_rows(name, 0, rows)
        assert torch.equal(read.reshape(tensor.shape), tensor)
    assert torch.equal(file.read_rows("a", 1, 3), tensors["a"][1:3])
    file.close()


def test_link_keeps_used_weights(tmp_path: Path) -> None:
    module = parse_module(
        """module @m
weight @used : f32[2] = tensor("used", f32[2])
weight @unused : f32[2] = tensor("unused", f32[2])

func @f(%x: f32[2]) -> (y: f32[2]) {
  %w = weight weight="used" : f32[2]
  %y = add %x, %w : f32[2]
  return %y
}
"""
    )
    assert list(link(module, StageContext(tmp_path, Tensors({}))).weights) == ["used"]
    assert list(module.weights) == ["used", "unused"]


def test_an_engine_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine"):
        liquidc.load(tmp_path / "none")

"""bench --depth-bias: what is measured of each bias is what the engine does under it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import liquidc
from liquidc.depth_sweep import SweepOptions, sweep
from liquidc.errors import InputError
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.runtime import Engine, load
from liquidc.session import DepthControls
from liquidc.verify import HeldOut, read_held_out
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import call, ok, refused

BIASES = (-100.0, -0.5, 0.0, 0.5, 100.0)
OPTIONS = SweepOptions(BIASES, windows=3, window=32, cached=4, steps=2)


@pytest.fixture
def engine(null_engine: Path) -> Engine:
    return load(null_engine)


@pytest.fixture
def text(engine: Engine, model_directory: Path) -> HeldOut:
    return read_held_out(model_directory / "heldout.txt", engine)


@torch.no_grad()
def test_bits_and_layers(engine: Engine, text: HeldOut, model_directory: Path) -> None:
    found = sweep(engine, text, OPTIONS)
    model = LiquidForCausalLM.from_directory(model_directory)
    places = len(text.ids) // 32
    starts = [i * places // 3 * 32 for i in range(3)]
    rows = torch.tensor([text.ids[start : start + 32] for start in starts])
    assert [row["depth_bias"] for row in found["rows"]] == list(BIASES)
    for row in found["rows"]:
        out = model(rows[:, :-1], gate_bias=torch.full((3,), row["depth_bias"]))
        nats = float(F.cross_entropy(out.logits.transpose(1, 2), rows[:, 1:]))
        assert row["bits_per_token"] == pytest.approx(nats / math.log(2), rel=1e-5)
        ran = 2 + out.gates.float().sum(0).mean()
        assert row["layers_run"] == pytest.approx(float(ran), rel=1e-6)
        assert row["samples"] == 3 * 2
        size = sum(text.starts[s + 32] - text.starts[s + 1] for s in starts)
        assert row["bits_per_byte"] == pytest.approx(row["bits_per_token"] * 3 * 31 / size)
    layers = [row["layers_run"] for row in found["rows"]]
    assert layers == sorted(layers)
    assert (layers[0], layers[-1]) == (2, 4)


def test_a_floor_guards(engine: Engine, text: HeldOut) -> None:
    options = SweepOptions((-100.0,), min_depth=3, windows=2, window=32, cached=4, steps=2)
    (row,) = sweep(engine, text, options)["rows"]
    assert row["layers_run"] >= 3


def test_bias_zero_is_none(engine: Engine, text: HeldOut) -> None:
    ids = text.ids[:48]
    plain, zero = engine.evaluate(ids), engine.evaluate(ids, depth=DepthControls(gate_bias=0.0))
    assert plain.logits.tobytes() == zero.logits.tobytes()
    assert np.array_equal(plain.gates, zero.gates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SweepOptions((0.0,), window=8, cached=8, steps=1), "can't hold"),
        (SweepOptions((0.0,), window=8, cached=0, steps=1), "can't hold"),
        (SweepOptions((math.inf,)), "must be finite"),
        (SweepOptions((0.0,), min_depth=9), "min_depth must be"),
    ],
)
def test_refused(engine: Engine, text: HeldOut, options: SweepOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep(engine, text, options)
    with pytest.raises(InputError, match="at least 32 are needed"):
        sweep(engine, HeldOut(text.ids[:31]), OPTIONS)


def test_a_model_without_gates(tmp_path: Path) -> None:
    save_model(tmp_path / "m", {**CONFIG, "depth_gate": {}})
    with liquidc.compile(tmp_path / "m", tmp_path / "e", target="null"):
        pass
    refused("no depth gates to bias", "bench", tmp_path / "e", "--depth-bias=1")


def test_the_command(null_engine: Path) -> None:
    options = ("--turns", 2, "--cached", 4, "--steps", 2)
    told = ok("bench", null_engine, "--depth-bias=-100,0", *options)
    assert [row["depth_bias"] for row in told["rows"]] == [-100, 0]
    shown = call("bench", null_engine, "--depth-bias", "-100,0", *options)
    assert shown.exit_code == 0, shown.output
    assert "-100" in shown.stdout
    refused("not a list of numbers", "bench", null_engine, "--depth-bias=deep")

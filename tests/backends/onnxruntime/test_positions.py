"""Positions: batches, padding, gaps and long contexts, with tables of angles and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import liquidc
from liquidc.backends.onnxruntime import emit_rope
from liquidc.backends.onnxruntime.emit import Lowered, lower, place
from liquidc.backends.weights_file import NAME, write_weights
from liquidc.errors import InputError
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.trace import trace
from liquidc.ir import Module, parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.semantics import rope
from liquidc.runtime import Engine

CONTEXT = 16
MODEL: dict[str, Any] = {
    "model_type": "liquid",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
}
GATED = {"layers": [0, 2]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"qk_norm": "head"},
    "heads of 8": {"head_dim": 8},
    "window": {"attention": {"sliding_window": 5}},
    "chunk": {"attention": {"chunk_size": 6}},
    "own": {"depth_gate": {**GATED, "kv_policy": "own"}},
    "own, heads of 8": {"head_dim": 8, "depth_gate": {**GATED, "kv_policy": "own"}},
    "drop": {"depth_gate": {**GATED, "kv_policy": "drop"}},
    "inherit": {"depth_gate": {**GATED, "kv_policy": "inherit"}},
}


def model(**config: Any) -> LiquidForCausalLM:
    """Random weights; about half of the tokens run a gated layer."""
    torch.manual_seed(0)
    made = LiquidForCausalLM(LiquidConfig.from_dict({**MODEL, **config})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return made


@pytest.fixture(
    scope="module", params=[(c, t) for c in CASES for t in ("table", "computed")], ids="-".join
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of a case, its angles from a table or computed from the positions of a call."""
    case, form = request.param
    with pytest.MonkeyPatch.context() as patch:
        if form == "computed":
            patch.setattr(emit_rope, "MAX_TABLE_BYTES", 0)
        made = liquidc.compile(model(**CASES[case]), tmp_path_factory.mktemp("engine") / "e")
    return made


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, count).tolist()


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_a_batch_has_more_tokens_than_the_context(engine: Engine) -> None:
    rows = [ids(CONTEXT - 1, row) for row in range(3)]
    session = engine.session(batch=3)
    found = session.prefill(rows, every=True).logits
    last = session.step([1, 2, 3]).logits
    for row, given in enumerate(rows):
        wanted = engine.logits([*given, row + 1])
        near(found[row], wanted[:-1])
        near(last[row, 0], wanted[-1])


def test_a_batch_has_more_rows_than_the_context(engine: Engine) -> None:
    found = engine.session(batch=CONTEXT + 1, capacity=2).step(list(range(CONTEXT + 1))).logits
    near(found[CONTEXT, 0], engine.logits([CONTEXT])[0])


def test_padding_lies_beyond_the_context(engine: Engine) -> None:
    """Rows that are almost full, then full, beside one that goes on."""
    long, short = ids(CONTEXT, 1), ids(CONTEXT, 2)
    wanted = [engine.logits(row) for row in (long, short)]
    session = engine.session(batch=2)
    session.prefill([long[:-2], short[:2]])
    found = session.prefill([long[-2:-1], short[2:9]], every=True).logits
    near(found[0, 0], wanted[0][-2])
    near(found[1], wanted[1][2:9])
    session.prefill([long[-1:], []])
    near(session.prefill([[], short[9:12]], every=True).logits[1], wanted[1][9:12])
    near(session.step([0, short[12]], active=[False, True]).logits[1, 0], wanted[1][12])


def test_what_a_cache_held_before_plays_no_part(engine: Engine) -> None:
    """Slots that no token has filled may hold anything: NaN, too, which padding may leave there."""
    rows = [ids(9, 3), ids(1, 4), ids(4, 5)]
    found = []
    for filler in (0.0, np.nan):
        session = engine.session(batch=3)
        for buffer in session._cache.buffers.values():  # pyright: ignore
            buffer.update_inplace(np.full(buffer.shape(), filler, np.float32))
        logits = [session.prefill(rows).logits, session.prefill([ids(3, 6), [], [7]]).logits[::2]]
        found.append([*logits, session.step([1, 2, 3]).logits])
    for zeros, nans in zip(*found, strict=True):
        np.testing.assert_array_equal(zeros, nans)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-fixed", "null"])
def test_the_limit_is_a_message(target: str, tmp_path: Path) -> None:
    with liquidc.compile(model(**CASES["own"]), tmp_path / "e", target=target) as engine:
        for ask in (lambda: engine.session(capacity=CONTEXT + 1), lambda: engine.logits([1] * 17)):
            with pytest.raises(InputError, match=f"context of the model, {CONTEXT}$"):
                ask()
        session = engine.session(batch=2)
        with pytest.raises(InputError, match="row 1 holds 0 of 16 tokens; 17 more don't"):
            session.prefill([[1], [1] * 17])
        session.prefill([[1], [1] * CONTEXT])
        with pytest.raises(InputError, match="row 1 holds 16 of 16 tokens; 1 more don't"):
            session.step([1, 1])


SCALED = 'scaling="yarn(4.0, 32.0, 1.0, 64.0, 1.0, 1.2)"'
ROPE = """module @rope {{max_positions = {context}}}
func @prefill(%x: f32[B, T, 2, 16], %position_start: i64[B], %lengths: i64[B])
-> (y: f32[B, T, 2, 16]) {{
  %0 = iota dim="T" : i64[T]
  %1 = reshape %0, shape=[1, "T"] : i64[1, T]
  %2 = reshape %position_start, shape=["B", 1] : i64[B, 1]
  %3 = reshape %lengths, shape=["B", 1] : i64[B, 1]
  %4 = lt %1, %3 : bool[B, T]
  %5 = add %2, %1 : i64[B, T]
  %6 = constant value=[0] : i64[]
  %7 = where %4, %5, %6 : i64[B, T]
  %y = rope %x, %7, theta=10000.0, {scaling} : f32[B, T, 2, 16]
  return %y
}}
"""


def rotated(module: Module, directory: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """What ONNX Runtime makes of a module without weights."""
    lowered: Lowered = lower(module)
    offsets = write_weights(directory / NAME, lowered.weights, NoWeights(), lambda _: None)
    path = directory / "model.onnx"
    path.write_bytes(place(lowered, NAME, offsets).SerializeToString())
    given = {name: value.numpy() for name, value in inputs.items()}
    return ort.InferenceSession(str(path)).run(None, given)[0]


class NoWeights:
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise KeyError(name)


@pytest.mark.parametrize("scaling", ['scaling=""', SCALED], ids=["plain", "yarn"])
@pytest.mark.parametrize("context", [2048, 1 << 24], ids=["table", "computed"])
def test_angles_are_those_of_the_reference(context: int, scaling: str, tmp_path: Path) -> None:
    """At large positions too, where an angle in float32 is a multiple of 1/16 and more."""
    module = parse_module(ROPE.format(context=context, scaling=scaling))
    starts = torch.tensor([0, 1000, context - 9])
    lengths = torch.tensor([9, 4, 9])
    x = torch.randn(3, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "position_start": starts, "lengths": lengths}
    found = rotated(module, tmp_path, inputs)
    wanted = Interpreter(module, NoWeights()).run("prefill", inputs)["y"].numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    each = starts[:, None] + torch.arange(9)
    told = rope(x, each, 10000.0, scaling.partition('"')[2].rstrip('"')).numpy()
    valid = (torch.arange(9) < lengths[:, None]).numpy()
    np.testing.assert_allclose(found[valid], told[valid], rtol=0, atol=2e-6)
    assert ((tmp_path / NAME).stat().st_size > 0) == (context == 2048)


def test_a_long_context_costs_nothing() -> None:
    """Neither graph nor weights; layers that rotate alike share one table."""
    sizes = {}
    for context in (CONTEXT, 131_072, 10_485_760):
        module = trace(model())
        module.attributes["max_positions"] = context
        lowered = lower(module)
        tables = [name for name in lowered.weights if name.startswith("rope.")]
        sizes[context] = lowered.model.ByteSize(), len(tables)
    assert sizes[131_072] == (pytest.approx(sizes[CONTEXT][0], abs=64), 2)
    assert sizes[10_485_760][0] < sizes[CONTEXT][0] + 4000
    assert [count for _, count in sizes.values()] == [2, 2, 0]


def test_a_context_that_is_not_named_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions around a million, of a module whose config says nothing, as PyTorch has them."""
    made = model()
    monkeypatch.delattr(LiquidConfig, "to_dict")
    with liquidc.compile(made, tmp_path / "e") as engine:
        assert engine.manifest.model.context is None
        with pytest.raises(InputError, match="names no context: give a capacity"):
            engine.session()
        given, start = ids(6, 0), 1_000_000
        session = engine.session(capacity=8)
        session.lengths[:], session.capacity = start, start + 8
        found = session.prefill(given, every=True).logits[0]
    with torch.no_grad():
        wanted = made(torch.tensor([given]), position_start=torch.tensor([start])).logits[0].numpy()
    near(found, wanted)


def test_derived_positions_are_computed(tmp_path: Path) -> None:
    """A module may rotate by positions of its own, negative ones too: no table has those."""
    text = ROPE.format(context=2048, scaling='scaling=""')
    text = text.replace("%y = rope %x, %7", "%8 = sub %7, %9 : i64[B, T]\n  %y = rope %x, %8")
    text = text.replace("%7 = where", "%9 = constant value=[5] : i64[]\n  %7 = where")
    module = parse_module(text)
    x = torch.randn(1, 9, 2, 16)
    inputs = {"x": x, "position_start": torch.tensor([2]), "lengths": torch.tensor([9])}
    wanted = Interpreter(module, NoWeights()).run("prefill", inputs)["y"].numpy()
    np.testing.assert_allclose(rotated(module, tmp_path, inputs), wanted, rtol=0, atol=2e-6)

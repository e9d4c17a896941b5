"""Every family against transformers: whole, with a cache, and as an engine token by token."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import liquidc
from liquidc.frontend.families import families
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.runtime import Engine
from tests.frontend.families.cases import CASES, Case

PROMPT, STEPS = 8, 32
CLOSE = 1e-4
"""Of the largest logit. Both compute in float32, in another order: 1e-6 is what is seen."""
FIRST = [
    next(n for n, c in CASES.items() if c.kind == kind)
    for kind in {c.kind: 0 for c in CASES.values()}
]


def tokens() -> torch.Tensor:
    """Two rows of ids, i64[2, PROMPT + STEPS]."""
    return torch.randint(97, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def save(case: Case, directory: Path) -> torch.Tensor:
    """Write the checkpoint; the logits of `tokens` by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.model()
        case.save(model, directory)
        with torch.no_grad():
            return model(tokens()).logits


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


def test_every_family_has_a_case() -> None:
    kinds = {"ddllama", "ddqwen3", "llama4"}  # tests of their own, and another name of llama4_text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES.values():
            kinds.add(case.model().config.model_type)
    assert kinds == families().keys()


@pytest.mark.parametrize("name", CASES)
def test_the_model(name: str, tmp_path: Path) -> None:
    want, ids = save(CASES[name], tmp_path), tokens()
    model = LiquidForCausalLM.from_directory(tmp_path).eval()
    with torch.no_grad():
        assert error(model(ids).logits, want) < CLOSE
        out = model(ids[:, :PROMPT], model.new_cache(2, PROMPT + STEPS))
        parts = [out.logits]
        for step in range(PROMPT, PROMPT + STEPS):
            out = model(ids[:, step : step + 1], out.cache)
            parts.append(out.logits)
    assert error(torch.cat(parts, 1), want) < CLOSE


def through(engine: Engine, chunk: int) -> torch.Tensor:
    """Logits of prefill in chunks, then of single steps."""
    ids: Any = tokens().tolist()
    session = engine.session(batch=2, capacity=PROMPT + STEPS)
    prompts = [row[:PROMPT] for row in ids]
    parts = [session.prefill(prompts, every=True, chunk=chunk).logits]
    for step in range(PROMPT, PROMPT + STEPS):
        parts.append(session.step([row[step] for row in ids]).logits)
    return torch.from_numpy(np.concatenate(parts, 1))


def check_engine(name: str, directory: Path, target: str) -> None:
    want = save(CASES[name], directory / "model")
    with liquidc.compile(directory / "model", directory / "engine", target=target) as engine:
        for chunk in (PROMPT, 3):
            assert error(through(engine, chunk), want) < CLOSE


@pytest.mark.parametrize("name", FIRST)
def test_the_engine(name: str, tmp_path: Path) -> None:
    check_engine(name, tmp_path, "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["null", "onnxruntime-fixed", "onnxruntime"])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_of_every_target(name: str, target: str, tmp_path: Path) -> None:
    if target != "onnxruntime" or name not in FIRST:
        check_engine(name, tmp_path, target)

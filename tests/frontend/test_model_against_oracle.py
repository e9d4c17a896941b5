"""The PyTorch model computes what the oracle computes, for every policy x scope x scale target.

In float32 within the bound of rounding (`tests.oracle.reference.tolerance`), and in float64, where
the same bound is near 1e-13 and hides nothing. Decisions and experts are equal, always: the grid
keeps them away from ties, and the edge cases tie exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidCache, LiquidForCausalLM, LiquidOutput
from tests.oracle.grid import Batch, Case, edge_cases, grid
from tests.oracle.reference import Reference, assert_matches, reference, tolerance

CASES = [*grid(), *edge_cases()]
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES), ids=["float32", "float64"])


@each_dtype
@each_case
def test_whole_batches(case: Case, dtype: torch.dtype) -> None:
    """Every batch and control of the case in one forward over an empty cache."""
    model = build(case, dtype)
    for expected in reference(case):
        cache = model.new_cache(*expected.batch.input_ids.shape)
        output = forward(model, expected.batch, cache)
        check(case, expected, [output], dtype)


@each_dtype
@pytest.mark.parametrize("size", [3, 1], ids=["chunks", "tokens"])
@each_case
def test_pieces(case: Case, dtype: torch.dtype, size: int) -> None:
    """Ragged and controlled batches in pieces, rows ending in the middle, over one cache."""
    model = build(case, dtype)
    chosen = ("ragged", "mixed") if size > 1 else ("ragged", "floor")
    for expected in reference(case):
        if expected.batch.name not in chosen:
            continue
        rows, capacity = expected.batch.input_ids.shape
        cache = model.new_cache(rows, capacity)
        outputs: list[LiquidOutput] = []
        for piece in expected.batch.chunks(size):
            outputs.append(forward(model, piece, cache))
            cache = outputs[-1].cache
        check(case, expected, outputs, dtype)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@each_dtype
@each_case
def test_without_cache(case: Case, dtype: torch.dtype, grad: bool) -> None:
    """A forward without a cache, and the same with gradients on (every layer computed, masked)."""
    model = build(case, dtype)
    for expected in reference(case):
        with torch.set_grad_enabled(grad):
            output = forward(model, expected.batch, None)
        check(case, expected, [output], dtype)


def build(case: Case, dtype: torch.dtype) -> LiquidForCausalLM:
    """The model with the case's weights."""
    model = LiquidForCausalLM(LiquidConfig.from_dict(case.config))
    weights = {name: torch.tensor(value) for name, value in case.weights().items()}
    model.load_state_dict(weights, strict=True)
    return model.to(dtype).eval()


def forward(model: LiquidForCausalLM, batch: Batch, cache: LiquidCache | None) -> LiquidOutput:
    """One forward of the batch with its controls."""
    rows = len(batch.prompts)
    with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
        return model(
            torch.tensor(batch.input_ids),
            cache,
            lengths=torch.tensor(batch.lengths),
            position_start=torch.tensor(batch.starts),
            gate_force=None
            if batch.gate_force is None
            else torch.tensor(batch.gate_force, dtype=torch.int8),
            gate_bias=torch.tensor(batch.gate_bias or [0.0] * rows),
            min_depth=torch.tensor(batch.min_depth or [0] * rows),
        )


def check(case: Case, expected: Reference, outputs: list[LiquidOutput], dtype: torch.dtype) -> None:
    """Compare the outputs of consecutive pieces with the oracle, the cache's lengths too."""

    def join(field: Callable[[LiquidOutput], Tensor | None], axis: int) -> np.ndarray | None:
        parts = [part for output in outputs if (part := field(output)) is not None]
        return torch.cat(parts, axis).detach().numpy() if parts else None

    found = {
        "logits": join(lambda o: o.logits, 1),
        "gates": join(lambda o: o.gates, 2),
        "gate_p": join(lambda o: o.gate_p, 2),
        "gate_score": join(lambda o: o.gate_score, 2),
        "experts": join(lambda o: o.experts, 2),
    }
    assert (found["experts"] is None) == (expected.experts is None)
    assert_matches(expected, found, tolerance(case.config, DTYPES[dtype]))
    cache = outputs[-1].cache
    if cache is not None:
        lengths = torch.stack([layer.length for layer in cache.layers]).numpy()
        assert (lengths == expected.kv_len).all()

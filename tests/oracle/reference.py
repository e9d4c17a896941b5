"""What the oracle says about a case, as arrays, and the comparison of an implementation with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle.grid import Batch, Case, edge_cases, grid
from tests.oracle.liquid_numpy import Oracle, TokenResult

MARGIN = 1e-5
"""Every decision of `grid()` is at least this far from flipping; float32 computes p to 1e-6."""


@dataclass(frozen=True)
class Reference:
    """The outputs of a batch, float64; at padding `gates` is false, `experts` -1, the rest NaN.

    Attributes:
        batch: The inputs.
        valid: bool[B, T].
        logits: [B, T, V].
        gates: bool[G, B, T].
        gate_p: [G, B, T].
        gate_score: [G, B, T].
        experts: i64[L, B, T, k], or None in a model without experts.
        gate_margin: [G, B, T], inf where the router does not decide.
        expert_margin: [L, B, T], inf where nothing is chosen.
        kv_len: Cache length of every layer and row afterwards, i64[L, B].
    """

    batch: Batch
    valid: NDArray[np.bool_]
    logits: NDArray[np.float64]
    gates: NDArray[np.bool_]
    gate_p: NDArray[np.float64]
    gate_score: NDArray[np.float64]
    experts: NDArray[np.int64] | None
    gate_margin: NDArray[np.float64]
    expert_margin: NDArray[np.float64]
    kv_len: NDArray[np.int64]


def run(oracle: Oracle, batch: Batch) -> Reference:
    """The oracle on a batch, row by row and token by token."""
    rows = len(batch.prompts)
    shape = batch.input_ids.shape
    layers, gates = oracle.num_layers, len(oracle.gate_names)
    k = oracle.moe["num_experts_per_tok"]
    out = Reference(
        batch=batch,
        valid=np.arange(shape[1], dtype=np.int64) < batch.lengths[:, None],
        logits=np.full((*shape, oracle.config["vocab_size"]), np.nan),
        gates=np.zeros((gates, *shape), np.bool_),
        gate_p=np.full((gates, *shape), np.nan),
        gate_score=np.full((gates, *shape), np.nan),
        experts=np.full((layers, *shape, k), -1) if oracle.moe["num_experts"] else None,
        gate_margin=np.full((gates, *shape), np.inf),
        expert_margin=np.full((layers, *shape), np.inf),
        kv_len=np.zeros((layers, rows), np.int64),
    )
    for b, prompt in enumerate(batch.prompts):
        sequence = oracle.sequence(int(batch.starts[b]))
        for t, token in enumerate(prompt):
            result: TokenResult = sequence.step(
                token,
                gate_force=batch.gate_force,
                gate_bias=batch.gate_bias[b] if batch.gate_bias else 0.0,
                min_depth=batch.min_depth[b] if batch.min_depth else 0,
            )
            out.logits[b, t] = result.logits
            out.gates[:, b, t] = result.gates
            out.gate_p[:, b, t] = result.gate_p
            out.gate_score[:, b, t] = result.gate_score
            out.gate_margin[:, b, t] = result.gate_margin
            out.expert_margin[:, b, t] = result.expert_margin
            if out.experts is not None:
                out.experts[:, b, t] = np.reshape(result.experts, (layers, k))
        out.kv_len[:, b] = [len(keys) for keys in sequence.keys]
    return out


def reference(case: Case) -> list[Reference]:
    """The oracle on every batch of a case of `grid()` or `edge_cases()`; computed once."""
    return _reference(case.name)


@cache
def _reference(name: str) -> list[Reference]:
    case = next(case for case in (*grid(), *edge_cases()) if case.name == name)
    oracle = case.oracle()
    return [run(oracle, batch) for batch in case.batches()]


def tolerance(config: Mapping[str, Any], dtype: type[np.floating[Any]] = np.float32) -> float:
    """Bound on the error of logits, relative to the largest |logit|, and of p and s in `dtype`.

    A dot product of n terms has a relative rounding error of about sqrt(n) u (Higham and Mary
    2019; u is half the machine epsilon; n u is the worst case and never met). The longest path
    through a layer has ten roundings of that size (two norms, q or k, scores, mixed values,
    output, gate or up, product, down, sum), n at most the widest tensor. They are added up over
    the layers and the head without the cancellation of random signs, which leaves room for the
    residual stream's amplification.
    """
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    widest = max(config["hidden_size"], config["intermediate_size"], heads * head_dim)
    steps = 10 * config["num_hidden_layers"] + 2
    return steps * float(np.sqrt(widest)) * float(np.finfo(dtype).eps) / 2


def assert_matches(
    expected: Reference, outputs: Mapping[str, NDArray[Any] | None], bound: float
) -> None:
    """Compare an implementation's outputs (names and shapes as in `Reference`) with the oracle.

    Decisions and experts must be equal, at padding too; "logits" within `bound` of the largest
    |logit|, "gate_p" within `bound`, "gate_score" within `bound` of max(1, |score|). Names that
    are missing or None in `outputs` are not compared.

    Raises:
        AssertionError: with the first difference.
    """
    name, valid = expected.batch.name, expected.valid
    for key in ("gates", "experts"):
        got, want = outputs.get(key), getattr(expected, key)
        if got is not None and want is not None:
            wrong = np.argwhere(got != want)
            assert not len(wrong), f"{name}: {key} differ at {wrong[0]}, {len(wrong)} in all"
    scales = {
        "logits": float(np.abs(expected.logits[valid]).max()),
        "gate_p": 1.0,
        "gate_score": max(1.0, float(np.abs(expected.gate_score[:, valid]).max(initial=0))),
    }
    for key, scale in scales.items():
        got = outputs.get(key)
        if got is None:
            continue
        want = getattr(expected, key)
        assert got.shape == want.shape, f"{name}: {key} has shape {got.shape}, not {want.shape}"
        mask = valid if key == "logits" else np.broadcast_to(valid, got.shape)
        error = float(np.abs(got[mask] - want[mask]).max(initial=0.0)) / scale
        assert error <= bound, f"{name}: {key} differ by {error:.2e} relative, bound {bound:.2e}"

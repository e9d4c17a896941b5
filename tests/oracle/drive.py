"""Feeds the batches of the grid to anything that has the inputs and outputs of @prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle.grid import Batch, Case

Arrays = dict[str, NDArray[Any]]
CAPACITY = 40
"""Slots of every cache: more than the longest batch needs."""


def empty_cache(case: Case, rows: int, dtype: Any = np.float32) -> Arrays:
    """`kv_len` and `past.*` before the first token."""
    config = case.config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    shape = (rows, config["num_key_value_heads"], CAPACITY, width)
    layers = config["num_hidden_layers"]
    cache: Arrays = {"kv_len": np.zeros((layers, rows), np.int64)}
    for layer in range(layers):
        for part in ("key", "value"):
            cache[f"past.{layer}.{part}"] = np.zeros(shape, dtype)
    return cache


def controls(case: Case, batch: Batch) -> Arrays:
    """The inputs of a chunk, apart from the cache; every position's logits are asked for."""
    rows, tokens = batch.input_ids.shape
    inputs: Arrays = {
        "input_ids": batch.input_ids,
        "lengths": batch.lengths,
        "position_start": batch.starts,
        "logit_index": np.tile(np.arange(tokens), (rows, 1)),
    }
    if case.num_gates:
        force = batch.gate_force or (0,) * case.num_gates
        inputs["gate_force"] = np.array(force, np.int8)
        inputs["gate_bias"] = np.array(batch.gate_bias or (0.0,) * rows, np.float32)
        inputs["min_depth"] = np.array(batch.min_depth or (0,) * rows, np.int64)
    return inputs


def drive(
    case: Case,
    batch: Batch,
    step: Callable[[Arrays], Mapping[str, NDArray[Any]]],
    chunk: int | None = None,
) -> Arrays:
    """Run a batch, whole or in chunks; the outputs of all its tokens and the last cache.

    Args:
        case: the model's config.
        batch: the prompts.
        step: one call of @prefill (or @decode, with chunk 1).
        chunk: tokens of a call; None for all at once.
    """
    rows = len(batch.prompts)
    cache = empty_cache(case, rows)
    pieces = [batch] if chunk is None else batch.chunks(chunk)
    parts: dict[str, list[NDArray[Any]]] = {"logits": [], "gates": [], "gate_p": [], "experts": []}
    for piece in pieces:
        outputs = step({**controls(case, piece), **cache})
        for name, values in parts.items():
            if name in outputs:
                values.append(outputs[name])
        cache = {
            name.replace("present.kv_len", "kv_len").replace("present", "past"): value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
    joined = {
        name: np.concatenate(values, 1 if name == "logits" else 2)
        for name, values in parts.items()
        if values
    }
    return joined | cache

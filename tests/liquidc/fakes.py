"""A tiny target in memory: a language model whose answers are known without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.base import Arrays, Cache, Runner, Trace
from liquidc.manifest import (
    SCHEMA,
    CacheInfo,
    CostInfo,
    EntryPoint,
    ExpertInfo,
    GateInfo,
    Manifest,
    ModelInfo,
    RegionInfo,
    TensorSpec,
)

LAYERS, VOCABULARY, CONTEXT, EXPERTS = 4, 256, 32, 4
GATED = (1, 2)


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def manifest(**changes: Any) -> Manifest:
    """The manifest of the fake engine."""
    inputs = (
        spec("input_ids", "i64", "B", "T"),
        spec("lengths", "i64", "B"),
        spec("position_start", "i64", "B"),
        spec("logit_index", "i64", "B", "P"),
        spec("gate_force", "i8", len(GATED)),
        spec("gate_bias", "f32", "B"),
        spec("min_depth", "i64", "B"),
    )
    outputs = (spec("logits", "f32", "B", "P", VOCABULARY),)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "liquidc": "0.1.0",
        "model": ModelInfo(
            sha256="0" * 64,
            type="liquid",
            layers=LAYERS,
            vocabulary=VOCABULARY,
            context=CONTEXT,
            gates=tuple(
                GateInfo(layer, 0.5, "gt", regions=(RegionInfo(0, "compact", (gate,)),))
                for gate, layer in enumerate(GATED)
            ),
            experts=(ExpertInfo(3, EXPERTS, 2),),
        ),
        "target": {"name": "null", "format": "1"},
        "passes": (),
        "functions": {"prefill": EntryPoint(inputs, outputs)},
        "files": {},
        "tools": {},
        "cost": CostInfo(1000, (100, 200), (1, 2)),
        "artifact": {},
        "cache": CacheInfo(LAYERS, "f32", ("B", 2, "S", 8), "drop"),
    }
    return Manifest(**(values | changes))


@dataclass
class FakeCache:
    batch: int
    capacity: int
    length: NDArray[np.int64] = field(default_factory=lambda: np.zeros((LAYERS, 1), np.int64))

    @property
    def kv_len(self) -> NDArray[np.int64]:
        return self.length.copy()

    def rewind(self, kv_len: NDArray[np.int64]) -> None:
        self.length = kv_len.copy()


@dataclass
class FakeRunner(Runner):
    """Predicts `next_token(token, position)`; token t runs layer 1 if t is even, layer 2 if t > 99.

    Layer 3 sends token t to the experts t mod 4 and (t + 1) mod 4. `work` counts extra rows that
    the profiler sees, which a test uses to break the proof.
    """

    next_token: Callable[[int, int], int] = lambda token, position: (token + 1) % VOCABULARY
    calls: list[dict[str, NDArray[Any]]] = field(default_factory=list[dict[str, NDArray[Any]]])
    extra_rows: int = 0
    closed: bool = False
    gates_run: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(GATED), np.int64))
    experts_run: NDArray[np.int64] = field(default_factory=lambda: np.zeros(EXPERTS, np.int64))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return FakeCache(batch, capacity, np.zeros((LAYERS, batch), np.int64))

    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        assert isinstance(cache, FakeCache)
        self.calls.append(dict(inputs))
        ids, lengths = inputs["input_ids"], inputs["lengths"]
        batch, count = ids.shape
        valid = np.arange(count)[None, :] < lengths[:, None]
        natural = np.stack([ids % 2 == 0, ids > 99])
        force = inputs["gate_force"][:, None, None]
        gates = np.where(force == 0, natural, force > 0) & valid
        experts = np.full((LAYERS, batch, count, 2), -1, np.int64)
        experts[3] = np.where(valid[..., None], np.stack([ids % 4, (ids + 1) % 4], -1), -1)
        index = inputs["logit_index"]
        logits = np.zeros((*index.shape, VOCABULARY), np.float32)
        for row in range(batch):
            for place, at in enumerate(index[row]):
                position = int(inputs["position_start"][row] + at)
                logits[row, place, self.next_token(int(ids[row, at]), position)] = 8.0
        cache.length += lengths
        self.gates_run += gates.sum((1, 2))
        chosen = experts[3][experts[3] >= 0]
        self.experts_run += np.bincount(chosen, minlength=EXPERTS)
        p = np.where(natural, 0.9, 0.1).astype(np.float32)
        return {"logits": logits, "gates": gates, "gate_p": p, "experts": experts}

    def profile(self, work: Callable[[Runner], None]) -> Trace:
        inner = FakeRunner(self.next_token)
        work(inner)
        rows = {(gate, 0): int(n) + self.extra_rows for gate, n in enumerate(inner.gates_run)}
        return Trace(rows, {3: {e: int(n) for e, n in enumerate(inner.experts_run)}})

    def close(self) -> None:
        self.closed = True

"""How close an engine is to its reference, measured in the model's own terms.

Everything is accumulated window by window, so memory does not grow with the text. Formulas:

* `logits_max_rel` = max |engine - reference| / max |reference|, over all positions.
* `kl_nats` = mean over positions of KL(reference || engine), in nats.
* `gate_agreement` = equal decisions / decisions, counted outside the tie band: a gate whose p is,
  on both sides, within twice the measured max |Δp| (at most 1e-4) of its threshold may fall
  either way.
* `expert_overlap` = mean over (layer, token) that both ran of |A ∩ B| / k.
* `bits_per_byte` = -log2 of the probability of the text, per byte of it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquidc.manifest import GateInfo
from liquidc.sampling import log_softmax

MAX_TIE_BAND = 1e-4
"""The tie band never reaches farther from the threshold than this, whatever was measured."""

LISTED = 20
"""Flips that a report lists one by one; all are counted."""


@dataclass(slots=True)
class LogitMetrics:
    """Differences of logits, and how well each side predicts the text."""

    max_abs: float = 0.0
    sum_abs: float = 0.0
    max_reference: float = 0.0
    kl: float = 0.0
    top1: int = 0
    positions: int = 0
    elements: int = 0
    nats: float = 0.0
    nats_reference: float = 0.0
    bytes: int = 0

    def add(self, engine: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        """Compare the logits [T, V] of one window."""
        difference = np.abs(engine.astype(np.float64) - reference)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.sum_abs += float(difference.sum())
        self.elements += difference.size
        self.max_reference = max(self.max_reference, float(np.abs(reference).max()))
        p, q = log_softmax(reference), log_softmax(engine)
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.top1 += int((engine.argmax(-1) == reference.argmax(-1)).sum())
        self.positions += len(engine)

    def add_text(
        self,
        engine: NDArray[np.float32],
        reference: NDArray[np.float32],
        targets: NDArray[np.int64],
        size: int,
    ) -> None:
        """Count how well the logits [T, V] predict the next tokens [T], which make `size` bytes."""
        rows = np.arange(len(targets))
        self.nats -= float(log_softmax(engine)[rows, targets].sum())
        self.nats_reference -= float(log_softmax(reference)[rows, targets].sum())
        self.bytes += size

    def report(self) -> dict[str, Any]:
        """The metrics by their JSON keys."""
        bits = 1 / (math.log(2) * self.bytes) if self.bytes else None
        return {
            "logits_max_rel": self.max_abs / self.max_reference if self.max_reference else 0.0,
            "logits_max_abs": self.max_abs,
            "logits_mean_abs": self.sum_abs / max(self.elements, 1),
            "kl_nats": max(self.kl / max(self.positions, 1), 0.0),
            "top1_agreement": self.top1 / max(self.positions, 1),
            "bits_per_byte": None if bits is None else self.nats * bits,
            "bits_per_byte_reference": None if bits is None else self.nats_reference * bits,
        }


@dataclass(frozen=True, slots=True)
class Flip:
    """A gate that decided differently."""

    window: int
    token: int
    gate: int
    layer: int
    p: float
    p_reference: float
    tie: bool


@dataclass(slots=True)
class GateMetrics:
    """Decisions of the gates, engine against reference."""

    gates: tuple[GateInfo, ...]
    max_delta: float = 0.0
    decisions: int = 0
    agreed: int = 0
    _near: list[tuple[float, bool]] = field(default_factory=list[tuple[float, bool]])
    _flips: list[Flip] = field(default_factory=list[Flip])

    def add(
        self,
        window: int,
        p: NDArray[np.float32],
        decided: NDArray[np.bool_],
        p_reference: NDArray[np.float32],
        decided_reference: NDArray[np.bool_],
        start: int = 0,
    ) -> None:
        """Compare p and decisions, each [G, T]; the routes up to each decision must be equal.

        Gates that were fixed at compile time decide nothing and are left out.

        Args:
            window: number of the window, for the list of flips.
            p: of the engine.
            decided: of the engine.
            p_reference: of the reference.
            decided_reference: of the reference.
            start: index of the first token.
        """
        free = [index for index, gate in enumerate(self.gates) if not gate.fixed]
        if not p.size or not free:
            return
        p, p_reference = p[free], p_reference[free]
        decided, decided_reference = decided[free], decided_reference[free]
        gates = [self.gates[index] for index in free]
        delta = np.abs(p.astype(np.float64) - p_reference)
        self.max_delta = max(self.max_delta, float(delta.max()))
        tau = np.array([gate.threshold for gate in gates])[:, None]
        distance = np.maximum(np.abs(p.astype(np.float64) - tau), np.abs(p_reference - tau))
        reserved = np.array([gate.reserved for gate in gates])[:, None]
        tokens: NDArray[np.int64] = np.arange(start, start + p.shape[1], dtype=np.int64)
        forced = tokens[None, :] < reserved
        same = decided == decided_reference
        self.decisions += int(same.size)
        self.agreed += int(same.sum())
        close: NDArray[np.bool_] = (distance <= MAX_TIE_BAND) & ~forced
        self._near += [(float(distance[at]), bool(same[at])) for at in _where(close)]
        for gate, token in _where(~same):
            self._flips.append(
                Flip(
                    window,
                    start + token,
                    free[gate],
                    gates[gate].layer,
                    float(p[gate, token]),
                    float(p_reference[gate, token]),
                    bool(close[gate, token]),
                )
            )

    @property
    def band(self) -> float:
        """Half the width of the tie band around each threshold."""
        return min(2 * self.max_delta, MAX_TIE_BAND)

    def report(self) -> dict[str, Any]:
        """The metrics by their JSON keys."""
        inside = [same for distance, same in self._near if distance <= self.band]
        counted = self.decisions - len(inside)
        agreed = self.agreed - sum(inside)
        flips = [self._shown(flip) for flip in self._flips[:LISTED]]
        return {
            "gate_agreement": agreed / counted if counted else 1.0,
            "gate_decisions": self.decisions,
            "gate_flips": len(self._flips),
            "gate_ties": len(inside),
            "gate_tie_band": self.band,
            "gate_p_max_abs": self.max_delta,
            "gate_flips_listed": flips,
        }

    def _shown(self, flip: Flip) -> dict[str, Any]:
        tau = self.gates[flip.gate].threshold
        return {
            "window": flip.window,
            "token": flip.token,
            "gate": flip.gate,
            "layer": flip.layer,
            "p": flip.p,
            "p_reference": flip.p_reference,
            "threshold": tau,
            "tie": flip.tie and abs(flip.p_reference - tau) <= self.band,
        }


@dataclass(slots=True)
class ExpertMetrics:
    """Chosen experts, engine against reference."""

    overlap: float = 0.0
    tokens: int = 0
    differing: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(
        self, window: int, engine: NDArray[np.int64], reference: NDArray[np.int64], start: int = 0
    ) -> None:
        """Compare the experts [L, T, k] of one window; -1 is none."""
        both = np.asarray((engine >= 0).any(-1) & (reference >= 0).any(-1))
        k = engine.shape[-1]
        for layer, token in _where(both):
            ours = {int(e) for e in engine[layer, token] if e >= 0}
            theirs = {int(e) for e in reference[layer, token] if e >= 0}
            self.overlap += len(ours & theirs) / k
            self.tokens += 1
            if ours != theirs and len(self.differing) < LISTED:
                self.differing.append(
                    {
                        "window": window,
                        "token": start + token,
                        "layer": layer,
                        "experts": sorted(ours),
                        "experts_reference": sorted(theirs),
                    }
                )

    def report(self) -> dict[str, Any]:
        """The metrics by their JSON keys; overlap is None in a model without experts."""
        return {
            "expert_overlap": self.overlap / self.tokens if self.tokens else None,
            "expert_differences_listed": self.differing,
        }


@dataclass(slots=True)
class DepthMetrics:
    """How many layers tokens run: histograms of the engine and of the reference."""

    layers: int
    layer_of_gate: tuple[int, ...]
    engine: Counter[int] = field(default_factory=Counter[int])
    reference: Counter[int] = field(default_factory=Counter[int])

    def add(self, engine: NDArray[np.bool_], reference: NDArray[np.bool_]) -> None:
        """Count the decisions [G, T] of one window."""
        for counter, gates in ((self.engine, engine), (self.reference, reference)):
            depths = depth_of(gates, self.layer_of_gate, self.layers)
            counter.update(int(depth) for depth in depths)

    def report(self) -> dict[str, Any]:
        """Tokens by number of layers run, from 0 to all, and the means."""
        return {
            "depth_histogram": [self.engine[n] for n in range(self.layers + 1)],
            "depth_histogram_reference": [self.reference[n] for n in range(self.layers + 1)],
            "depth_mean": _mean(self.engine),
            "depth_mean_reference": _mean(self.reference),
        }


def depth_of(
    gates: NDArray[np.bool_], layer_of_gate: tuple[int, ...], layers: int
) -> NDArray[np.int64]:
    """Layers run by token, i64[T], from decisions [G, T]; a layer runs when all its gates do."""
    ran = np.ones((layers, gates.shape[1]), np.bool_)
    for gate, layer in enumerate(layer_of_gate):
        ran[layer] &= gates[gate]
    return ran.sum(0)


def decide(
    gates: tuple[GateInfo, ...], p: NDArray[np.float32], start: int = 0
) -> NDArray[np.bool_]:
    """What gates with probabilities p [G, T] decide for tokens from `start` on, unforced."""
    decided = np.zeros(p.shape, np.bool_)
    tokens: NDArray[np.int64] = np.arange(start, start + p.shape[1], dtype=np.int64)
    for index, gate in enumerate(gates):
        tau = np.float32(gate.threshold)
        above = p[index] > tau if gate.compare == "gt" else p[index] >= tau
        decided[index] = gate.fixed > 0 if gate.fixed else above | (tokens < gate.reserved)
    return decided


def matching(ours: list[int], theirs: list[int], count: int) -> int:
    """How many of `count` tokens agree before the first that differs."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return count if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _mean(counter: Counter[int]) -> float:
    total = counter.total()
    return sum(depth * count for depth, count in counter.items()) / total if total else 0.0


def _where(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The places [i, j] where a mask holds."""
    return [(int(i), int(j)) for i, j in np.argwhere(mask)]

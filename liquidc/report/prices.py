"""What tokens cost in an engine: one that takes a path, and all of a profile on average."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from liquidc import facts
from liquidc.ir import Module
from liquidc.ir.cost import Cost, Place, costs
from liquidc.manifest import Manifest
from liquidc.profile import Profile

CONTEXT = 1024
"""Tokens in the cache that costs are stated for, or the model's context if that is less."""
QUANTILES = (0.1, 0.5, 0.9)

Costs = Mapping[Place, Cost]
Share = Callable[[Place], float]


class Prices:
    """What tokens cost in an engine, alone and on average.

    Attributes:
        context: tokens in the cache.
        rates: the share of tokens for which each gate runs; None without a profile.
        paths: tokens by depth path; None where that is not known.
    """

    def __init__(self, manifest: Manifest, module: Module, profile: Profile | None) -> None:
        self._manifest, self._module = manifest, module
        self._main = costs(module, facts.main_function(module))
        self._gates = manifest.model.gates
        self._dropped = manifest.cache is not None and manifest.cache.policy == "drop"
        self.context = min(CONTEXT, manifest.model.context or CONTEXT)
        self.rates: list[float] | None = None
        self.paths: Counter[str] | None = None
        if profile is not None:
            rates = [profile.rate(index) for index in range(len(self._gates))]
            self.rates = [
                max(gate.fixed, 0) if gate.fixed else rate
                for gate, rate in zip(self._gates, rates, strict=True)
            ]
        if profile is not None and profile.paths.gates == len(self._gates):
            self.paths = Counter()
            for path, count in profile.paths.counts.items():
                self.paths[self.path(path)] += count

    def path(self, path: str) -> str:
        """The path that tokens with a profiled path take in this engine: some gates are fixed."""
        return "".join(
            digit if not gate.fixed else "1" if gate.fixed > 0 else "0"
            for digit, gate in zip(path, self._gates, strict=True)
        )

    def depth(self, path: str) -> int:
        """Layers whose gates all run; a layer without gates always does."""
        skipped = {g.layer for g, digit in zip(self._gates, path, strict=True) if digit == "0"}
        return self._manifest.model.layers - len(skipped)

    def rate(self, layer: int) -> float | None:
        """The share of tokens that run a layer; None where that is not known."""
        gates = [index for index, gate in enumerate(self._gates) if gate.layer == layer]
        if self.rates is None:
            return None
        if len(gates) <= 1:
            return self.rates[gates[0]] if gates else 1.0
        if self.paths is None:
            return None
        ran = (n for path, n in self.paths.items() if all(path[gate] == "1" for gate in gates))
        return sum(ran) / self.paths.total()

    def mean_depth(self) -> float | None:
        """Layers that a token of the profile runs."""
        rates = [self.rate(layer) for layer in range(self._manifest.model.layers)]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if len(known) == len(rates) else None

    def amount(self, paid: Costs, share: Share) -> dict[str, float]:
        """The sum of costs, each paid by some share of the tokens."""
        weights = cache = flops = 0.0
        for place, cost in paid.items():
            part, keys = share(place), self._keys(place)
            weights += part * cost.weights
            cache += part * keys * cost.key_bytes
            flops += part * (cost.flops + keys * cost.key_flops)
        return _amount(weights, cache, flops)

    def _keys(self, place: Place) -> float:
        """Keys that attention sees: all, or those of the tokens that ran."""
        if self._dropped and place.gate is not None and self.rates is not None:
            return self.context * self.rates[place.gate]
        return self.context

    def _all_on(self, paid: Costs) -> dict[str, float]:
        """What a token pays that runs every layer, and sees every key."""
        on = [cost for place, cost in paid.items() if place.ran]
        return _amount(
            sum(cost.weights for cost in on),
            self.context * sum(cost.key_bytes for cost in on),
            sum(cost.flops + self.context * cost.key_flops for cost in on),
        )

    def _mean(self, place: Place) -> float:
        """The share of tokens that pay at a place."""
        if place.gate is None or self.rates is None:
            return 1.0
        rate = self.rates[place.gate]
        return rate if place.ran else 1 - rate

    def costs(self, original: Module) -> dict[str, Any]:
        """Of the model as it was, of the engine at most, on average, and by depth."""
        expected = None if self.rates is None else self.amount(self._main, self._mean)
        return {
            "full": self._all_on(costs(original, facts.main_function(original))),
            "worst": self._all_on(self._main),
            "expected": expected,
            "guarded": None if expected is None else self._guarded(expected),
            "outside": self.amount(
                {place: cost for place, cost in self._main.items() if place.layer is None},
                lambda place: 1.0,
            ),
            "quantiles": self._quantiles(),
        }

    def _guarded(self, masked: Mapping[str, float]) -> dict[str, float] | None:
        """With the most frequent path tried first: what it costs, and all again on a miss."""
        guard: dict[str, Any] = self._manifest.artifact.get("guard") or {}
        if not guard.get("speculate"):
            return None
        function = self._module.functions[f"path_{guard['paths'][0]['path']}"]
        tried, miss = self._all_on(costs(self._module, function)), guard["miss_rate"]
        return {key: round(tried[key] + miss * masked[key]) for key in masked}

    def _quantiles(self) -> list[dict[str, Any]] | None:
        """Tokens in the order of their depth, then of the bytes that they read."""
        if not self.paths or not self._gates:
            return None
        none = "0" * len(self._gates)
        alone = [none[:gate] + "1" + none[gate + 1 :] for gate in range(len(none))]
        worth = [self.of_path(path)["bytes"] - self.of_path(none)["bytes"] for path in alone]
        ordered = sorted(
            (self.depth(path), sum(w for w, d in zip(worth, path, strict=True) if d == "1"), path)
            for path in self.paths
        )
        passed = list(accumulate(self.paths[path] for _, _, path in ordered))
        found: list[dict[str, Any]] = []
        for quantile in QUANTILES:
            depth, _, path = ordered[bisect_left(passed, quantile * passed[-1])]
            told = {"quantile": quantile, "depth": depth, "path": path}
            found.append({**told, **self.of_path(path)})
        return found

    def of_path(self, path: str) -> dict[str, float]:
        """What a token pays whose gates decide as the path says."""
        return self.amount(
            self._main,
            lambda place: (
                1.0 if place.gate is None or (path[place.gate] == "1") == place.ran else 0
            ),
        )

    def layers(self) -> list[dict[str, Any]]:
        """Each layer: what all tokens pay, and what those do that run it or skip it."""
        experts = {
            info.layer: {"experts": info.experts, "per_token": info.per_token}
            for info in self._manifest.model.experts
        }
        found: list[dict[str, Any]] = []
        for layer in range(self._manifest.model.layers):
            own = {place: cost for place, cost in self._main.items() if place.layer == layer}
            gates = [index for index, gate in enumerate(self._gates) if gate.layer == layer]
            parts = {
                "always": {p: c for p, c in own.items() if p.gate is None},
                "run": {p: c for p, c in own.items() if p.gate is not None and p.ran},
                "skip": {p: c for p, c in own.items() if not p.ran},
            }
            known = self.rates is not None
            found.append(
                {
                    "layer": layer,
                    "gates": gates,
                    "experts": experts.get(layer),
                    "run_rate": self.rate(layer),
                    **{name: self._all(part) for name, part in parts.items()},
                    "expected": self.amount(own, self._mean) if known else None,
                    "expected_run": self.amount(parts["run"], self._mean) if known else None,
                    "expected_skip": self.amount(parts["skip"], self._mean) if known else None,
                }
            )
        return found

    def _all(self, paid: Costs) -> dict[str, float]:
        total = sum(paid.values(), Cost())
        keys = self.context
        return _amount(total.weights, keys * total.key_bytes, total.flops + keys * total.key_flops)


def _amount(weights: float, cache: float, flops: float) -> dict[str, float]:
    return {
        "weights": round(weights),
        "cache": round(cache),
        "bytes": round(weights + cache),
        "flops": round(flops),
    }

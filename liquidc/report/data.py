"""The numbers of the report: one JSON object from a compile's manifest, module and profile.

Amounts are of one token: `weights` and `cache` in bytes read, `bytes` both, `flops`. Attention is
priced with `context` tokens in the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from liquidc.errors import InputError
from liquidc.ir import Module
from liquidc.manifest import Manifest, PassInfo
from liquidc.passlog import PassRecord, weights_in_use
from liquidc.profile import MARGINS, UNIT, ExpertProfile, Profile
from liquidc.records import to_json
from liquidc.report.prices import Prices

TOP = 12
"""Depth paths that are listed."""
CELLS = 32
"""Rows of a matrix of experts; where there are more experts, several share a cell."""


def report_data(
    manifest: Manifest,
    module: Module,
    original: Module,
    profile: Profile | None,
    records: Sequence[PassRecord],
) -> dict[str, Any]:
    """What the report shows.

    Args:
        manifest: of the engine, its files not needed.
        module: what was compiled.
        original: the model before any pass.
        profile: of the model.
        records: what each pass changed.

    Raises:
        InputError: the profile is of another number of gates.
    """
    model, gates = manifest.model, manifest.model.gates
    if profile is not None and len(profile.gates) != len(gates):
        raise InputError(
            f"the profile has {len(profile.gates)} gates, the module that is compiled {len(gates)}"
        )
    prices = Prices(manifest, module, profile)
    passes = manifest.passes[len(manifest.passes) - len(records) :]
    data: dict[str, Any] = {
        "schema": 1,
        "liquidc": manifest.liquidc,
        "target": manifest.target,
        "model": {
            "type": model.type,
            "sha256": model.sha256,
            "layers": model.layers,
            "gates": len(gates),
            "experts": max((info.experts for info in model.experts), default=0),
            "vocabulary": model.vocabulary,
            "context": model.context,
        },
        "weights_bytes": weights_in_use(module),
        "context": prices.context,
        "costs": prices.costs(original),
        "layers": prices.layers(),
        "gates": [_gate(manifest, profile, index) for index in range(len(gates))],
        "profile": None if profile is None else _profile(profile, prices),
        "experts": [] if profile is None else _experts(profile, manifest),
        "passes": [_pass(*pair) for pair in zip(records, passes, strict=True)],
        "fidelity": manifest.fidelity,
        "guard": manifest.artifact.get("guard"),
        "sample": None if profile is None else _sample(profile, prices),
    }
    return to_json(data)


def _gate(manifest: Manifest, profile: Profile | None, index: int) -> dict[str, Any]:
    info, cost = manifest.model.gates[index], manifest.cost
    told: dict[str, Any] = {
        "gate": index,
        **to_json(info),
        "lowering": info.lowering,
        "weights_run": cost.run[index],
        "weights_skip": cost.skip[index],
    }
    if profile is not None:
        gate, tokens = profile.gates[index], profile.tokens
        told |= {
            "run_rate": gate.run / tokens,
            "margin_mean": gate.margin / UNIT / tokens,
            "margins": list(gate.margins),
            "entropy_bits": gate.entropy / UNIT / tokens,
        }
    return told


def _profile(profile: Profile, prices: Prices) -> dict[str, Any]:
    paths = Counter(profile.paths.counts) if prices.paths is None else prices.paths
    complete, tokens = prices.paths is not None, profile.tokens
    depths = Counter[int]()
    for path, count in paths.items() if complete else ():
        depths[prices.depth(path)] += count
    ordered = sorted(paths.items(), key=lambda item: (-item[1], item[0]))
    return {
        "tokens": tokens,
        "data": profile.data,
        "depth": {
            "mean": prices.mean_depth(),
            "histogram": {str(depth): depths[depth] / tokens for depth in sorted(depths)},
        },
        "margin_classes": list(MARGINS),
        "paths": {
            "gates": profile.paths.gates,
            "different": len(paths),
            "top": [
                {
                    "path": path,
                    "share": count / tokens,
                    "depth": prices.depth(path) if complete else None,
                    "bytes": prices.of_path(path)["bytes"] if complete else None,
                }
                for path, count in ordered[:TOP]
            ],
        },
        "transitions": [
            {
                "from": here,
                "to": there,
                "skip_skip": counts[0] / tokens,
                "skip_run": counts[1] / tokens,
                "run_skip": counts[2] / tokens,
                "run_run": counts[3] / tokens,
            }
            for (here, there), counts in zip(
                pairwise(range(len(profile.gates))), profile.transitions, strict=True
            )
        ],
    }


def _experts(profile: Profile, manifest: Manifest) -> list[dict[str, Any]]:
    """Load and pairs of each layer's experts, also in the order that `order-experts` chose."""
    said = {p.name: {entry["layer"]: entry for entry in _layers(p)} for p in manifest.passes}
    identity = {info.layer: info.identity for info in manifest.model.experts}
    found: list[dict[str, Any]] = []
    for experts in profile.experts:
        count = len(experts.load)
        told: dict[str, Any] = {
            "layer": experts.layer,
            "per_token": experts.per_token,
            "tokens": experts.tokens,
            "load": list(experts.load),
            "identity": identity.get(experts.layer, 0),
            "entropy_bits": None
            if experts.entropy is None or not experts.tokens
            else experts.entropy / UNIT / experts.tokens,
            "per_cell": _per_cell(count),
            "together": expert_pairs(experts, range(count)),
        }
        ordered = said.get("order-experts", {}).get(experts.layer, {})
        if "order" in ordered:
            told["together_ordered"] = expert_pairs(experts, ordered["order"])
            told |= {
                key: ordered[key] for key in ("order", "group_size", "cut", "groups_per_token")
            }
        removed = said.get("prune-experts", {}).get(experts.layer, {}).get("removed", [])
        told["removed"] = [entry["expert"] for entry in removed]
        found.append(told)
    return found


def _layers(info: PassInfo) -> list[dict[str, Any]]:
    """What a pass says of each layer."""
    layers = (info.facts or {}).get("layers")
    return layers if isinstance(layers, list) else []


def _per_cell(count: int) -> int:
    return -(-count // CELLS)


def expert_pairs(experts: ExpertProfile, order: Sequence[int]) -> list[list[int]]:
    """Tokens by pair of experts, in an order, neighbours taken together until they fit."""
    size = _per_cell(len(order))
    cells = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        [sum(experts.together[i][j] for i in rows for j in columns) for columns in cells]
        for rows in cells
    ]


def _pass(record: PassRecord, info: PassInfo) -> dict[str, Any]:
    """What a pass changed, with its options and what it had to say."""
    return {**to_json(record), "options": info.options, "facts": info.facts}


def _sample(profile: Profile, prices: Prices) -> dict[str, Any] | None:
    """The sample text with the depth that its tokens have in this engine."""
    if profile.sample is None:
        return None
    paths = [prices.path(path) for path in profile.sample.paths]
    return {
        "pieces": [p.encode("utf-8", "replace").decode() for p in profile.sample.pieces],
        "paths": paths,
        "depth": [prices.depth(path) for path in paths],
    }

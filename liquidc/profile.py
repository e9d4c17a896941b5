"""What was measured of a model's gates and experts on a corpus: counts, which add up.

Everything is an integer (sums of real numbers in units of 1 / `UNIT`), so that merging profiles is
associative and commutative to the last bit. Statistics of experts count the tokens that ran the
layer; a token that a gate skipped was never shown to a router.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from liquidc.errors import InputError
from liquidc.records import canonical, from_json, read_json, to_json

FORMAT = "liquidc-profile"
SCHEMA = 1
UNIT = 2**20
"""Sums of real numbers are kept as multiples of 1 / UNIT."""
MARGINS = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Upper bounds of the classes of |p - threshold|; the last class has none."""
MAX_PATHS = 65_536
"""Different depth paths that a profile holds; see `Paths`."""
MAX_BYTES = 256 * 1024 * 1024
"""A profile larger than this is refused unread."""


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """The model that was measured."""

    sha256: str
    type: str
    layers: int


@dataclass(frozen=True, slots=True)
class GateProfile:
    """One depth gate.

    Attributes:
        layer: its layer.
        threshold: of its decision.
        run: tokens that ran.
        margins: tokens by |p - threshold|, in the classes of `MARGINS`.
        margin: sum of |p - threshold|, in units of 1 / UNIT.
        entropy: sum of the entropy of p in bits, in units of 1 / UNIT.
    """

    layer: int
    threshold: float
    run: int
    margins: tuple[int, ...]
    margin: int
    entropy: int


@dataclass(frozen=True, slots=True)
class ExpertProfile:
    """The experts of one layer; E experts, k a token.

    Attributes:
        layer: their layer.
        per_token: k.
        tokens: tokens that ran the layer.
        load: tokens by expert.
        together: by pair of experts, the tokens that used both: a symmetric matrix [E][E] with a
            zero diagonal.
        entropy: sum over tokens of the entropy of the router's distribution in bits, in units of
            1 / UNIT; None where the router's scores were not to be seen.
        saliency: by expert, the sum over its tokens of weight · ‖output‖₂ in units of 1 / UNIT,
            the weights normalised over the token's experts (REAP, arXiv 2510.13999); None where
            the experts' outputs were not to be seen.
    """

    layer: int
    per_token: int
    tokens: int
    load: tuple[int, ...]
    together: tuple[tuple[int, ...], ...]
    entropy: int | None = None
    saliency: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Paths:
    """The joint distribution of depth paths: which gates ran, a digit 0 or 1 for each gate.

    If more than `MAX_PATHS` paths occur, what is kept is the exact distribution over the first
    `gates` gates, as many as fit. Because the number of different beginnings only grows with their
    length, the result is the same in whatever order profiles are merged.
    """

    gates: int
    counts: dict[str, int]

    @classmethod
    def of(cls, gates: int, counts: dict[str, int], limit: int = MAX_PATHS) -> Paths:
        """The distribution, shortened until it fits."""
        kept = Counter[str]()
        for path, count in counts.items():
            kept[path[:gates]] += count
        while len(kept) > limit:
            gates -= 1
            shorter = Counter[str]()
            for path, count in kept.items():
                shorter[path[:gates]] += count
            kept = shorter
        return cls(gates, dict(kept))

    def top(self, count: int) -> list[tuple[str, int]]:
        """The most frequent paths and their tokens; equal ones in the order of their digits."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:count]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some consecutive tokens of the corpus with their decisions, for pictures.

    Attributes:
        pieces: the text of each token.
        paths: the depth path of each token.
    """

    pieces: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile.

    Attributes:
        model: what was measured.
        tokens: how many.
        data: tokens by the sha256 of the corpus that they come from.
        gates: one for each gate, in order.
        transitions: for each gate but the last, tokens by (decision here, decision of the next
            gate): 00, 01, 10, 11.
        paths: the joint distribution.
        experts: one for each layer with experts, in order.
        sample: tokens to show.
    """

    model: ProfiledModel
    tokens: int
    data: dict[str, int]
    gates: tuple[GateProfile, ...]
    transitions: tuple[tuple[int, ...], ...]
    paths: Paths
    experts: tuple[ExpertProfile, ...] = ()
    sample: Sample | None = None
    liquidc: str = ""
    schema: int = field(default=SCHEMA)

    def rate(self, gate: int) -> float:
        """The share of tokens that ran a gate's layer."""
        return self.gates[gate].run / self.tokens

    @property
    def parts(self) -> tuple[object, ...]:
        """Which gates and experts the model has; equal in all profiles of one model."""
        gates = [(gate.layer, gate.threshold) for gate in self.gates]
        return self.model, gates, [(e.layer, e.per_token, len(e.load)) for e in self.experts]

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical({"format": FORMAT, **to_json(self)})

    def check_model(self, sha256: str, where: str = "the profile") -> None:
        """Refuse to be used with another model.

        Raises:
            InputError: the model with this hash is not the one that was measured.
        """
        if sha256 != self.model.sha256:
            raise InputError(
                f"{where}: made with another model (its hash is {self.model.sha256[:12]}…, this "
                f"model's {sha256[:12]}…); profile this model"
            )


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        InputError: there is none, or it is damaged or too new.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such profile; make one with liquidc profile")
    body = read_json(path, InputError, MAX_BYTES)
    entries = cast(dict[str, Any], body) if isinstance(body, dict) else {}
    if entries.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a profile of liquidc")
    if entries.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema {entries.get('schema')!r}, this liquidc reads {SCHEMA}; profile again"
        )
    try:
        profile = from_json(Profile, entries)
        check_counts(profile)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return profile


def _check_sample(profile: Profile) -> None:
    """Check the tokens to show.

    Raises:
        ValueError: a token has no path of all gates.
    """
    sample, gates = profile.sample, len(profile.gates)
    if sample is None:
        return
    if len(sample.pieces) != len(sample.paths):
        raise ValueError("the sample does not have a path for each token")
    if any(len(path) != gates or set(path) - {"0", "1"} for path in sample.paths):
        raise ValueError(f"a path of the sample is not {gates} digits 0 or 1")


def merge(profiles: Sequence[Profile]) -> Profile:
    """One profile of all the tokens of several.

    Raises:
        InputError: they are of different models.
    """
    total = profiles[0]
    for other in profiles[1:]:
        other.check_model(total.model.sha256)
        if other.parts != total.parts:
            raise InputError("the profiles are of one model, but tell of other gates or experts")
        total = _add(total, other)
    return total


def _add(a: Profile, b: Profile) -> Profile:
    length = min(a.paths.gates, b.paths.gates)
    counts = Counter[str]()
    for paths in (a.paths, b.paths):
        for path, count in paths.counts.items():
            counts[path[:length]] += count
    samples = [s for s in (a.sample, b.sample) if s is not None]
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        data=dict(Counter(a.data) + Counter(b.data)),
        gates=tuple(_add_gates(x, y) for x, y in zip(a.gates, b.gates, strict=True)),
        transitions=tuple(_sum(x, y) for x, y in zip(a.transitions, b.transitions, strict=True)),
        paths=Paths.of(length, dict(counts)),
        experts=tuple(_add_experts(x, y) for x, y in zip(a.experts, b.experts, strict=True)),
        sample=min(samples, key=lambda s: (s.pieces, s.paths), default=None),
        liquidc=min(a.liquidc, b.liquidc),
    )


def _add_gates(a: GateProfile, b: GateProfile) -> GateProfile:
    return replace(
        a,
        run=a.run + b.run,
        margins=_sum(a.margins, b.margins),
        margin=a.margin + b.margin,
        entropy=a.entropy + b.entropy,
    )


def _add_experts(a: ExpertProfile, b: ExpertProfile) -> ExpertProfile:
    both = None not in (a.saliency, b.saliency)
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        load=_sum(a.load, b.load),
        together=tuple(_sum(x, y) for x, y in zip(a.together, b.together, strict=True)),
        entropy=None if a.entropy is None or b.entropy is None else a.entropy + b.entropy,
        saliency=_sum(a.saliency or (), b.saliency or ()) if both else None,
    )


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def check_counts(profile: Profile) -> None:
    """Check what types can't say.

    Raises:
        ValueError: the counts contradict one another.
    """
    gates, tokens = len(profile.gates), profile.tokens
    if tokens < 1 or sum(profile.data.values()) != tokens:
        raise ValueError("tokens are not those of the data")
    if len(profile.transitions) != max(gates - 1, 0):
        raise ValueError(f"{len(profile.transitions)} transitions of {gates} gates")
    for number, gate in enumerate(profile.gates):
        if len(gate.margins) != len(MARGINS) + 1 or sum(gate.margins) != tokens:
            raise ValueError(f"gates[{number}].margins do not count the tokens")
        if not 0 <= gate.run <= tokens:
            raise ValueError(f"gates[{number}].run is not from 0 to {tokens}")
    if any(len(t) != 4 or sum(t) != tokens for t in profile.transitions):
        raise ValueError("transitions do not count the tokens")
    paths = profile.paths
    if sum(paths.counts.values()) != tokens or not 0 <= paths.gates <= gates:
        raise ValueError("paths do not count the tokens")
    if any(len(path) != paths.gates or set(path) - {"0", "1"} for path in paths.counts):
        raise ValueError(f"a path is not {paths.gates} digits 0 or 1")
    layers = range(profile.model.layers)
    if not all(gate.layer in layers for gate in profile.gates):
        raise ValueError(f"a gate is not in one of the {len(layers)} layers")
    counts = [*profile.data.values(), *paths.counts.values()]
    counts += [
        n for each in (*profile.transitions, *(g.margins for g in profile.gates)) for n in each
    ]
    counts += [n for gate in profile.gates for n in (gate.margin, gate.entropy)]
    if min(counts) < 0:
        raise ValueError("a count is negative")
    _check_sample(profile)
    for number, experts in enumerate(profile.experts):
        count = len(experts.load)
        if experts.layer not in layers or not 1 <= experts.per_token <= count:
            raise ValueError(f"experts[{number}] are not those of a layer")
        counts = [experts.tokens, experts.entropy or 0, *experts.load, *(experts.saliency or ())]
        if min(counts) < 0 or any(min(row) < 0 for row in experts.together):
            raise ValueError(f"experts[{number}] have a negative count")
        square = len(experts.together) == count
        if not square or any(len(row) != count for row in experts.together):
            raise ValueError(f"experts[{number}].together is not {count} by {count}")
        if experts.saliency is not None and len(experts.saliency) != count:
            raise ValueError(f"experts[{number}].saliency is not {count} numbers")

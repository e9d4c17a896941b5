"""Random profiles that fit a generated module: tokens that take depth paths and choose experts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from liquidc.ir import Function, Op, Value, ops
from liquidc.passes.routed_experts import routers
from liquidc.profile import (
    MARGINS,
    UNIT,
    ExpertProfile,
    GateProfile,
    Paths,
    Profile,
    ProfiledModel,
    Sample,
)

if TYPE_CHECKING:
    from tests.generator.modules import Example


def profile_of(example: Example, rng: random.Random) -> Profile:
    """A profile of the example's gates and experts whose counts agree with one another."""
    prefill = example.module.functions["prefill"]
    gates = [op for op in prefill.body.walk() if isinstance(op, ops.DepthGate)]
    tokens = rng.randrange(1, 60)
    rates = [rng.choice((0, 1, 10, 50, 90, 99, 100)) for _ in gates]
    paths = [
        "".join("1" if rng.randrange(100) < rate else "0" for rate in rates) for _ in range(tokens)
    ]
    return Profile(
        ProfiledModel("0" * 64, "generated", int(example.module.attributes["layers"])),
        tokens,
        {"1" * 64: tokens},
        tuple(_gate(gate, number, paths, rng) for number, gate in enumerate(gates)),
        tuple(
            tuple(Counter(path[n : n + 2] for path in paths)[pair] for pair in PAIRS)
            for n, _ in enumerate(pairwise(gates))
        ),
        Paths.of(len(gates), Counter(paths)),
        _experts(prefill, tokens, rng),
        Sample(tuple("t" for _ in paths[:8]), tuple(paths[:8])),
    )


PAIRS = ("00", "01", "10", "11")


def _gate(
    gate: ops.DepthGate, number: int, paths: Sequence[str], rng: random.Random
) -> GateProfile:
    margins = Counter(rng.randrange(len(MARGINS) + 1) for _ in paths)
    return GateProfile(
        gate.layer,
        gate.threshold,
        sum(path[number] == "1" for path in paths),
        tuple(margins[i] for i in range(len(MARGINS) + 1)),
        rng.randrange(len(paths) * UNIT // 2),
        rng.randrange(len(paths) * UNIT),
    )


def _experts(prefill: Function, tokens: int, rng: random.Random) -> tuple[ExpertProfile, ...]:
    """One for each router; a layer that returns no numbers of experts follows the one before."""
    numbers = {
        _router(value): int(name.removeprefix("experts."))
        for name, value in zip(prefill.result_names, prefill.returned, strict=True)
        if name.startswith("experts.")
    }
    found: list[ExpertProfile] = []
    layer = -1
    for route, *_ in routers(prefill):
        layer = numbers.get(route, layer + 1)
        found.append(_choices(route, layer, rng.randrange(tokens + 1), rng))
    return tuple(found)


def _router(value: Value) -> Op | None:
    """The router whose choice a value is, in a module as it was generated."""
    match value.op:
        case ops.If() as op:
            return _router(op.then.terminator.operands[op.results.index(value)])
        case ops.Renumber() as op:
            return _router(op.index)
        case op:
            return op


def _choices(route: ops.Route, layer: int, tokens: int, rng: random.Random) -> ExpertProfile:
    """Tokens that choose some experts more often than others."""
    count = int(route.logits.shape[-1])
    liked = [rng.randrange(10) for _ in range(count)]
    load, together = [0] * count, [[0] * count for _ in range(count)]
    for _ in range(tokens):
        ranks = sorted(range(count), key=lambda e: liked[e] + rng.randrange(10))
        chosen = ranks[: route.k]
        for expert in chosen:
            load[expert] += 1
            for other in chosen:
                together[expert][other] += other != expert
    return ExpertProfile(
        layer,
        route.k,
        tokens,
        tuple(load),
        tuple(map(tuple, together)),
        rng.randrange(tokens * UNIT + 1),
        tuple(rng.randrange(UNIT) * used for used in load),
    )

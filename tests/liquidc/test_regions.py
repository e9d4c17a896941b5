"""Modules whose layers have several gates, and gates that open several regions, proven and priced.

Skipping is proven by region: what decisions say that it computes against the rows that the target's
profiler saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquidc
from liquidc.frontend import protocol
from liquidc.frontend.protocol import LayerCache, Step, gated, keep
from liquidc.manifest import RegionInfo
from liquidc.runtime import Engine
from liquidc.trace_proof import prove

VOCABULARY, WIDTH, HEADS, HEAD, HIDDEN, LAYERS = 40, 16, 2, 8, 24, 2
ATTENTION = 4 * (WIDTH * WIDTH + WIDTH)
UP = 4 * (WIDTH * HIDDEN + HIDDEN)
FEED_FORWARD = UP + 4 * (HIDDEN * WIDTH + WIDTH)
"""Bytes of weights of a projection around attention, and of a feed-forward."""
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], *([token] for token in range(7, 19))]
Arm = Callable[..., Tensor]


def same(x: Tensor, *_: Any) -> Tensor:
    """The arm of skipped tokens."""
    return x.clone()


class FeedForward(nn.Module):
    """GELU between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """Gated attention, and then what the case says.

    `three`: two more gates, a region each. `again`: two more regions of the same gate, of which the
    last computes all tokens. `inside`: a second gate within a second region of the first one.
    `other`: a second gate where no token runs the first one.
    """

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, GATES[case])
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.first, self.second = FeedForward(), FeedForward()

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        scores = self.gate(x) * 9
        masks = [step.depth_gate(scores[..., i])[0] for i in range(GATES[self.case])]
        n = self.norm(x)
        k, v = self.kv(n).unflatten(-1, (2, HEADS, HEAD)).unbind(2)
        cache, limit = protocol.append(cache, k, v, step.valid)
        x = self._attention(x, n, masks[0], cache, limit)
        first, second = self.first, self.second

        def run(x: Tensor, mask: Tensor) -> Tensor:
            return x + keep(mask, first(x))

        def more(x: Tensor, mask: Tensor) -> Tensor:
            return x + keep(mask, second(x))

        def everyone(x: Tensor, mask: Tensor) -> Tensor:
            """Tokens look at others: they can't be computed alone."""
            return x + keep(mask, second(x - x.cumsum(1)))

        def around(x: Tensor, mask: Tensor, both: Tensor) -> Tensor:
            return gated(both, more, same, run(x, mask), both)

        def either(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
            return run(x, mask) + keep(other, keep(~mask, second(x)))

        def instead(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
            return gated(other, more, same, x, other)

        match self.case:
            case "three":
                x = gated(masks[1], run, same, x, masks[1])
                x = gated(masks[2], more, same, x, masks[2])
            case "again":
                x = gated(masks[0], run, same, x, masks[0])
                x = gated(masks[0], everyone, same, x, masks[0])
            case "inside":
                x = gated(masks[0], around, same, x, masks[0], masks[0] & masks[1])
            case _:
                x = gated(masks[0], either, instead, x, masks[0], masks[1])
        return x, cache

    def _attention(
        self, x: Tensor, n: Tensor, mask: Tensor, cache: LayerCache, limit: Tensor
    ) -> Tensor:
        def run(
            x: Tensor, n: Tensor, mask: Tensor, key: Tensor, value: Tensor, limit: Tensor
        ) -> Tensor:
            q = self.q(n).unflatten(-1, (HEADS, HEAD))
            seen = protocol.attend(q, key, value, limit, scale=HEAD**-0.5)
            return x + keep(mask, self.out(seen.flatten(-2)))

        return gated(mask, run, same, x, n, mask, cache.key, cache.value, limit)


GATES = {"three": 3, "again": 1, "inside": 2, "other": 2}
"""Gates of a layer by case."""


class Model(nn.Module):
    """A decoder of such layers."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(case) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.tokens(input_ids)

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.tokens.weight)

    def new_cache(self, batch: int, capacity: int) -> SimpleNamespace:
        empty = self.norm.weight.new_zeros(batch, HEADS, capacity, HEAD)
        length = torch.zeros(batch, dtype=torch.int64)
        return SimpleNamespace(layers=[LayerCache(empty, empty, length)] * LAYERS)


def compact(number: int, *masks: int) -> RegionInfo:
    return RegionInfo(number, "compact", masks)


def branch(number: int, *masks: int) -> RegionInfo:
    return RegionInfo(number, "branch", masks)


REGIONS = {
    "three": [[compact(0, 0)], [compact(0, 1)], [compact(0, 2)]],
    "again": [[compact(0, 0), compact(1, 0), branch(2, 0)]],
    "inside": [
        [compact(0, 0), branch(1, 0)],
        [replace(compact(0, 0, 1), within=((0,),))],
    ],
    "other": [
        [compact(0, 0), compact(1, 0)],
        [replace(compact(0, 1), without=((0,),))],
    ],
}
"""What the gates of the first layer open; in the next layer all have the same, of later gates."""


def shifted(info: RegionInfo, by: int) -> RegionInfo:
    def moved(masks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(mask + by for mask in masks)

    within, without = (tuple(map(moved, part)) for part in (info.within, info.without))
    return replace(info, masks=moved(info.masks), within=within, without=without)


@pytest.fixture(scope="module", params=REGIONS)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Engine]]:
    """Engines of a case, by target."""
    torch.manual_seed(3)
    model = Model(request.param).eval()
    path = tmp_path_factory.mktemp(request.param)
    targets = ("null", "onnxruntime", "onnxruntime-fixed")
    return request.param, {t: liquidc.compile(model, path / t, target=t) for t in targets}


def test_the_manifest_tells_every_region(engines: tuple[str, dict[str, Engine]]) -> None:
    case, loaded = engines
    for target in ("null", "onnxruntime"):
        gates = loaded[target].manifest.model.gates
        assert len(gates) == LAYERS * GATES[case]
        for number, gate in enumerate(gates):
            layer, place = divmod(number, GATES[case])
            expected = [shifted(info, layer * GATES[case]) for info in REGIONS[case][place]]
            assert gate.layer == layer
            assert list(gate.regions) == expected


def test_skipping_is_proven_region_by_region(engines: tuple[str, dict[str, Engine]]) -> None:
    case, loaded = engines
    proofs = [prove(loaded[target], PROMPTS, 6) for target in ("null", "onnxruntime")]
    for proof in proofs:
        assert proof.holds
        assert proof.covers or case in ("inside", "other")
        assert proof.not_shown == ()
        assert 0 < min(proof.gates) <= max(proof.gates) < proof.tokens
        assert len(proof.regions) == LAYERS * sum(map(len, REGIONS[case]))
        assert all(region.traced > 0 for region in proof.regions)
        for place, region in enumerate(proof.regions):
            wrong = replace(region, traced=region.traced - 1)
            regions = (*proof.regions[:place], wrong, *proof.regions[place + 1 :])
            assert not replace(proof, regions=regions).holds
    assert proofs[0] == proofs[1]
    if case == "three":
        assert proofs[0].gates == proofs[0].gates_traced
    if case == "again":
        assert proofs[0].gates < proofs[0].gates_traced


def test_the_cost_of_a_gate_is_that_of_its_regions(
    engines: tuple[str, dict[str, Engine]],
) -> None:
    case, loaded = engines
    run = {
        "three": [2 * ATTENTION, FEED_FORWARD, FEED_FORWARD],
        "again": [2 * ATTENTION + 2 * FEED_FORWARD],
        "inside": [2 * ATTENTION + FEED_FORWARD, FEED_FORWARD],
        # The second feed-forward stands behind both: what both read as it is, is read always.
        "other": [2 * ATTENTION + FEED_FORWARD + UP, UP],
    }
    for target in ("null", "onnxruntime"):
        cost = loaded[target].manifest.cost
        assert list(cost.run) == run[case] * LAYERS
        assert set(cost.skip) == {0}
    always = 4 * VOCABULARY * WIDTH + 4 * 2 * WIDTH
    kept = 2 * WIDTH + WIDTH * GATES[case] + GATES[case] + 2 * WIDTH * WIDTH + 2 * WIDTH
    shared = (FEED_FORWARD - UP) * (case == "other")
    assert loaded["null"].manifest.cost.always == always + LAYERS * (4 * kept + shared)


def test_targets_decide_and_compute_the_same(engines: tuple[str, dict[str, Engine]]) -> None:
    _, loaded = engines
    want, *others = (engine.evaluate(PROMPTS[0]) for engine in loaded.values())
    assert 0 < want.gates.mean() < 1
    for got in others:
        np.testing.assert_array_equal(got.gates, want.gates)
        np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=1e-4)


def test_without_control_flow_all_tokens_are_computed(
    engines: tuple[str, dict[str, Engine]],
) -> None:
    _, loaded = engines
    proof = prove(loaded["onnxruntime-fixed"], PROMPTS, 2)
    assert proof.holds
    assert set(proof.gates_traced) == {proof.tokens}

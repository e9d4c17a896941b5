"""The PyTorch peers of the bench compute what our model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.shapes import random_model, wide, without_gates
from bench.suite.peers import Eager
from bench.suite.plain import Exportable, Plain
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM

BOUND = 2e-5
"""Of the largest logit: sums of at most 96 float32 terms over 3 layers, in another order."""


def small(kind: str, policy: str) -> LiquidConfig:
    """A bench model in small."""
    config = replace(
        wide(kind, policy, layers=3),
        hidden_size=32,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        qk_norm="head" if policy == "own" else "none",
    )
    if kind == "dense":
        return config
    return replace(config, moe=replace(config.moe, num_experts=4, moe_intermediate_size=24))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    return bool((ours - theirs).abs().max() <= BOUND * ours.abs().max())


@pytest.mark.parametrize("policy", ["drop", "own"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_eager_with_real_ifs(kind: str, policy: str) -> None:
    model = random_model(small(kind, policy))
    plain, ids = Plain(model), torch.randint(256, (1, 24))
    ours, theirs = model.new_cache(1, 32), plain.caches(1, 32)
    free = model(ids[:, :20], ours)
    assert set(free.gates.flatten(1).float().mean(1).tolist()) - {0.0, 1.0}
    logits, lengths = plain(ids[:, :20], theirs, 0, [0] * 3, [0] * 3)
    assert same(free.logits[:, -1], logits)
    cache = free.cache
    for step, force in enumerate(([1, 1, 1], [-1, 1, -1], [-1, -1, -1], [0, 0, 0])):
        token = ids[:, 20 + step : 21 + step]
        want = model(token, cache, gate_force=torch.tensor(force, dtype=torch.int8))
        logits, lengths = plain(token, theirs, 20 + step, lengths, force)
        cache = want.cache
        assert same(want.logits[:, -1], logits)
        assert lengths == [int(layer.length) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_what_is_exported_computes_everything_and_selects(kind: str) -> None:
    model = random_model(small(kind, "own"))
    plain, ids = Exportable(model), torch.randint(256, (2, 12))
    past = [torch.zeros(2, 2, 0, 8) for _ in range(6)]
    logits, *past = plain(ids[:, :8], torch.tensor([0, 1, 0]), past)
    cache = model.new_cache(2, 16)
    want = model(ids[:, :8], cache, gate_force=torch.tensor([0, 1, 0], dtype=torch.int8))
    assert same(want.logits[:, -1], logits)
    for force in ([1, -1, 1], [0, 0, 0]):
        want = model(ids[:, 8:9], want.cache, gate_force=torch.tensor(force, dtype=torch.int8))
        logits, *past = plain(ids[:, 8:9], torch.tensor(force), past)
        assert same(want.logits[:, -1], logits)


@torch.no_grad()
def test_a_model_without_its_gates_is_the_one_with_all_layers_on() -> None:
    model = random_model(small("dense", "drop"))
    ids, on = torch.randint(256, (1, 9)), torch.ones(3, dtype=torch.int8)
    assert same(model(ids, gate_force=on).logits, without_gates(model)(ids).logits)


def test_a_peer_goes_back_to_what_it_held(tmp_path: Path) -> None:
    model = random_model(small("dense", "drop"))
    model.save_directory(tmp_path)
    peer = Eager(tmp_path, 1, 32)
    try:
        peer.fill([[1, 2, 3], [4, 5, 6]])
        first = [peer.step([7, 8], [1, 1, 1]), peer.step([9, 9], [1, -1, 1])]
        peer.fill([[1, 2, 3], [4, 5, 6]])
        again = [peer.step([7, 8], [1, 1, 1]), peer.step([9, 9], [1, -1, 1])]
    finally:
        torch.set_grad_enabled(True)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, 7], [4, 5, 6, 8]])
        want = LiquidForCausalLM.from_directory(tmp_path)(
            ids, gate_force=torch.ones(3, dtype=torch.int8)
        )
    assert same(want.logits[:, -1], torch.from_numpy(first[0]))

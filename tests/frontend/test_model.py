"""What follows from the semantics at once (model spec 5.6, numbers 1 to 5 and 8), and training.

Number 3, one piece = chunks = tokens, and number 4, mixed rows = each alone, are also what
`test_model_against_oracle` shows for every model of the grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.protocol import route

POLICIES = ["own", "drop", "inherit"]
IDS = torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(1))


def config(**gate: Any) -> LiquidConfig:
    depth = {"layers": [0, 1, 2, 3], **gate} if gate.pop("gated", True) else {"layers": []}
    return LiquidConfig.from_dict(
        {
            "model_type": "liquid",
            "liquid_version": 1,
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "depth_gate": depth,
            "moe": {"num_experts": 4, "moe_intermediate_size": 24},
        }
    )


def build(seed: int = 0, **gate: Any) -> LiquidForCausalLM:
    """A model whose gates decide both ways."""
    torch.manual_seed(seed)
    model = LiquidForCausalLM(config(**gate)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1 if "depth_gate" in name else 0.2)
    return model


def force(model: LiquidForCausalLM, value: int) -> Tensor:
    return torch.full((model.config.num_gates,), value, dtype=torch.int8)


def ungated(model: LiquidForCausalLM) -> LiquidForCausalLM:
    """The base model: the same weights without gates."""
    base = LiquidForCausalLM(config(gated=False)).eval()
    names = base.state_dict().keys()
    base.load_state_dict({n: t for n, t in model.state_dict().items() if n in names})
    return base


@torch.no_grad()
@pytest.mark.parametrize("scope", ["layer", "attn", "ffn", "attn_ffn"])
@pytest.mark.parametrize("policy", POLICIES)
def test_forced_run_is_the_base_bit_for_bit(policy: str, scope: str) -> None:
    model = build(kv_policy=policy, scope=scope)
    base = ungated(model)(IDS).logits
    assert torch.equal(model(IDS, gate_force=force(model, 1)).logits, base)
    cache = model.new_cache(3, 12)
    assert torch.equal(
        model(IDS, cache, gate_force=force(model, 1)).logits,
        ungated(model)(IDS, ungated(model).new_cache(3, 12)).logits,
    )


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_forced_skip_is_the_embedding_and_the_head(policy: str) -> None:
    model = build(kv_policy=policy)
    result = model(IDS, model.new_cache(3, 12), gate_force=force(model, -1))
    assert torch.equal(result.logits, model.head(model.model.embed_tokens(IDS)))
    assert not result.gates.any()
    assert (result.experts == -1).all()
    taken = 0 if policy == "drop" else 12
    assert all((layer.length == taken).all() for layer in result.cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["own", "inherit"])
def test_skipped_tokens_leave_complete_caches(policy: str) -> None:
    """Every layer holds the keys and values of the frozen states: its own, or the first layer's."""
    model = build(kv_policy=policy)
    skipped = model(IDS, model.new_cache(3, 12), gate_force=force(model, -1)).cache
    x, positions = model.model.embed_tokens(IDS), torch.arange(12).expand(3, -1)
    for index, cache in enumerate(skipped.layers):
        layer = model.layers[index if policy == "own" else 0]
        k, v = layer.self_attn.key_value(layer.input_layernorm(x), positions)
        assert torch.equal(cache.key, k.transpose(1, 2))
        assert torch.equal(cache.value, v.transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("policy", ["own", "drop"])
def test_masked_equals_skipped(policy: str) -> None:
    """With gradients on every layer is computed and masked; without, arms are skipped."""
    model = build(kv_policy=policy)
    skipped = model(IDS)
    with torch.enable_grad():
        masked = model(IDS)
    assert torch.equal(masked.gates, skipped.gates)
    assert 0 < skipped.gates.float().mean() < 1
    # Float32 matrix products of other shapes may round differently.
    torch.testing.assert_close(masked.logits.detach(), skipped.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_pieces_and_rows(policy: str) -> None:
    """One piece = chunks = tokens; a batch of mixed routes = each sequence alone (float64)."""
    model = build(kv_policy=policy).double()
    whole = model(IDS, model.new_cache(3, 12))
    for size in (5, 1):
        cache, parts = model.new_cache(3, 12), []
        for piece in IDS.split(size, 1):
            result = model(piece, cache)
            cache = result.cache
            parts.append(result.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-12, atol=1e-12)
    for row in range(3):
        alone = model(IDS[row : row + 1], model.new_cache(1, 12))
        assert torch.equal(alone.gates[:, 0], whole.gates[:, row])
        torch.testing.assert_close(alone.logits[0], whole.logits[row], rtol=1e-12, atol=1e-12)


def test_softmax_topk_renorm_is_topk_softmax() -> None:
    logits = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = torch.ones(2, 7, dtype=torch.bool)
    a = route(logits, shown, 2, score="softmax", post="renorm")
    b = route(logits, shown, 2, score="identity", post="softmax_k")
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_a_single_token(policy: str) -> None:
    """One token, run and skipped: finite, and under drop the cache stays empty if it skipped."""
    model = build(kv_policy=policy)
    for value in (1, -1, 0):
        result = model(IDS[:1, :1], model.new_cache(1, 1), gate_force=force(model, value))
        assert result.logits.isfinite().all()
        for layer, gate in zip(result.cache.layers, result.gates, strict=True):
            wanted = int(gate[0, 0]) if policy == "drop" else 1
            assert layer.length.tolist() == [wanted]


@pytest.mark.parametrize("scope", ["layer", "attn", "ffn", "attn_ffn"])
def test_the_budget_reaches_every_router(scope: str) -> None:
    """The gradient of the cost alone, without the cross-entropy's."""
    model = build(scope=scope).train()
    model.loss(IDS).depth_cost.backward()
    routers = {n: p for n, p in model.named_parameters() if "depth_gate" in n}
    assert len(routers) == 3 * model.config.num_gates
    assert [n for n, p in routers.items() if p.grad is None or not p.grad.any()] == []


def test_the_budget_trains_the_gates() -> None:
    """A few steps bring the executed depth from far away to where the budget wants it."""
    model = build(kv_policy="own").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for target in (0.9, 0.3):
        training = replace(model.config.training, depth_target=target, depth_coef=5.0)
        model.config = replace(model.config, training=training)
        before = abs(model.loss(IDS).depth_cost.item() - target)
        assert before > 0.3
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(IDS).total.backward()
            optimizer.step()
        assert abs(model.loss(IDS).depth_cost.item() - target) < before / 2

"""The training loss of model spec 5.5: cross-entropy, compute budget, balanced experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.frontend.protocol import Step, straight_through
from liquidc.ir.semantics import router_scores

if TYPE_CHECKING:
    from liquidc.frontend.config import LiquidConfig


@dataclass(frozen=True)
class LossParts:
    """The loss, f32 scalars, and what a trainer may want to regularise further.

    total = ce + depth_coef·|depth_cost - depth_target| + router_aux_coef·router_aux
    + router_z_coef·router_z. ce is in nats per token. gates bool[G, B, T]; gate_p and gate_score
    f32[G, B, T] carry gradients; valid bool[B, T]; expert_load f32[E + Z] is the share of
    each expert, identity experts last; router_aux_by_layer f32[layers with experts] is router_aux
    of each layer by itself.
    """

    total: Tensor
    ce: Tensor
    depth_cost: Tensor
    router_aux: Tensor
    router_aux_by_layer: Tensor
    router_z: Tensor
    gates: Tensor
    gate_p: Tensor
    gate_score: Tensor
    valid: Tensor
    expert_load: Tensor | None


@dataclass(frozen=True)
class LayerCost:
    """FLOPs per token of a layer's parts, two per multiply-add; norms and softmax not counted.

    fixed: paid by every token (router; keys and values under policy own); attention and ffn: by
    tokens that run them (attention includes keys and values under drop and inherit); adapter: by
    tokens that skip the feed-forward.
    """

    fixed: float
    attention: float
    ffn: float
    adapter: float

    @property
    def full(self) -> float:
        """A token that runs everything."""
        return self.fixed + self.attention + self.ffn


def layer_cost(config: LiquidConfig, layer: int, context: float) -> LayerCost:
    """The cost of a layer for a token that sees `context` keys (model spec 4.3).

    q and o: 2·D·H·hd each; keys and values: 4·D·KV·hd; attention: 4·context·H·hd; dense
    feed-forward: 6·D·F; experts: k·6·D·I·E/(E+Z) + 2·D·(E+Z) + 6·D·I_shared, the Z identity
    experts being free and chosen as often as the others; router: 2·(D·R + R·O); adapter: 6·D·A.
    """
    hidden, width = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = 4.0 * hidden * q_width + 4.0 * context * q_width
    kv = 4.0 * hidden * kv_width
    if layer in config.moe_layers:
        moe = config.moe
        used = moe.num_experts_per_tok * moe.num_experts / moe.num_choices
        widths = used * config.expert_width + moe.shared_intermediate_size
        ffn = 6.0 * hidden * widths + 2.0 * hidden * moe.num_choices
    else:
        ffn = 6.0 * hidden * (config.intermediate_size or 0)
    gate, gates = config.depth_gate, config.gates_per_layer(layer)
    outputs = gate.router_num_logits
    if gate.router_type == "linear":
        router = 2.0 * hidden * outputs
    else:
        router = 2.0 * config.router_width * (hidden + outputs)
    own = gate.kv_policy == "own"
    return LayerCost(
        fixed=gates * router + (kv if own else 0.0),
        attention=attention + (0.0 if own else kv),
        ffn=ffn,
        adapter=6.0 * hidden * config.adapter_width if gate.skip_path == "adapter" else 0.0,
    )


def depth_at(config: LiquidConfig, rate: float, context: float) -> float:
    """C of model spec 5.5 when `rate` of the gated work is executed, at `context` keys."""
    paid = full = 0.0
    for layer in range(config.num_hidden_layers):
        cost, gated = layer_cost(config, layer, context), bool(config.gates_per_layer(layer))
        attention = rate if gated and config.depth_gate.scope != "ffn" else 1.0
        ffn = rate if gated and config.depth_gate.scope != "attn" else 1.0
        paid += cost.fixed + attention * cost.attention + ffn * cost.ffn
        paid += (1 - ffn) * cost.adapter
        full += cost.full
    return paid / full


def depth_cost(config: LiquidConfig, steps: list[Step]) -> Tensor:
    """C = Σ_t,l m_tl·c_l / Σ_t,l c_l over the tokens that are not padding, straight-through.

    All layers count, ungated ones with m = 1. m·c stands for fixed + m_a·attention + m_f·ffn
    + (1 - m_f)·adapter of `LayerCost` at the mean context (T + 1) / 2, and c for its full cost.
    """
    valid = steps[0].valid
    context = (valid.shape[1] + 1) / 2
    scope = config.depth_gate.scope
    paid, full = torch.zeros((), device=valid.device), 0.0
    for index, step in enumerate(steps):
        cost = layer_cost(config, index, context)
        full += cost.full
        runs = [(straight_through(mask, p) * valid).sum() / valid.sum() for mask, p in step.gates]
        one = torch.ones_like(paid)
        attention = runs[0] if runs and scope != "ffn" else one
        ffn = runs[-1] if runs and scope != "attn" else one
        paid = paid + cost.fixed + attention * cost.attention + ffn * cost.ffn
        if runs:
            paid = paid + (1 - ffn) * cost.adapter
    return paid / full


def router_losses(config: LiquidConfig, steps: list[Step]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L_switch, L_z, load f32[E + Z]) over executed tokens, the layers taken together.

    L_switch = (E + Z)·Σ_e f_e·P_e with f_e the share of the assignments, P_e the mean probability
    (Switch Transformer, Fedus et al. 2021; 1 when balanced); L_z = mean logsumexp² (ST-MoE, Zoph
    et al. 2022). Sigmoid scores are normalised to sum to 1; identity scores take softmax.
    """
    zero = steps[0].bias.new_zeros(())
    count = z = probability = zero
    load = torch.zeros(max(config.moe.num_choices, 1), device=zero.device)
    for step in steps:
        if step.router is None or step.experts is None:
            continue
        logits, shown = step.router
        weight = shown.to(torch.float32).unsqueeze(-1)
        score = router_scores(logits, "sigmoid" if config.moe.score == "sigmoid" else "softmax")
        score = score / score.sum(-1, keepdim=True)
        probability = probability + (score * weight).sum((0, 1))
        z = z + (logits.logsumexp(-1).square() * shown).sum()
        count = count + shown.sum()
        load = load + torch.bincount(step.experts[shown].flatten(), minlength=len(load))
    if not config.moe_layers:
        return zero, zero, None
    count = count.clamp(min=1)
    load = load / load.sum().clamp(min=1)
    switch = config.moe.num_choices * (load * probability / count).sum()
    return switch, z / count, load


def budget_loss(
    config: LiquidConfig, steps: list[Step]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What `LossParts.total` adds to the cross-entropy, and of what: cost, aux, z, load."""
    t, cost = config.training, depth_cost(config, steps)
    switch, z, load = router_losses(config, steps)
    extra = t.router_aux_coef * switch + t.router_z_coef * z
    extra = extra + t.depth_coef * (cost - t.depth_target).abs() * bool(config.num_gates)
    return extra, cost, switch, z, load


def total_loss(
    config: LiquidConfig, logits: Tensor, targets: Tensor, steps: list[Step]
) -> LossParts:
    """All parts, from logits f32[B, T, V] and the next tokens i64[B, T]."""
    valid = steps[0].valid
    per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    ce = (per_token * valid.flatten()).sum() / valid.sum()
    extra, cost, switch, z, load = budget_loss(config, steps)
    alone = [router_losses(config, [step])[0] for step in steps if step.router is not None]
    gates = [gate for step in steps for gate in step.gates]
    scores = [score for step in steps for score in step.scores]
    none = logits.new_zeros((0, *targets.shape))
    return LossParts(
        total=ce + extra,
        ce=ce,
        depth_cost=cost,
        router_aux=switch,
        router_aux_by_layer=torch.stack(alone) if alone else switch.new_zeros(0),
        router_z=z,
        gates=torch.stack([m for m, _ in gates]) if gates else none.to(torch.bool),
        gate_p=torch.stack([p for _, p in gates]) if gates else none,
        gate_score=torch.stack(scores) if scores else none,
        valid=valid,
        expert_load=load,
    )

"""The feed-forward: dense, or experts behind a router with an optional shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend import protocol
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.protocol import Step
from liquidc.frontend.semantic_ops import at_least_float32


class FeedForward(nn.Module):
    """`down(silu(gate x) · up x)`; also the skip path's adapter and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@protocol.expert
def glu_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on its rows x [N, D]: gate_up [2I, D] holds the gate's rows first; down [D, I]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@protocol.expert
def biased_glu_expert(
    x: Tensor, gate_up: Tensor, gate_up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    """`glu_expert` with biases [2I] and [D]."""
    gate, up = F.linear(x, gate_up, gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down, down_bias)


LIMIT, STEEPNESS = 7.0, 1.702
"""Of the clamped activation (GPT-OSS: `swiglu_limit`, `alpha`)."""


def clamped_glu(gate: Tensor, up: Tensor) -> Tensor:
    """`(clamp(up) + 1) · g · sigmoid(1.702 · g)`, g = min(gate, 7), clamp to ±7 (GPT-OSS)."""
    gate, up = gate.clamp(max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * STEEPNESS))


@protocol.expert
def clamped_glu_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`glu_expert` with the activation `clamped_glu`."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(clamped_glu(gate, up), down)


@protocol.expert
def biased_clamped_glu_expert(
    x: Tensor, gate_up: Tensor, gate_up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    """`biased_glu_expert` with the activation `clamped_glu`."""
    gate, up = F.linear(x, gate_up, gate_up_bias).chunk(2, dim=-1)
    return F.linear(clamped_glu(gate, up), down, down_bias)


BODIES = {
    ("silu_glu", False): glu_expert,
    ("silu_glu", True): biased_glu_expert,
    ("clamped_glu", False): clamped_glu_expert,
    ("clamped_glu", True): biased_clamped_glu_expert,
}
"""Bodies of experts by activation, with biases or without."""


class Experts(nn.Module):
    """The stacked weights of E experts: gate_up_proj [E, 2I, D], down_proj [E, D, I].

    With biases also gate_up_proj_bias [E, 2I] and down_proj_bias [E, D].
    """

    def __init__(self, experts: int, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate_up_proj_bias = self.down_proj_bias = None
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * width))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def weights(self) -> list[Tensor]:
        """In the order in which a body takes them."""
        given = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
        return [weight for weight in given if weight is not None]


class ExpertRouter(nn.Linear):
    """The experts' logits; `e_score_correction_bias` [E], if any, only moves the selection."""

    def __init__(self, hidden: int, experts: int, bias: bool, selection_bias: bool) -> None:
        super().__init__(hidden, experts, bias=bias)
        self.e_score_correction_bias = None
        if selection_bias:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)


class MixtureOfExperts(nn.Module):
    """The generic router of model spec 2.1 in front of experts; a token not shown gets index -1."""

    def __init__(self, config: LiquidConfig) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.config = moe
        self.gate = ExpertRouter(hidden, moe.num_choices, moe.router_bias, moe.selection_bias)
        self.experts = Experts(moe.num_experts, hidden, config.expert_width, moe.expert_bias)
        self.shared_expert = None
        self.shared_expert_gate = None
        if moe.shared_intermediate_size:
            self.shared_expert = FeedForward(hidden, moe.shared_intermediate_size)
        if moe.shared_gate == "sigmoid":
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, shown: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Output [B, T, D] and expert indices i64[B, T, k] of x [B, T, D]; shown bool[B, T]."""
        moe = self.config
        logits = self.gate(x)
        if torch.is_grad_enabled() and not protocol.is_exporting():
            step.router = (at_least_float32(logits), shown)
            shown = step.valid if step.dense_estimate else shown
        index, weight = protocol.route(
            logits,
            shown,
            moe.num_experts_per_tok,
            score=moe.score,
            post=moe.post,
            renorm_eps=moe.renorm_eps,
            selection_bias=self.gate.e_score_correction_bias,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
            group_score=moe.group_score,
            group_fill=moe.group_fill,
            scaling=moe.routed_scaling_factor,
        )
        y = protocol.dispatch(
            x,
            index,
            weight,
            BODIES[moe.expert_act, moe.expert_bias],
            self.experts.weights(),
            apply=moe.apply,
            identity=moe.num_zero_experts,
        )
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(x))
            y = y + shared
        return y, index

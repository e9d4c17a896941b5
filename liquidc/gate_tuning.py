"""Training of depth gates and adapters alone, on the CPU: everything else stays as it is.

The loss is the language model's cross-entropy under the budget C <= target of model spec 5.5. As in
router-tuning (He et al. 2024, arXiv 2410.13184) and FlexiDepth (Luo et al. 2025, arXiv 2503.23798)
the base is frozen and gates are straight-through; the weight of the budget is not chosen but found:
it grows while too much is spent and shrinks while too little is (dual ascent).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.errors import InputError
from liquidc.frontend.gate_hooks import ScoreNoise, random_gates
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.heldout import Report

TRAINED = ("depth_gate", "depth_adapter")
"""Parameters with one of these in their names are trained, or start anew."""
ROWS = 16
"""Windows that are measured at a time."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How gates are trained.

    Attributes:
        steps: updates.
        rows: windows of text in each.
        rate: learning rate (AdamW), after a warm-up of 2 %, falling to a tenth along a cosine.
        price: by how much the budget's weight, in nats, grows in all steps if all is too much.
        noise: of the scores (see `ScoreNoise`), until `noise_until` of the steps.
        noise_until: when it is gone; it fades from the half of that.
        margin: weight of E[p (1 - p)] at the end, which drives gates away from their threshold.
        seed: of the windows and the noise.
    """

    steps: int = 300
    rows: int = 8
    rate: float = 1e-2
    price: float = 60.0
    noise: float = 1.0
    noise_until: float = 0.75
    margin: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """A model with gates on held-out text; losses are nats per token.

    Attributes:
        tokens: that were predicted.
        gates: share of the tokens that each gate runs.
        depth: C of model spec 5.5, the share of all work that is done.
        loss: with the gates' decisions.
        loss_all: with every layer run, which is the model without gates.
        loss_random: with tokens chosen at random, each gate at its own rate.
    """

    tokens: int
    gates: tuple[float, ...]
    depth: float
    loss: float
    loss_all: float
    loss_random: float

    @property
    def skipped(self) -> float:
        """Share of the gated layers' work that is left out."""
        return 1 - sum(self.gates) / len(self.gates)

    def told(self) -> dict[str, object]:
        """As JSON."""
        return {**asdict(self), "gates": list(self.gates), "skipped": self.skipped}


def tune(
    model: LiquidForCausalLM, tokens: Tensor, length: int, tuning: Tuning, report: Report
) -> None:
    """Train the gates and adapters of `model` in place.

    Args:
        model: with gates; its config says the budget (`training.depth_target`).
        tokens: text, i64[N].
        length: tokens that a window predicts.
        tuning: how.
        report: told of each step.

    Raises:
        InputError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(tuning.seed)
    noise = ScoreNoise(model, generator)
    trained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
        trained += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(trained, lr=tuning.rate, betas=(0.9, 0.98), weight_decay=0.0)
    target, price = model.config.training.depth_target, 0.0
    offsets = torch.arange(length + 1)
    for step in range(tuning.steps):
        at = step / tuning.steps
        for group in optimizer.param_groups:
            group["lr"] = _rate(tuning, at)
        noise.scale = tuning.noise * (1 - _ramp(at, tuning.noise_until / 2, tuning.noise_until))
        starts = torch.randint(len(tokens) - length, (tuning.rows, 1), generator=generator)
        parts = model.loss(tokens[starts + offsets], dense_estimate=True)
        over = parts.depth_cost - target
        spread = (parts.gate_p * (1 - parts.gate_p)).mean()
        loss = parts.ce + price * over + tuning.margin * at * spread
        if not bool(loss.isfinite()):
            raise InputError(f"the loss is {float(loss)} at step {step}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        price = max(0.0, price + tuning.price / tuning.steps * float(over.detach()))
        report("steps", step + 1, tuning.steps)
    noise.scale = 0.0


def _ramp(at: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return min(1.0, max(0.0, (at - start) / (end - start)))


def _rate(tuning: Tuning, at: float) -> float:
    if at < 0.02:
        return tuning.rate * max(at / 0.02, 0.1)
    return tuning.rate * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * at)))


@torch.no_grad()
def measure(model: LiquidForCausalLM, windows: Tensor, seed: int = 0) -> Measurement:
    """The model on windows i64[N, T + 1] of held-out text, teacher-forced."""
    all_on = torch.ones(model.config.num_gates, dtype=torch.int8)
    losses, ran, depth = [0.0, 0.0, 0.0], torch.zeros(model.config.num_gates), 0.0
    for rows in windows.split(ROWS):
        parts = model.loss(rows)
        losses[0] += float(parts.ce) * len(rows)
        depth += float(parts.depth_cost) * len(rows)
        ran += parts.gates.float().mean((1, 2)) * len(rows)
        losses[1] += float(model.loss(rows, gate_force=all_on).ce) * len(rows)
    rates = (ran / len(windows)).tolist()
    with random_gates(model, rates, seed):
        for rows in windows.split(ROWS):
            losses[2] += _cross_entropy(model, rows) * len(rows)
    loss, loss_all, loss_random = (total / len(windows) for total in losses)
    count = windows.shape[0] * (windows.shape[1] - 1)
    return Measurement(count, tuple(rates), depth / len(windows), loss, loss_all, loss_random)


def _cross_entropy(model: LiquidForCausalLM, rows: Tensor) -> float:
    logits = model(rows[:, :-1]).logits
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

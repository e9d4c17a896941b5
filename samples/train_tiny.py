"""Train the tiny sample on the CPU: `python samples/train_tiny.py --out samples/tiny-liquid`.

A byte-level Liquid Transformer of 8 layers and 8 experts learns language and its depth gates
together. The gates are held open at first; then the budget loss of model spec 5.5 closes them
straight-through, under noise on their scores that fades away, and a margin term drives the
probabilities away from the threshold, so that decisions survive quantisation. The experts are
balanced layer by layer: over all layers together, a dead expert of one hides behind the others.
Gates are kept from always or never running but for two: one layer is to run for almost no token
and another may run for all, so that specialisation finds in the sample what large models have.

With `--no-gates` the same model learns without them, as `liquidc liquify` wants one.

One thread and a fixed number of steps: the same seed gives the same weights on the same processor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import tiny_data
import tiny_report

from liquidc.frontend.config import DepthGateConfig, LiquidConfig, MoeConfig, TrainingConfig
from liquidc.frontend.gate_hooks import ScoreNoise
from liquidc.frontend.loss import depth_at
from liquidc.frontend.model import LiquidForCausalLM

LENGTH = 256
"""Tokens that a training window predicts."""
GATES = DepthGateConfig(layers=tuple(range(1, 7)), router_hidden_size=16, router_bias=True)


@dataclass(frozen=True)
class Recipe:
    """What the training does; times are fractions of it.

    Gate `rare` is to run for almost no token, gate `frequent` may run for all of them; the other
    gates have run rates from `lowest_rate` to `highest_rate`.
    """

    rows: int = 16
    rate: float = 3e-3
    warm_up: float = 0.02
    weight_decay: float = 0.3
    arithmetic_share: float = 0.3
    open_until: float = 0.12
    budget_full: float = 0.35
    noise: float = 1.0
    noise_until: float = 0.75
    margin_from: float = 0.3
    margin: float = 1.0
    spread: float = 2.0
    lowest_rate: float = 0.25
    highest_rate: float = 0.85
    rare: int = 0
    frequent: int = 3


def tiny_config(rate: float = 0.55) -> LiquidConfig:
    """The sample's config: layers 1 to 6 gated, and `rate` of their work as the budget."""
    config = replace(static_config(), depth_gate=GATES)
    target = round(depth_at(config, rate, (LENGTH + 1) / 2), 4)
    return replace(config, training=replace(config.training, depth_target=target))


def static_config() -> LiquidConfig:
    """The same model without gates."""
    return LiquidConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        qk_norm="head",
        tie_word_embeddings=True,
        moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
        training=TrainingConfig(depth_target=1.0, depth_coef=1.0, router_aux_coef=0.02),
    )


def rate_bounds(recipe: Recipe, gates: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest run rate of each gate, f32[G]."""
    low, high = torch.full((gates,), recipe.lowest_rate), torch.full((gates,), recipe.highest_rate)
    low[recipe.rare], high[recipe.rare] = 0.0, 0.01
    high[recipe.frequent] = 1.0
    return low, high


def ramp(at: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return min(1.0, max(0.0, (at - start) / (end - start)))


def learning_rate(recipe: Recipe, at: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the rate."""
    if at < recipe.warm_up:
        return recipe.rate * max(at / recipe.warm_up, 0.01)
    fall = 0.5 + 0.5 * math.cos(math.pi * ramp(at, recipe.warm_up, 1.0))
    return recipe.rate * (0.02 + 0.98 * fall)


class Trainer:
    """The model, its optimizer and the corpus; `step(at)` does one update."""

    def __init__(self, config: LiquidConfig, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.recipe = config, recipe
        self.corpus = tiny_data.build(seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.model = LiquidForCausalLM(config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj")):
                    parameter.mul_((2 * config.num_hidden_layers) ** -0.5)
        self.noise = ScoreNoise(self.model, self.generator)
        # Decay would make the gates' scores the same for every token: they get none.
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.ndim >= 2 and "depth_gate" not in name]
        vectors = [p for name, p in named if p.ndim < 2 or "depth_gate" in name]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    def step(self, at: float) -> dict[str, float]:
        """One update at the time `at` in [0, 1]; the parts of its loss."""
        r, t = self.recipe, self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(r, at)
        closed = at >= r.open_until and self.config.num_gates > 0
        self.noise.scale = r.noise * (1 - ramp(at, 0.5 * r.noise_until, r.noise_until)) * closed
        rows = tiny_data.batch(self.corpus, r.rows, LENGTH + 1, self.generator, r.arithmetic_share)
        force = torch.full((self.config.num_gates,), 0 if closed else 1, dtype=torch.int8)
        parts = self.model.loss(rows, gate_force=force, dense_estimate=True)
        loss = parts.ce + t.router_aux_coef * parts.router_aux_by_layer.mean()
        if closed:
            p = parts.gate_p
            coef = t.depth_coef * (0.1 + 0.9 * ramp(at, r.open_until, r.budget_full))
            loss = loss + coef * (parts.depth_cost - t.depth_target).abs()
            margin = r.margin * ramp(at, r.margin_from, 1.0)
            loss = loss + margin * (p * (1 - p)).mean()
            rate = (parts.gates + p - p.detach()).mean((1, 2))
            low, high = rate_bounds(r, len(rate))
            outside = (low - rate).relu() + (rate - high).relu()
            loss = loss + r.spread * outside.square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {
            "loss": float(loss.detach()),
            "ce": float(parts.ce.detach()),
            "depth": float(parts.depth_cost.detach()),
            "aux": float(parts.router_aux_by_layer.mean().detach()),
            "norm": float(norm),
        }


def train(trainer: Trainer, steps: int) -> None:
    """Train, and print where it stands every twenty seconds."""
    begin = shown = time.monotonic()
    sample = tiny_data.windows(trainer.corpus.heldout, LENGTH)[::15]
    for step in range(steps):
        parts = trainer.step(step / steps)
        now = time.monotonic()
        if now - shown < 20 and step + 1 < steps:
            continue
        shown = now
        bits, rates = tiny_report.quick(trainer.model, sample)
        words = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        runs = " ".join(f"{rate:.2f}" for rate in rates)
        left = (now - begin) / (step + 1) * (steps - step - 1) / 60
        print(
            f"{step + 1:5d} of {steps}, {left:4.1f} minutes left  {words}  "
            f"held-out {bits:.3f} bits  runs {runs}",
            flush=True,
        )


def write(trainer: Trainer, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint directory with its report: aside, then renamed into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        trainer.model.save_directory(aside)
        tiny_data.write_tokenizer(aside / "tokenizer.json")
        generation = {"do_sample": False, "max_new_tokens": 64, "temperature": 1.0, "top_p": 1.0}
        text = json.dumps(generation, indent=2) + "\n"
        (aside / "generation_config.json").write_text(text, encoding="utf-8")
        (aside / "heldout.txt").write_text(trainer.corpus.heldout, encoding="utf-8")
        share = trainer.recipe.arithmetic_share
        report = tiny_report.write_report(aside, trainer.corpus, share, facts)
        aside.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return report


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python samples/train_tiny.py --out /tmp/tiny --steps 200",
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "tiny-liquid", help="what to write")
    parser.add_argument("--steps", type=int, default=1500, help="updates (default 1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-gates", action="store_true", help="every token runs every layer")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be 1 or more")
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists: --force replaces it")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config = static_config() if args.no_gates else tiny_config()
    trainer = Trainer(config, Recipe(), args.seed)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count / 1e6:.2f} M parameters, depth target {trainer.config.training.depth_target}")
    begin = time.process_time()
    train(trainer, args.steps)
    minutes = (time.process_time() - begin) / 60
    facts = {"seed": args.seed, "steps": args.steps, "minutes": minutes}
    report = write(trainer, args.out, facts)
    print(f"wrote {args.out}: {report['bits_per_byte']:.3f} bits per byte on held-out text")


if __name__ == "__main__":
    main()

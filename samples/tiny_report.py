"""Evaluate the tiny sample on held-out text and write its training report.

Everything is measured on windows of 256 bytes, teacher-forced, without a cache. A difference of
two models is paired by window; its standard error is that of the mean over the windows.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend.gate_hooks import random_gates
from liquidc.frontend.model import LiquidForCausalLM

LENGTH = 256
ROWS = 16
TRAINING_WINDOWS = 96
"""Windows of training text on which the best fixed set of layers is chosen."""


@dataclass(frozen=True)
class Evaluation:
    """A model on N windows of T bytes.

    bits f32[N, T] of each byte; right bool[N, T], whether it was the most probable; gates
    bool[G, N, T]; p f32[G, N, T]; experts i64[L, N, T, k].
    """

    bits: Tensor
    right: Tensor
    gates: Tensor
    p: Tensor
    experts: Tensor

    @property
    def by_window(self) -> Tensor:
        """Bits per byte of each window, f32[N]."""
        return self.bits.mean(1)

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return float(self.bits.mean())


@torch.no_grad()
def evaluate(model: LiquidForCausalLM, windows: Tensor, force: Tensor | None = None) -> Evaluation:
    """The model on windows i64[N, T + 1]; `force` i8[G] as in the model."""
    parts: list[tuple[Tensor, ...]] = []
    for rows in windows.split(ROWS):
        out = model(rows[:, :-1], gate_force=force)
        bits = F.cross_entropy(out.logits.transpose(1, 2), rows[:, 1:], reduction="none")
        right = out.logits.argmax(-1) == rows[:, 1:]
        parts.append((bits / math.log(2), right, out.gates, out.gate_p, out.experts))
    bits, right, gates, p, experts = zip(*parts, strict=True)
    joined = (torch.cat(x, 1) for x in (gates, p, experts))
    return Evaluation(torch.cat(bits), torch.cat(right), *joined)


def quick(model: LiquidForCausalLM, windows: Tensor) -> tuple[float, list[float]]:
    """Bits per byte of windows i64[N, T + 1], and the run rate of each gate."""
    result = evaluate(model, windows)
    return result.bpb, result.gates.float().mean((1, 2)).tolist()


@contextmanager
def rounded(model: nn.Module, bits: int, block: int | None) -> Iterator[None]:
    """Matrices of layers rounded to `bits`, symmetric, per row or per block of a row.

    The gates' own weights and those of the experts' routers stay as they are, as an engine would
    keep them.
    """
    kept: dict[str, Tensor] = {}
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.ndim < 2 or "depth_gate" in name or "mlp.gate." in name or "embed" in name:
                continue
            kept[name] = w.clone()
            parts = w.reshape(*w.shape[:-1], -1, block or w.shape[-1])
            scale = parts.abs().amax(-1, keepdim=True) / most
            w.copy_(((parts / scale).round() * scale).reshape(w.shape))
        try:
            yield
        finally:
            for name, w in model.named_parameters():
                if name in kept:
                    w.copy_(kept[name])


def best_fixed(model: LiquidForCausalLM, windows: Tensor, size: int) -> list[int]:
    """The gates whose fixed set of `size` does best on windows of training text."""
    count = model.config.num_gates
    sets = list(itertools.combinations(range(count), size))
    return list(min(sets, key=lambda s: evaluate(model, windows, force(count, s)).bpb))


def force(count: int, on: Any) -> Tensor:
    """The control i8[G] that runs the gates `on` and skips the others."""
    return torch.tensor([1 if gate in on else -1 for gate in range(count)], dtype=torch.int8)


def trigram(corpus: tiny_data.Corpus, share: float, windows: Tensor) -> float:
    """Bits per byte of a smoothed byte-trigram model fitted to the training text.

    Each order is smoothed with the next lower one as a Dirichlet prior (MacKay and Peto 1995) of
    the strength, among powers of two, that does best on the held-out text itself: in its favour.
    """
    numbers = int(len(corpus.prose) * share / (1 - share))
    train = torch.cat([corpus.prose, corpus.arithmetic[:numbers]]).long()
    first, second, third = train[:-2], train[1:-1], train[2:]
    one = torch.bincount(train, minlength=256).float() + 1
    two = torch.bincount(first * 256 + second, minlength=1 << 16).view(256, 256).float()
    three = torch.bincount((first * 256 + second) * 256 + third, minlength=1 << 24)
    three = three.view(1 << 16, 256).float()
    a, b, c = windows[:, :-2].flatten(), windows[:, 1:-1].flatten(), windows[:, 2:].flatten()
    best = math.inf
    for strength in (2.0**n for n in range(-2, 8)):
        p2 = (two + strength * one / one.sum()) / (two.sum(1, keepdim=True) + strength)
        seen = three[a * 256 + b]
        p = (seen.gather(1, c[:, None])[:, 0] + strength * p2[b, c]) / (seen.sum(1) + strength)
        best = min(best, float(-p.log2().mean()))
    return best


def paired(worse: Evaluation, better: Evaluation) -> dict[str, float]:
    """How many bits per byte `worse` is above `better`, with its standard error."""
    gap = worse.by_window - better.by_window
    error = float(gap.std() / math.sqrt(len(gap)))
    errors = float(gap.mean()) / error if error else 0.0
    return {"bits": float(gap.mean()), "error": error, "errors": errors}


def kinds(windows: Tensor) -> dict[str, Tensor]:
    """Which bytes bool[N, T] are prose and which the results of arithmetic, by grade."""
    text = bytes(windows[:, 1:].flatten().tolist()).decode("latin-1")
    where = {"prose": torch.ones(len(text), dtype=torch.bool)}
    for grade in tiny_data.GRADES:
        where[f"results, {grade} digits"] = torch.zeros(len(text), dtype=torch.bool)
    for match in tiny_data.PROBLEM.finditer(text):
        where["prose"][match.start() : match.end() + 1] = False
        grade = tiny_data.grade(int(match[1]), int(match[3]))
        where[f"results, {grade} digits"][match.start(4) : match.end() + 1] = True
    return {name: mask.view(windows.shape[0], -1) for name, mask in where.items()}


def exact_results(result: Evaluation, windows: Tensor) -> dict[str, float]:
    """The share of problems, by grade, of which every byte after = was the most probable."""
    text = bytes(windows[:, 1:].flatten().tolist()).decode("latin-1")
    right = result.right.flatten()
    found: dict[str, list[bool]] = {}
    for match in tiny_data.PROBLEM.finditer(text):
        name = f"{tiny_data.grade(int(match[1]), int(match[3]))} digits"
        found.setdefault(name, []).append(bool(right[match.start(4) : match.end() + 1].all()))
    return {name: sum(hits) / len(hits) for name, hits in sorted(found.items())}


def measure(model: LiquidForCausalLM, corpus: tiny_data.Corpus, share: float) -> dict[str, Any]:
    """Everything that the report says about a trained model."""
    model.eval()
    held = tiny_data.windows(corpus.heldout, LENGTH)
    learnt = evaluate(model, held)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_bytes": held.numel(),
        "bits_per_byte": learnt.bpb,
        "bits_per_byte_trigram": trigram(corpus, share, held),
        "exact_results": exact_results(learnt, held),
    }
    if model.config.num_gates:
        report |= _measure_gates(model, corpus, share, held, learnt)
    return report


def _measure_gates(
    model: LiquidForCausalLM,
    corpus: tiny_data.Corpus,
    share: float,
    held: Tensor,
    learnt: Evaluation,
) -> dict[str, Any]:
    """What it says about its gates."""
    config, gates = model.config, model.config.num_gates
    rates = learnt.gates.float().mean((1, 2)).tolist()
    depth = learnt.gates.sum(0) + config.num_hidden_layers - gates
    size = math.ceil(sum(rates) - 1e-9)
    generator = torch.Generator().manual_seed(7)
    known = tiny_data.batch(corpus, TRAINING_WINDOWS, LENGTH + 1, generator, share)
    chosen = best_fixed(model, known, size)
    fixed = evaluate(model, held, force(gates, chosen))
    with random_gates(model, rates, 11):
        random = evaluate(model, held)
    distance = (learnt.p - config.depth_gate.threshold).abs()
    shares = torch.stack(
        [torch.bincount(layer[layer >= 0], minlength=8).float() for layer in learnt.experts]
    )
    shares = shares / shares.sum(1, keepdim=True)
    flips: dict[str, float] = {}
    for name, bits, block in (("int8 per row", 8, None), ("int4 per block of 32", 4, 32)):
        with rounded(model, bits, block):
            other = evaluate(model, held)
        flips[name] = float((other.gates != learnt.gates).float().mean())
        flips[f"{name}, bits per byte"] = other.bpb
    by_kind = {name: mask for name, mask in kinds(held).items() if mask.any()}
    return {
        "bits_per_byte_all_layers": evaluate(model, held, force(gates, range(gates))).bpb,
        "bits_per_byte_random_mask": random.bpb,
        "random_mask_worse_by": paired(random, learnt),
        "fixed_set": [config.depth_gate.layers[gate] for gate in chosen],
        "bits_per_byte_fixed_set": fixed.bpb,
        "fixed_set_worse_by": paired(fixed, learnt),
        "run_rates": rates,
        "gated_layers_run": sum(rates) / gates,
        "depth_mean": float(depth.float().mean()),
        "depth_deviation": float(depth.float().std()),
        "depth_histogram": torch.bincount(
            depth.flatten(), minlength=config.num_hidden_layers + 1
        ).tolist(),
        "depth_target": config.training.depth_target,
        "decisions_within_0.02": float((distance < 0.02).float().mean()),
        "decisions_within_0.05": float((distance < 0.05).float().mean()),
        "expert_share_least": float(shares.min()),
        "expert_shares": shares.tolist(),
        "flips": flips,
        "by_kind": {
            name: {
                "bytes": int(mask.sum()),
                "bits_per_byte": float(learnt.bits[mask].mean()),
                "depth": float(depth[mask].float().mean()),
            }
            for name, mask in by_kind.items()
        },
    }


def write_report(
    directory: Path, corpus: tiny_data.Corpus, share: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """Measure the checkpoint in `directory`; write training_report.json and .md into it."""
    model = LiquidForCausalLM.from_directory(directory)
    report = {**facts, **measure(model, corpus, share)}
    text = json.dumps(report, indent=1, sort_keys=True) + "\n"
    (directory / "training_report.json").write_text(text, encoding="utf-8")
    (directory / "training_report.md").write_text(_markdown(report), encoding="utf-8")
    return report


def _markdown(r: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Training report",
        "",
        f"Written by `samples/train_tiny.py`: seed {r['seed']}, {r['steps']} steps, "
        f"{r['minutes']:.1f} minutes, {r['parameters'] / 1e6:.2f} M parameters. "
        f"Measured on {r['heldout_bytes']:,} bytes of held-out text.",
        "",
    ]
    if "run_rates" in r:
        lines += _gates_markdown(r)
    else:
        lines += [
            f"{r['bits_per_byte']:.3f} bits per byte, every layer run by every token; "
            f"a smoothed byte trigram has {r['bits_per_byte_trigram']:.3f}."
        ]
    return "\n".join(lines) + "\n"


def _gates_markdown(r: dict[str, Any]) -> list[str]:
    """What gates do, and are worth."""
    fixed, random = r["fixed_set_worse_by"], r["random_mask_worse_by"]
    rows = [
        ("byte trigram, smoothed", r["bits_per_byte_trigram"], ""),
        (
            "the same run rates, tokens chosen at random",
            r["bits_per_byte_random_mask"],
            f"{random['bits']:+.3f} ± {random['error']:.3f}",
        ),
        (
            f"best fixed set of gated layers, {r['fixed_set']}",
            r["bits_per_byte_fixed_set"],
            f"{fixed['bits']:+.3f} ± {fixed['error']:.3f} ({fixed['errors']:.1f} standard errors)",
        ),
        ("**learnt gates**", r["bits_per_byte"], ""),
        ("all layers run", r["bits_per_byte_all_layers"], ""),
    ]
    gates = len(r["run_rates"])
    return [
        "| model | bits per byte | against the learnt gates |",
        "|---|---|---|",
        *(f"| {name} | {bits:.3f} | {gap} |" for name, bits, gap in rows),
        "",
        f"The fixed set has {len(r['fixed_set'])} of {gates} gated layers, the learnt gates run "
        f"{sum(r['run_rates']):.2f} on average; it was chosen on training text among all sets of "
        "that size.",
        "",
        "## Depth",
        "",
        f"{r['depth_mean']:.2f} layers per token, standard deviation {r['depth_deviation']:.2f}; "
        f"{100 * r['gated_layers_run']:.0f} % of the gated layers run. "
        f"Run rate by gate: {', '.join(f'{rate:.2f}' for rate in r['run_rates'])}.",
        "",
        "| layers run | tokens |",
        "|---|---|",
        *(f"| {n} | {count:,} |" for n, count in enumerate(r["depth_histogram"]) if count),
        "",
        "| bytes | count | bits per byte | layers run |",
        "|---|---|---|---|",
        *(
            f"| {name} | {k['bytes']:,} | {k['bits_per_byte']:.3f} | {k['depth']:.2f} |"
            for name, k in r["by_kind"].items()
        ),
        "",
        "Results of arithmetic that are right in every digit: "
        + ", ".join(f"{name} {100 * share:.0f} %" for name, share in r["exact_results"].items())
        + ".",
        "",
        "## Margins",
        "",
        f"{100 * r['decisions_within_0.05']:.2f} % of the decisions lie within 0.05 of the "
        f"threshold, {100 * r['decisions_within_0.02']:.2f} % within 0.02. Rounding the layers' "
        f"matrices flips {100 * r['flips']['int8 per row']:.2f} % of them (int8 per row) and "
        f"{100 * r['flips']['int4 per block of 32']:.2f} % (int4 per block of 32).",
        "",
        f"The least used expert of any layer gets {100 * r['expert_share_least']:.1f} % of its "
        "layer's choices.",
    ]

"""What a compile costs as models get deeper: the trace, and the passes.

Each compile is a process of its own, as it is for a user; importing PyTorch's tracer is a part of
its first trace. Layers are narrow: weights are not read by either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.shapes import wide
from liquidc.bench import interval
from liquidc.frontend.model import LiquidForCausalLM

DEPTHS = (8, 32)
TRACE_BOUND = 1.3
"""Of the trace of 32 layers to that of 8."""
PASSES_BOUND = 1.0
"""Seconds for 1,000 ops of the traced module."""


def save_narrow(layers: int, directory: Path) -> None:
    """A dense model of many gated layers, 64 wide."""
    config = replace(
        wide("dense", "own", layers=layers),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    LiquidForCausalLM(config).eval().save_directory(directory)


def compiled(model: Path, engine: Path, quantize: str | None = None) -> dict[str, Any]:
    """The build log of a compile in a process of its own."""
    command = [sys.executable, "-m", "liquidc.cli.main", "compile", model, "-o", engine, "--force"]
    command += ["--quantize", quantize] if quantize else []
    subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
    log = json.loads(engine.with_name(f"{engine.name}.build.json").read_text())
    return log | {stage["name"]: stage["seconds"] for stage in log["stages"]}


def measure(directory: Path, turns: int) -> dict[str, Any]:
    """Compiles of both depths in turns: ratios of their traces, seconds of passes by 1,000 ops."""
    models = {layers: directory / f"narrow-{layers}" for layers in DEPTHS}
    for layers, model in models.items():
        save_narrow(layers, model)
    engine = directory / "engine"
    logs = [
        {layers: compiled(model, engine) for layers, model in models.items()} for _ in range(turns)
    ]
    few, many = DEPTHS
    ratios = [log[many]["trace"] / log[few]["trace"] for log in logs]
    passes = [1000 * log[many]["passes"] / log[many]["ops"] for log in logs]
    peaks = {layers: max(log[layers]["peak_rss_bytes"] for log in logs) for layers in DEPTHS}
    return {
        "trace_seconds": {n: float(np.median([log[n]["trace"] for log in logs])) for n in DEPTHS},
        "trace_ratio": float(np.median(ratios)),
        "trace_ratio_interval": interval(ratios),
        "passes_seconds_per_1000_ops": float(np.median(passes)),
        "passes_interval": interval(passes),
        "ops": logs[0][many]["ops"],
        "peak_rss_bytes": peaks,
        "turns": turns,
    }


def show(told: dict[str, Any], models: dict[str, Any]) -> None:
    """Two Markdown tables: depth, and the compiles of the bench's own models."""

    def limit(value: float, most: float) -> str:
        return f"≤ {most:g}" + ("" if value <= most else " missed")

    few, many = DEPTHS
    ratio, (low, high) = told["trace_ratio"], told["trace_ratio_interval"]
    print(f"\n**Compiles, {told['turns']} turns**\n\n| | median (95 %) | bound |\n|---|---|---|")
    print(
        f"| trace of {many} layers to that of {few} | {ratio:.2f} ({low:.2f} to {high:.2f}) "
        f"| {limit(ratio, TRACE_BOUND)} |"
    )
    passes, (low, high) = told["passes_seconds_per_1000_ops"], told["passes_interval"]
    print(
        f"| seconds of passes for 1,000 of {told['ops']} ops | {passes:.2f} ({low:.2f} to "
        f"{high:.2f}) | {limit(passes, PASSES_BOUND)} |"
    )
    print("\n| compile | seconds | of these passes | peak memory, MB | engine, MB |")
    print("|---|---|---|---|---|")
    for name, log in models.items():
        stages = {stage["name"]: stage for stage in log["stages"]}
        written = sum(stage["bytes_written"] for stage in log["stages"])
        print(
            f"| {name} | {log['seconds']:.1f} | {stages['passes']['seconds']:.2f} "
            f"| {log['peak_rss_bytes'] / 1e6:.0f} | {written / 1e6:.0f} |"
        )
    sys.stdout.flush()

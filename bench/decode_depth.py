"""How decode time follows the layers that run: python bench/decode_depth.py [--policy own].

A model of random weights (width 1,024, 8 layers, all gated, vocabulary 256) is compiled once for
each cache policy; one engine file is then driven by `gate_force` at run time. Levels take turns;
ratios are to all layers on, in the same run. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import liquidc
from liquidc.backends.base import RunnerOptions
from liquidc.bench import BenchOptions, bench
from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM

POLICIES = ("own", "drop", "inherit")


def wide_model(policy: str) -> LiquidForCausalLM:
    """The model of the bench."""
    torch.manual_seed(0)
    config = LiquidConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        depth_gate=DepthGateConfig(layers=tuple(range(8)), kv_policy=policy),
    )
    return LiquidForCausalLM(config).eval()


def measure(policy: str, options: BenchOptions) -> dict[str, Any]:
    """Compile, load for measuring, time."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = Path(scratch) / policy
        liquidc.compile(wide_model(policy), engine).close()
        with liquidc.load(engine, options=RunnerOptions(bench=True)) as loaded:
            return bench(loaded, options)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", choices=POLICIES, action="append", help="default: drop, own")
    parser.add_argument("--cached", type=int, action="append", help="tokens cached (default 16)")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for policy in args.policy or ["drop", "own"]:
        for cached in args.cached or [16]:
            options = BenchOptions(cached=cached, turns=args.turns, prompt=0)
            found.append({"policy": policy, "cached": cached, **measure(policy, options)})
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("| policy | cached | layers on | ms, median (95 %) | ratio |")
    print("|---|---|---|---|---|")
    for result in found:
        full = result["rows"][0]["ms_median"]
        for row in result["rows"]:
            ms = f"{row['ms_median']:.2f} ({row['ms_low']:.2f} to {row['ms_high']:.2f})"
            level, ratio = row["name"].removeprefix("decode, "), row["ms_median"] / full
            print(f"| {result['policy']} | {result['cached']} | {level} | {ms} | {ratio:.3f} |")
    print(f"\n{json.dumps(found[0]['machine'])}, {args.turns} turns of 16 steps")


if __name__ == "__main__":
    main()

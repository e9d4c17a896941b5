"""liquidc's 4 and 8 bits beside llama.cpp's Q4_0 and Q8_0: python bench/beside_llama.py.

Both decode random weights of the same shapes (width 1,024, 8 layers, vocabulary 256, head included;
dense, and 8 experts of which a token uses 2), one token at a time, on as many threads. They take
turns; each turn gives the ratio of their median steps, reported is the median of these ratios with
its 95 % interval. Needs `pip install liquidc[llama]`, which compiles llama.cpp for this processor;
where AMX is not permitted, build it without: GGML_NATIVE=OFF and the AVX options in CMAKE_ARGS.
Leave the machine alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import liquidc
from bench import llama_process
from bench.gguf_model import write
from liquidc.backends.base import RunnerOptions
from liquidc.bench import controls, interval
from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.moe_config import MoeConfig
from liquidc.measure import machine
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions
from liquidc.runtime import Engine

SCHEMES = {"Q4_0": "int4{{head=same,block={block}}}", "Q8_0": "int8"}
"""What liquidc is asked for beside each type. Q4_0 has a float16 scale for 32 weights, 4.5 bits a
weight; int4 has a float32 scale, which is as many bits with blocks of 64."""
LEVELS = (100, 50)
WARM_UP = 3
PAUSE = 0.05
"""Seconds before a turn: threads of the runtime that had the last one no longer wait actively."""


def shape(kind: str, layers: int) -> LiquidConfig:
    """The model: all layers gated, keys and values of skipped tokens dropped."""
    dense = LiquidConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        depth_gate=DepthGateConfig(layers=tuple(range(layers)), kv_policy="drop"),
    )
    if kind == "dense":
        return dense
    moe = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1408)
    return replace(dense, moe=moe)


class Llama:
    """A GGUF file in llama.cpp, in a process of its own that loads no other runtime."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        target = llama_process.serve
        self._process = spawn.Process(target=target, args=(theirs, str(path), context, threads))
        self._process.start()

    def decode(self, tokens: list[int], cached: int, steps: int) -> list[float]:
        """Seconds of each step after the first tokens, the cache empty before them."""
        self._pipe.send((tokens, cached, WARM_UP, steps))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def decode(engine: Engine, tokens: list[int], cached: int, steps: int, level: int) -> list[float]:
    """Seconds of each step of a liquidc engine; the cache is filled with every layer on."""
    session = engine.session(capacity=cached + steps + WARM_UP)
    session.prefill(tokens[:cached], depth=controls(engine, 100))
    depth = controls(engine, level)
    timed: list[float] = []
    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        session.step([tokens[step % len(tokens)]], depth=depth)
        timed.append(time.perf_counter() - start)
    return timed[WARM_UP:]


def measure(kind: str, type: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build both, let them take turns."""
    config = shape(kind, options.layers)
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 512).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in ("llama.cpp", *map(str, LEVELS))}
    with tempfile.TemporaryDirectory() as scratch:
        gguf, directory = Path(scratch) / "model.gguf", Path(scratch) / "engine"
        write(gguf, config, type)
        model = LiquidForCausalLM(config).eval()
        scheme = SCHEMES[type].format(block=options.block)
        compile_model(model, directory, CompileOptions(quantize=scheme))
        del model
        llama = Llama(gguf, options.cached + options.steps + WARM_UP, options.threads)
        with liquidc.load(directory, options=RunnerOptions(threads=options.threads)) as engine:
            for turn in range(-1, options.turns):
                order = list(seconds) if turn % 2 else list(reversed(seconds))
                for name in order:
                    time.sleep(PAUSE)
                    if name == "llama.cpp":
                        timed = llama.decode(tokens, options.cached, options.steps)
                    else:
                        timed = decode(engine, tokens, options.cached, options.steps, int(name))
                    if turn >= 0:
                        seconds[name].append(float(np.median(timed)))
        llama.close()
        sizes = {"gguf": gguf.stat().st_size, "engine": (directory / "weights.bin").stat().st_size}
    theirs = seconds["llama.cpp"]
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        ratios = [a / b for a, b in zip(seconds[str(level)], theirs, strict=True)]
        low, high = interval(ratios)
        rows.append({"level": level, "ratio": float(np.median(ratios)), "low": low, "high": high})
    medians = {name: 1000 * float(np.median(times)) for name, times in seconds.items()}
    return {
        "shape": kind,
        "type": type,
        "scheme": scheme,
        "rows": rows,
        "ms_median": medians,
        "bytes": sizes,
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python bench/beside_llama.py --shape dense --type Q4_0 --turns 40\n"
        "  python bench/beside_llama.py --json > llama.json",
    )
    parser.add_argument("--shape", choices=["dense", "moe"], action="append")
    parser.add_argument("--type", choices=list(SCHEMES), action="append")
    parser.add_argument("--block", type=int, default=64, help="of int4: 32, 64 or 128 (default 64)")
    parser.add_argument("--turns", type=int, default=30, help="alternations (default 30)")
    parser.add_argument("--steps", type=int, default=16, help="steps of a turn (default 16)")
    parser.add_argument("--cached", type=int, default=16, help="tokens in the cache (default 16)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [
        measure(kind, type, options)
        for kind in options.shape or ["dense", "moe"]
        for type in options.type or list(SCHEMES)
    ]
    versions = {n: metadata.version(n) for n in ("llama-cpp-python", "onnxruntime")}
    if options.json:
        told = {"found": found, "machine": machine(), "versions": versions, **vars(options)}
        print(json.dumps(told, indent=1))
        return
    print("| shape | llama.cpp | liquidc | layers on | ratio of times, median (95 %) |")
    print("|---|---|---|---|---|")
    for result in found:
        for row in result["rows"]:
            ratio = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            both = f"{result['type']} | {result['scheme']}"
            print(f"| {result['shape']} | {both} | {row['level']} % | {ratio} |")
    print(f"\n{json.dumps(machine())}, {json.dumps(versions)}")
    print(f"{options.turns} turns of {options.steps} steps, {options.threads} threads")


if __name__ == "__main__":
    main()

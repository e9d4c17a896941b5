"""Experts as one QMoE against products for each: python bench/qmoe.py [--threads 2].

Both lowerings of one layer of quantised experts take turns on the same tokens, whose experts are
drawn at random. A row gives the medians in microseconds, and the median of the ratios of
neighbouring runs with its 95 % interval (bootstrap over the turns). Leave the machine alone
meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liquidc.backends.base import Choices
from liquidc.backends.onnxruntime.emit import lower, place
from liquidc.backends.weights_file import NAME, write_weights
from liquidc.ir import Module, parse_module
from liquidc.ir.rewriter import Statistics
from liquidc.passes.quantize import Quantize

SHAPES = ((1024, 1024, 16), (1024, 512, 16), (128, 128, 8))
"""Width, width of an expert, experts; the last is the sample's."""
SCHEMES = ("int8", 32), ("int8", 128), ("int4", 32)
TOKENS = {1: 200, 64: 40, 256: 20}
"""Turns by number of tokens."""
TEXT = """
module @experts
weight @gu : f32[{e}, {i2}, {d}] = tensor("gate_up", f32[{e}, {i2}, {d}])
weight @down : f32[{e}, {d}, {i}] = tensor("down", f32[{e}, {d}, {i}])
func @prefill(%x: f32[T, {d}], %l: f32[T, {e}], %m: bool[T]) -> (y: f32[T, {d}]) {{
  %gu = weight weight="gu" : f32[{e}, {i2}, {d}]
  %down = weight weight="down" : f32[{e}, {d}, {i}]
  %i, %w = route %l, %m, k=2 : i64[T, 2], f32[T, 2]
  %y = grouped_experts %x, %i, %w, %gu, %down : f32[T, {d}]
  return %y
}}
"""


class Random:
    """Normal weights of one shape."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        numbers = torch.Generator().manual_seed(0)
        shapes = {"gate_up": (experts, 2 * hidden, width), "down": (experts, width, hidden)}
        self.tensors = {
            name: torch.randn(shape, generator=numbers) / shape[-1] ** 0.5
            for name, shape in shapes.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `WeightSource`."""
        return self.tensors[name][start:stop]


def session(
    module: Module, source: Random, choices: Choices, directory: Path, threads: int
) -> ort.InferenceSession:
    """One lowering, loaded."""
    lowered = lower(module, choices=choices)
    directory.mkdir()
    offsets = write_weights(directory / NAME, lowered.weights, source, lambda count: None)
    path = directory / "model.onnx"
    path.write_bytes(place(lowered, NAME, offsets).SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def turns(
    sessions: list[ort.InferenceSession], tokens: int, width: int, experts: int
) -> np.ndarray:
    """Seconds, [turns, sessions]; the first turns are not counted."""
    numbers = np.random.default_rng(tokens)
    taken = np.zeros((TOKENS[tokens] + 3, len(sessions)))
    for turn in range(len(taken)):
        given = {
            "x": numbers.standard_normal((tokens, width)).astype(np.float32),
            "l": numbers.standard_normal((tokens, experts)).astype(np.float32),
            "m": np.ones(tokens, bool),
        }
        for at in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            sessions[at].run(None, given)
            taken[turn, at] = time.perf_counter() - start
    return taken[3:]


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % of the medians of samples drawn with replacement."""
    drawn = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    print("| width, expert, experts | scheme | tokens | conditionals, us | QMoE, us | ratio |")
    print("|---|---|---|---|---|---|")
    for width, hidden, experts in SHAPES:
        source = Random(width, hidden, experts)
        text = TEXT.format(d=width, i=hidden, i2=2 * hidden, e=experts)
        for scheme, block in SCHEMES:
            module = parse_module(text)
            Quantize(scheme=scheme, block=block).run(module, Statistics())
            with tempfile.TemporaryDirectory() as scratch:
                sessions = [
                    session(
                        module,
                        source,
                        Choices(fused_experts=fused),
                        Path(scratch) / str(fused),
                        threads,
                    )
                    for fused in (False, True)
                ]
                for tokens in TOKENS:
                    taken = turns(sessions, tokens, width, experts)
                    ratios = taken[:, 1] / taken[:, 0]
                    low, high = interval(ratios)
                    branch, fused = (f"{1e6 * t:,.0f}" for t in np.median(taken, axis=0))
                    print(
                        f"| {width}, {hidden}, {experts} | {scheme}, {block} | {tokens} | {branch} "
                        f"| {fused} | {np.median(ratios):.2f} [{low:.2f}, {high:.2f}] |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

"""What `liquify` is worth: python bench/liquify.py [--model DIRECTORY] [--json FILE].

Both methods on a small model that was trained without gates (by `samples/train_tiny.py --no-gates`,
20 minutes, unless one is given): bits per byte of held-out text against the share of the gated
layers' work that is skipped. Layers closed by influence are compared with all sets of as many
layers; trained gates with tokens that skip at random, each gate at its own rate. About 25 minutes
on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "samples"))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import tiny_data
import tiny_report
import torch

from liquidc.frontend.model import LiquidForCausalLM
from liquidc.gate_tuning import Tuning, measure
from liquidc.liquify import Recipe, liquify

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 1 << 20
"""Training text on which gates are trained and influence is measured."""
PIECE = 4096
"""Bytes of prose or arithmetic that follow each other in it."""
SHARES = (0.8, 0.6, 0.4)
LENGTH = 256


def training_text(path: Path) -> None:
    """Prose and arithmetic as the model saw them, by turns."""
    corpus = tiny_data.build(0)
    pieces: list[int] = []
    for i in range(TEXT_BYTES // PIECE):
        source = corpus.arithmetic if i % 10 in (2, 5, 8) else corpus.prose
        at = i * PIECE % (len(source) - PIECE)
        pieces += source[at : at + PIECE].tolist()
    path.write_text(bytes(pieces).decode("ascii", "replace"))


def closed_layers(
    model: Path, text: Path, scratch: Path, held: torch.Tensor
) -> list[dict[str, Any]]:
    """Layers closed by influence, one more at a time, beside every other choice."""
    rows: list[dict[str, Any]] = []
    open_gates = scratch / "open"
    liquify(model, open_gates, Recipe())
    network = LiquidForCausalLM.from_directory(open_gates)
    count = network.config.num_gates

    def bits(closed: tuple[int, ...]) -> float:
        force = torch.ones(count, dtype=torch.int8)
        force[list(closed)] = -1
        return tiny_report.evaluate(network, held, force).bpb

    for skip in range(1, count):
        out = scratch / f"skip-{skip}"
        made = liquify(model, out, Recipe(skip=skip, data=text, length=LENGTH))
        found = tiny_report.evaluate(LiquidForCausalLM.from_directory(out), held)
        others = [bits(choice) for choice in itertools.combinations(range(count), skip)]
        rows.append(
            {
                "method": "influence",
                "closed": list(made.closed),
                "skipped": skip / count,
                "bits": found.bpb,
                "sets": len(others),
                "bits_of_sets": {
                    "best": min(others),
                    "median": statistics.median(others),
                    "worst": max(others),
                },
            }
        )
        print(rows[-1], flush=True)
    return rows


def trained_gates(
    model: Path, text: Path, scratch: Path, held: torch.Tensor, tuning: Tuning
) -> list[dict[str, Any]]:
    """Gates trained to several shares, with and without adapters."""
    rows: list[dict[str, Any]] = []
    for adapter, share in itertools.product((None, 0), SHARES):
        out = scratch / f"run-{share}-{adapter}"
        recipe = Recipe(run=share, adapter=adapter, data=text, length=LENGTH, tuning=tuning)
        liquify(model, out, recipe)
        found = measure(LiquidForCausalLM.from_directory(out), held)
        rows.append(
            {
                "method": "gates" if adapter is None else "gates and adapters",
                "run": share,
                "skipped": found.skipped,
                "gates": list(found.gates),
                "bits": found.loss / math.log(2),
                "bits_at_random": found.loss_random / math.log(2),
                "bits_all": found.loss_all / math.log(2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="trained by samples/train_tiny.py --no-gates")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = options.model
        if model is None:
            model = scratch / "static"
            script = ROOT / "samples" / "train_tiny.py"
            subprocess.run([sys.executable, script, "--no-gates", "--out", model], check=True)
        text = scratch / "text.txt"
        training_text(text)
        held = tiny_data.windows((model / "heldout.txt").read_text(), LENGTH)
        found = tiny_report.evaluate(LiquidForCausalLM.from_directory(model), held)
        result = {
            "bits": found.bpb,
            "bytes": held.shape[0] * LENGTH,
            "influence": closed_layers(model, text, scratch, held),
            "tuning": trained_gates(model, text, scratch, held, Tuning(steps=options.steps)),
        }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

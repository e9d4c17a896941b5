"""Memory, time and bytes of a compile: python bench/compile_memory.py --layers 32.

A checkpoint of random bf16 weights is written (`bench/large_checkpoint.py`) and compiled in a
process of its own; shown is what each stage took. Llama 3 8B takes 16 GB of disk, and 23 GB with
the engine; Qwen1.5-MoE-A2.7B 29 GB, and 40 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.large_checkpoint import FORMS, MODELS, write_checkpoint
from liquidc.measure import machine

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write, compile, read the build log."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model, engine = Path(scratch) / "model", Path(scratch) / "engine"
        total = write_checkpoint(MODELS[options.model](options.layers), model, options.form)
        command = [
            Path(sys.executable).with_name("liquidc"),
            "compile",
            model,
            "-o",
            engine,
            "--json",
        ]
        if options.quantize:
            command += ["--quantize", options.quantize]
        if "gptq" in options.quantize:
            shutil.copy(SAMPLES / "tiny-liquid" / "tokenizer.json", model)
            command += ["--calibration", SAMPLES / "corpus.txt"]
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True
        )
        told = json.loads(done.stdout)
        shutil.rmtree(model)
        return {
            "decode": decode(engine),
            "checkpoint_bytes": total,
            "weights_bytes": (engine / "weights.bin").stat().st_size,
            "quantize": options.quantize,
            "model": options.model,
            "form": options.form,
            "layers": options.layers,
            "machine": machine(),
            "torch": torch.__version__,
            **{key: told[key] for key in ("seconds", "peak_rss_bytes", "stages")},
        }


DECODE = """
import json, sys
import liquidc
from liquidc.measure import measured
with measured() as loading:
    engine = liquidc.load(sys.argv[1])
with measured() as decoding:
    tokens = [token.id for token in engine.generate([1, 2, 3, 4], 16)]
print(json.dumps({"load_seconds": loading.seconds, "seconds": decoding.seconds,
    "tokens": len(tokens), "peak_rss_bytes": max(loading.peak_rss_bytes, decoding.peak_rss_bytes)}))
"""


def decode(engine: Path) -> dict[str, Any]:
    """Load the engine in a process of its own, and decode 16 tokens."""
    command = [sys.executable, "-c", DECODE, str(engine)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b")
    parser.add_argument(
        "--layers", type=int, default=2, help="default: 2; of 32, or 24 with experts"
    )
    parser.add_argument("--form", choices=FORMS, default="hf", help="default: hf, without gates")
    parser.add_argument("--quantize", default="int4{block=64}", help="scheme, or empty for floats")
    parser.add_argument("--scratch", type=Path, help="directory for model and engine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told = measure(options)
    if options.json:
        print(json.dumps(told, indent=2))
        return
    print(f"{told['machine']['processor']}, torch {told['torch']}")
    sizes = f"{told['checkpoint_bytes'] / 1e9:.2f} GB in bf16"
    print(f"{sizes} -> {told['weights_bytes'] / 1e9:.2f} GB, {told['quantize'] or 'floats'}")
    for stage in told["stages"]:
        moved = (
            f"{stage['bytes_read'] / 1e9:7.2f} GB read {stage['bytes_written'] / 1e9:6.2f} written"
        )
        memory = f"{stage['peak_rss_bytes'] / 1e9:6.2f} GB of memory"
        print(f"{stage['name']:10s} {stage['seconds']:8.1f} s {moved} {memory}")
    rate = told["checkpoint_bytes"] / 1e9 / (told["seconds"] / 60)
    ran = told["decode"]
    print(
        f"engine loaded in {ran['load_seconds']:.1f} s; {ran['tokens']} tokens after 4 in "
        f"{ran['seconds']:.1f} s, {ran['peak_rss_bytes'] / 1e9:.2f} GB of memory"
    )
    print(f"{told['seconds']:.0f} s, {rate:.1f} GB of source weights per minute")


if __name__ == "__main__":
    main()

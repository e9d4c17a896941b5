"""Memory of a compile: python bench/compile_memory.py --layers 32 [--quantize int4].

A checkpoint of random bf16 weights in the shapes of Llama 3 8B is written, a shard for each layer,
and compiled in a process of its own; shown is the largest resident memory of each stage. With 32
layers it takes 16 GB of disk, and about 22 GB with the engine.
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
from safetensors.torch import save_file

from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.measure import machine

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def eight_billion(layers: int) -> LiquidConfig:
    """Shapes of Llama 3 8B (Grattafiori et al. 2024, table 3) with a gate in every other layer."""
    return LiquidConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        depth_gate=DepthGateConfig(layers=tuple(range(1, layers, 2)), kv_policy="own"),
    )


def write_checkpoint(config: LiquidConfig, directory: Path) -> int:
    """Random weights, one shard for each layer and one for the rest; gives the bytes."""
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        number = next((part for part in name.split(".") if part.isdigit()), "rest")
        groups.setdefault(number, []).append(name)
    numbers = torch.Generator().manual_seed(0)
    noise = torch.randn(2**24, generator=numbers).mul_(0.02).bfloat16()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in groups.items():
        shard = f"model-{number}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            count = shapes[name].numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].reshape(shapes[name])
            total += count * 2
            weight_map[name] = shard
        save_file(tensors, directory / shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write, compile, read the build log."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model, engine = Path(scratch) / "model", Path(scratch) / "engine"
        model.mkdir()
        total = write_checkpoint(eight_billion(options.layers), model)
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
        return {
            "checkpoint_bytes": total,
            "weights_bytes": (engine / "weights.bin").stat().st_size,
            "quantize": options.quantize,
            "layers": options.layers,
            "machine": machine(),
            "torch": torch.__version__,
            **{key: told[key] for key in ("seconds", "peak_rss_bytes", "stages")},
        }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="default: 2; 32 for all 8 billion")
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
        print(
            f"{stage['name']:10s} {stage['seconds']:8.1f} s {stage['peak_rss_bytes'] / 1e9:6.2f} GB"
        )


if __name__ == "__main__":
    main()

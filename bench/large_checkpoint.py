"""A large checkpoint of random weights: python bench/large_checkpoint.py llama-3-8b DIRECTORY.

Weights are bf16, in shards of a layer each, the same bytes on every run. They are written row block
by row block, so memory does not grow with the model. 32 layers of Llama 3 8B take 16 GB of disk, 24
of Qwen1.5-MoE-A2.7B 29 GB. `--form liquid` has a depth gate in every other layer and the experts
of a layer stacked; `--form hf` is what Hugging Face publishes: no gates, one tensor for each matrix
of each expert.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.moe_config import MoeConfig
from liquidc.frontend.shards import write_safetensors
from liquidc.ir.types import DType, TensorType

FORMS = ("liquid", "hf")
NOISE = 2**23 - 9
"""Elements of the random numbers that all tensors repeat: odd, so that rows begin elsewhere."""

Shapes = dict[str, tuple[int, ...]]


def llama_3_8b(layers: int = 32) -> LiquidConfig:
    """Shapes of Llama 3 8B (Grattafiori et al. 2024, table 3) with a gate in every other layer."""
    return LiquidConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        max_position_embeddings=8192,
        dtype="bfloat16",
        depth_gate=_gates(layers),
    )


def qwen_moe_a2_7b(layers: int = 24) -> LiquidConfig:
    """Shapes of Qwen1.5-MoE-A2.7B (its config.json) with a gate in every other layer."""
    return LiquidConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        rope_theta=1_000_000.0,
        max_position_embeddings=8192,
        dtype="bfloat16",
        depth_gate=_gates(layers),
        moe=MoeConfig(
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            post="none",
            shared_intermediate_size=5632,
            shared_gate="sigmoid",
        ),
    )


MODELS = {"llama-3-8b": llama_3_8b, "qwen1.5-moe-a2.7b": qwen_moe_a2_7b}


def _gates(layers: int) -> DepthGateConfig:
    return DepthGateConfig(layers=tuple(range(1, layers, 2)), kv_policy="own")


def write_checkpoint(config: LiquidConfig, directory: Path, form: str = "liquid") -> int:
    """Write config.json, the shards and their index; gives the bytes of all tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = liquid_shapes(config) if form == "liquid" else hf_shapes(config)
    shards: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        number = next((part for part in name.split(".") if part.isdigit()), "rest")
        shards.setdefault(f"model-{number}.safetensors", {})[name] = shape
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    for file, tensors in shards.items():
        _write_shard(directory / file, tensors, noise)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    told = config.to_dict() if form == "liquid" else hf_config(config)
    (directory / "config.json").write_text(json.dumps(told, indent=2))
    return total


def liquid_shapes(config: LiquidConfig) -> Shapes:
    """The tensors of a Liquid Transformer."""
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def hf_shapes(config: LiquidConfig) -> Shapes:
    """The tensors of `llama` or, with experts, of `qwen2_moe`, which has biases of q, k and v."""
    shapes: Shapes = {}
    for name, shape in liquid_shapes(config).items():
        if "depth_gate" in name:
            continue
        layer, experts, matrix = name.partition(".experts.")
        if experts:
            rows = shape[1] // 2 if matrix == "gate_up_proj" else shape[1]
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj") if rows != shape[1] else ("down_proj",):
                    shapes[f"{layer}.experts.{expert}.{part}.weight"] = (rows, shape[2])
            continue
        shapes[name] = shape
        if config.moe.num_experts and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        ):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    return shapes


def hf_config(config: LiquidConfig) -> dict[str, Any]:
    """config.json of `llama` or `qwen2_moe`."""
    told: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "torch_dtype": config.dtype,
    }
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rms_norm_eps", "rope_theta", "tie_word_embeddings"),
    ):
        told[name] = getattr(config, name)
    moe = config.moe
    if not moe.num_experts:
        return {**told, "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    return {
        **told,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.shared_intermediate_size,
        "norm_topk_prob": moe.post == "renorm",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _write_shard(path: Path, tensors: Shapes, noise: torch.Tensor) -> None:
    types = {name: TensorType(DType.BF16, shape) for name, shape in tensors.items()}
    write_safetensors(path, types, lambda name: _blocks(name, tensors[name], noise))


def _blocks(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's elements, bf16, some at a time: norms are 1, products keep the size of states."""
    left = math.prod(shape)
    if len(shape) == 1:
        yield torch.full(shape, 1.0 if "norm" in name else 0.0, dtype=torch.bfloat16)
        return
    scale = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
    scaled = (noise * scale).bfloat16()
    at = zlib.crc32(name.encode()) % NOISE
    while left:
        block = scaled[at : at + left]
        yield block
        left, at = left - len(block), 0


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="default: all of them")
    parser.add_argument("--form", choices=FORMS, default="liquid")
    options = parser.parse_args()
    make = MODELS[options.model]
    config = make() if options.layers is None else make(options.layers)
    total = write_checkpoint(config, options.directory, options.form)
    print(f"{options.directory}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

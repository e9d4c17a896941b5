"""GGUF files of random weights in the shapes of a liquid model with every layer on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from numpy.typing import NDArray

from liquidc.frontend.config import LiquidConfig

TYPES = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Types of tensors and of files by the name that llama.cpp gives them."""


def write(path: Path, config: LiquidConfig, type: str) -> None:
    """Write the file; every product's weight is quantised, the head too, routers are not."""
    kind, file_type = TYPES[type]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if not config.moe.num_experts:
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_feed_forward_length(config.moe.moe_intermediate_size)
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.num_experts_per_tok)
    numbers = np.random.default_rng(0)
    for name, shape in tensors(config).items():
        if name.endswith("norm.weight"):
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        weight: NDArray[np.float32] = numbers.standard_normal(shape, np.float32) * np.float32(0.02)
        if type == "F32" or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: LiquidConfig) -> dict[str, tuple[int, ...]]:
    """Names as llama.cpp has them, and shapes, output rows first."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "output_norm.weight": (width,),
        "output.weight": (config.vocab_size, width),
    }
    for layer in range(config.num_hidden_layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,),
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, queries),
            "ffn_norm": (width,),
        }
        if not config.moe.num_experts:
            block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width)}
            block |= {"ffn_down": (width, inner)}
        else:
            experts, inner = config.moe.num_experts, config.moe.moe_intermediate_size
            block |= {
                "ffn_gate_inp": (experts, width),
                "ffn_gate_exps": (experts, inner, width),
                "ffn_up_exps": (experts, inner, width),
                "ffn_down_exps": (experts, width, inner),
            }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes

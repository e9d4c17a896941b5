"""Qwen3-MoE: Qwen3 with experts, and no shared one."""

from __future__ import annotations

from liquidc.frontend.families import common, qwen2
from liquidc.frontend.families.common import Data, Family, llama_part, moe_layers, sliding
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2_moe import weight
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen3MoeConfig`."""
    del t
    data = llama_part(f)
    layers = moe_layers(f, data["num_hidden_layers"])
    moe = {
        "num_experts": f.integer("num_experts", least=0),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "moe_intermediate_size": f.integer("moe_intermediate_size", least=1),
        "layers": layers,
        "post": "renorm" if f.boolean("norm_topk_prob") else "none",
    }
    f.skip(("max_window_layers",))  # every layer slides
    window, every = qwen2.used_window(f), range(data["num_hidden_layers"])
    return {
        **data,
        "attention_bias": f.boolean("attention_bias"),
        "attention": sliding(data, window, every),
        "qk_norm": "head",
        "moe": moe if layers else {},
    }


QWEN3_MOE = Family(
    ("qwen3_moe",),
    read,
    weight,
    {
        **common.LLAMA,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    aliases={"num_local_experts": "num_experts"},
    ignored=IGNORED,
)

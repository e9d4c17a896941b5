"""OLMoE: norms over all heads of queries and keys at once; router weights as they are."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2_moe import weight
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`OlmoeConfig`."""
    del t
    data = llama_part(f)
    moe = {
        "num_experts": f.integer("num_experts", least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "post": "renorm" if f.boolean("norm_topk_prob") else "none",
    }
    return {
        **data,
        "attention_bias": f.boolean("attention_bias"),
        "attention": {"clip_qkv": f.optional_number("clip_qkv", above=0.0)},
        "qk_norm": "full",
        "moe": moe,
    }


OLMOE = Family(
    ("olmoe",),
    read,
    weight,
    {
        **common.LLAMA,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    aliases={"num_local_experts": "num_experts"},
    ignored=IGNORED,
)

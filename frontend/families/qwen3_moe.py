"""Qwen3-MoE: Qwen3 with experts, and no shared one."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, expert_count, llama_part, moe_layers
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2 import upper_layers_slide
from liquidc.frontend.families.qwen2_moe import weight
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen3MoeConfig`."""
    del t
    data = llama_part(f)
    layers = moe_layers(f, data["num_hidden_layers"])
    moe: Data = {}
    if layers:
        moe = {
            "num_experts": expert_count(f, 128),
            "num_experts_per_tok": f.integer("num_experts_per_tok", 8, least=1),
            "moe_intermediate_size": f.integer("moe_intermediate_size", 768, least=1),
            "layers": layers,
            "post": "renorm" if f.boolean("norm_topk_prob", False) else "none",
        }
    return {
        **data,
        "attention_bias": f.boolean("attention_bias", False),
        "attention": upper_layers_slide(f, data),
        "qk_norm": "head",
        "moe": moe,
    }


QWEN3_MOE = Family(("qwen3_moe",), read, weight, ignored=IGNORED)

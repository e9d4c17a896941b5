"""Qwen2-MoE: a shared expert behind a sigmoid beside the experts, dense layers between."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, expert_count, llama_part, moe_layers
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2 import upper_layers_slide
from liquidc.frontend.families.tensors import Tensors, experts
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen2MoeConfig`."""
    del t
    data = llama_part(f)
    attention = {**upper_layers_slide(f, data), "output_bias": False}
    moe = {
        "num_experts": expert_count(f, 60),
        "num_experts_per_tok": f.integer("num_experts_per_tok", 4, least=1),
        "moe_intermediate_size": f.integer("moe_intermediate_size", 1408, least=1),
        "layers": moe_layers(f, data["num_hidden_layers"]),
        "post": "renorm" if f.boolean("norm_topk_prob", False) else "none",
        "shared_intermediate_size": f.integer("shared_expert_intermediate_size", 5632, least=1),
        "shared_gate": "sigmoid",
    }
    biased = f.boolean("qkv_bias", True)
    return {**data, "attention_bias": biased, "attention": attention, "moe": moe}


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """Experts one by one or stacked; everything else has our name."""
    prefix, part, rest = name.partition("mlp.experts.")
    count = data["moe"]["num_experts"] if part else 0
    match rest:
        case "gate_up_proj":
            parts = ("gate_proj.weight", "up_proj.weight")
            return experts(t, prefix + part, rest, parts, count)
        case "down_proj":
            return experts(t, prefix + part, rest, ("down_proj.weight",), count)
        case _:
            return None


QWEN2_MOE = Family(("qwen2_moe",), read, weight, ignored=IGNORED)

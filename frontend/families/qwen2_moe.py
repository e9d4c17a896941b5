"""Qwen2-MoE: a shared expert behind a sigmoid beside the experts, dense layers between."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import (
    Data,
    Family,
    llama_part,
    moe_layers,
    sliding,
    sliding_kinds,
)
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2 import MANY, NO_WINDOW, used_window
from liquidc.frontend.families.tensors import Tensors, experts
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen2MoeConfig`."""
    del t
    data = llama_part(f)
    layers = moe_layers(f, data["num_hidden_layers"])
    moe = {
        "num_experts": f.integer("num_experts", least=0),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "moe_intermediate_size": f.integer("moe_intermediate_size", least=1),
        "layers": layers,
        "post": "renorm" if f.boolean("norm_topk_prob") else "none",
        "shared_intermediate_size": f.integer("shared_expert_intermediate_size", least=1),
        "shared_gate": "sigmoid",
    }
    return {
        **data,
        "attention_bias": f.boolean("qkv_bias"),
        "attention": {**_alternating(f, data), "output_bias": False},
        "moe": moe if layers else {},
    }


def _alternating(f: Fields, data: Data) -> Data:
    """Every other layer below `max_window_layers` slides, if the window is used at all."""
    window, end = used_window(f), f.integer("max_window_layers", least=-MANY)
    even = range(0, min(end, data["num_hidden_layers"]), 2)
    slides = sliding_kinds(f, data, even if f.boolean("use_sliding_window") else [])
    f.refuse_if(bool(slides) and window is None, "layer_types", f"full_attention alone{NO_WINDOW}")
    return sliding(data, window, slides)


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


QWEN2_MOE = Family(
    ("qwen2_moe",),
    read,
    weight,
    {
        **common.LLAMA,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
        "qkv_bias": True,
    },
    ignored=IGNORED,
)

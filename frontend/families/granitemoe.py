"""Granite-MoE: stacked experts, a softmax over the chosen ones, and four multipliers."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, halves
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`GraniteMoeConfig` and `GraniteMoeSharedConfig`."""
    del t
    data = llama_part(f)
    moe = {
        "num_experts": f.integer("num_local_experts", 8, least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", 2, least=1),
        "score": "identity",
        "post": "softmax_k",
        "shared_intermediate_size": f.integer("shared_intermediate_size", 0, least=0),
    }
    return {
        **data,
        "attention_bias": f.boolean("attention_bias", False),
        "attention": {"scale": f.number("attention_multiplier", 1.0, above=0.0)},
        "embedding_multiplier": f.number("embedding_multiplier", 1.0),
        "residual_multiplier": f.number("residual_multiplier", 1.0),
        "logits_scaling": f.number("logits_scaling", 1.0, above=0.0),
        "moe": moe,
    }


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """`block_sparse_moe` and `shared_mlp`, with the names of the Hub or of transformers 5."""
    del data
    layer, part, rest = name.partition(".mlp.")
    if not part:
        return None
    moe, shared = f"{layer}.block_sparse_moe.", f"{layer}.shared_mlp."
    match rest:
        case "gate.weight":
            return _either(t, moe + "router.layer.weight", moe + "router.weight")
        case "experts.gate_up_proj":
            return _either(t, moe + "input_linear.weight", moe + "experts.gate_up_proj")
        case "experts.down_proj":
            return _either(t, moe + "output_linear.weight", moe + "experts.down_proj")
        case "shared_expert.gate_proj.weight":
            return halves(t[shared + "input_linear.weight"], 0)[0]
        case "shared_expert.up_proj.weight":
            return halves(t[shared + "input_linear.weight"], 0)[1]
        case _:
            return t[shared + "output_linear.weight"]


def _either(t: Tensors, name: str, other: str) -> WeightExpr:
    return t[other] if other in t else t[name]


GRANITE_MOE = Family(("granitemoe", "granitemoeshared"), read, weight, ignored=IGNORED)

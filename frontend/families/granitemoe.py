"""Granite-MoE: stacked experts, a softmax over the chosen ones, and four multipliers."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, halves
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`GraniteMoeConfig`."""
    del t
    data = llama_part(f)
    moe = {
        "num_experts": f.integer("num_local_experts", least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "score": "identity",
        "post": "softmax_k",
    }
    return {
        **data,
        "attention_bias": f.boolean("attention_bias"),
        "attention": {"scale": f.optional_number("attention_multiplier", above=0.0)},
        "embedding_multiplier": f.number("embedding_multiplier"),
        "residual_multiplier": f.number("residual_multiplier"),
        "logits_scaling": f.number("logits_scaling", above=0.0),
        "moe": moe,
    }


def read_shared(f: Fields, t: Tensors) -> Data:
    """`GraniteMoeSharedConfig`."""
    data = read(f, t)
    width = f.integer("shared_intermediate_size", least=0)
    return {**data, "moe": {**data["moe"], "shared_intermediate_size": width}}


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


DEFAULTS = {
    **common.LLAMA,
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
SHARED_DEFAULTS = {**DEFAULTS, "shared_intermediate_size": 0}
GRANITE_MOE = Family(("granitemoe",), read, weight, DEFAULTS, ignored=IGNORED)
GRANITE_MOE_SHARED = Family(
    ("granitemoeshared",), read_shared, weight, SHARED_DEFAULTS, ignored=IGNORED
)

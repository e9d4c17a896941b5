"""Mixtral: every layer has experts, stored one by one as w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part, sliding
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, experts
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`MixtralConfig`."""
    del t
    data = llama_part(f)
    window, layers = f.optional_integer("sliding_window"), range(data["num_hidden_layers"])
    moe = {
        "num_experts": f.integer("num_local_experts", least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "score": "softmax",
        "post": "renorm",
    }
    return {**data, "attention": sliding(data, window, layers), "moe": moe}


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """`block_sparse_moe` of the Hub, or `mlp` as transformers 5 keeps it in memory."""
    layer, part, rest = name.partition(".mlp.")
    if not part:
        return None
    prefix = f"{layer}.block_sparse_moe."
    if prefix + "gate.weight" not in t:
        prefix = f"{layer}.mlp."
    inside, count = prefix + "experts.", data["moe"]["num_experts"]
    match rest:
        case "experts.gate_up_proj":
            return experts(t, inside, "gate_up_proj", ("w1.weight", "w3.weight"), count)
        case "experts.down_proj":
            return experts(t, inside, "down_proj", ("w2.weight",), count)
        case _:
            return t[prefix + rest]


MIXTRAL = Family(
    ("mixtral",),
    read,
    weight,
    {
        **common.LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    aliases={"num_experts": "num_local_experts"},
    ignored=IGNORED,
)

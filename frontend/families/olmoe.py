"""OLMoE: norms over all heads of queries and keys at once; router weights as they are."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, expert_count, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2_moe import weight
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`OlmoeConfig`."""
    del t
    f.only("clip_qkv", None)
    moe = {
        "num_experts": expert_count(f, 64),
        "num_experts_per_tok": f.integer("num_experts_per_tok", 8, least=1),
        "post": "renorm" if f.boolean("norm_topk_prob", False) else "none",
    }
    data = llama_part(f, eps=1e-5)
    biased = f.boolean("attention_bias", False)
    return {**data, "attention_bias": biased, "qk_norm": "full", "moe": moe}


OLMOE = Family(("olmoe",), read, weight, ignored=IGNORED)

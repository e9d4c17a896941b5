"""Qwen3: norms over each head of queries and keys."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part, same
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.qwen2 import upper_layers_slide
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen3Config`."""
    del t
    data = llama_part(f)
    data["head_dim"] = data["head_dim"] or 128
    return {
        **data,
        "attention_bias": f.boolean("attention_bias", False),
        "attention": upper_layers_slide(f, data),
        "qk_norm": "head",
    }


QWEN3 = Family(("qwen3",), read, same, ignored=IGNORED)

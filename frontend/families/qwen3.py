"""Qwen3: norms over each head of queries and keys."""

from __future__ import annotations

from liquidc.frontend.families import qwen2
from liquidc.frontend.families.common import Data, Family, llama_part, same
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen3Config`."""
    del t
    data = llama_part(f)
    return {
        **data,
        "attention_bias": f.boolean("attention_bias"),
        "attention": qwen2.upper_layers_slide(f, data),
        "qk_norm": "head",
    }


DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}
QWEN3 = Family(("qwen3",), read, same, DEFAULTS, ignored=IGNORED)

"""Qwen2: biases of queries, keys and values; upper layers may slide."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part, same, sliding
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields


def upper_layers_slide(f: Fields, data: Data) -> Data:
    """The window of the Qwen families: from layer `max_window_layers` on, if it is used at all."""
    on = f.boolean("use_sliding_window", False)
    return sliding(f, data, on=on, first=f.integer("max_window_layers", 28, least=0))


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen2Config`."""
    del t
    data = llama_part(f)
    attention = {**upper_layers_slide(f, data), "output_bias": False}
    return {**data, "attention_bias": True, "attention": attention}


QWEN2 = Family(("qwen2",), read, same, ignored=IGNORED)

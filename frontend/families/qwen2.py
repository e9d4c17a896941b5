"""Qwen2: biases of queries, keys and values; upper layers may slide."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import (
    Data,
    Family,
    llama_part,
    same,
    sliding,
    sliding_kinds,
)
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields

MANY = 2**31
"""More than any model has layers."""
NO_WINDOW = " without a sliding_window that use_sliding_window turns on"


def upper_layers_slide(f: Fields, data: Data) -> Data:
    """The window of dense Qwens: from layer `max_window_layers` on, if it is used at all."""
    window, first = used_window(f), f.integer("max_window_layers", least=-MANY)
    upper = [] if window is None else range(max(first, 0), data["num_hidden_layers"])
    slides = sliding_kinds(f, data, upper)
    f.refuse_if(bool(slides) and window is None, "layer_types", f"full_attention alone{NO_WINDOW}")
    return sliding(data, window, slides)


def used_window(f: Fields) -> int | None:
    """`sliding_window`, if `use_sliding_window` says so."""
    if f.boolean("use_sliding_window"):
        return f.optional_integer("sliding_window")
    f.skip(("sliding_window",))
    return None


def read(f: Fields, t: Tensors) -> Data:
    """`Qwen2Config`."""
    del t
    data = llama_part(f)
    attention = {**upper_layers_slide(f, data), "output_bias": False}
    return {**data, "attention_bias": True, "attention": attention}


DEFAULTS = {
    **common.LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN2 = Family(("qwen2",), read, same, DEFAULTS, ignored=IGNORED)

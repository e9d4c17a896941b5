"""Llama and Mistral: the tensors have our names."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part, same, sliding, sliding_kinds
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields

IGNORED = (r".*rotary_emb\.inv_freq",)
"""Buffers of old checkpoints."""


def read_llama(f: Fields, t: Tensors) -> Data:
    """`LlamaConfig`."""
    del t
    f.only("mlp_bias", False)
    return {**llama_part(f), "attention_bias": f.boolean("attention_bias")}


def read_mistral(f: Fields, t: Tensors) -> Data:
    """`MistralConfig`, or `MinistralConfig` where there are `layer_types`."""
    del t
    data = llama_part(f)
    window = f.optional_integer("sliding_window")
    slides = sliding_kinds(f, data, [] if window is None else range(data["num_hidden_layers"]))
    f.refuse_if(bool(slides) and window is None, "sliding_window", "given, since layers slide")
    return {**data, "attention": sliding(data, window, slides)}


DEFAULTS = {**common.LLAMA, "attention_bias": False, "mlp_bias": False}
LLAMA = Family(("llama",), read_llama, same, DEFAULTS, ignored=IGNORED)
MISTRAL = Family(
    ("mistral",),
    read_mistral,
    same,
    {
        **common.LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    ignored=IGNORED,
)

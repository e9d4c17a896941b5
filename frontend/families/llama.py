"""Llama and Mistral: the tensors have our names."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part, same, sliding
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields

IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
"""Buffers of old checkpoints, and heads that are stored although they are tied."""


def read_llama(f: Fields, t: Tensors) -> Data:
    """`LlamaConfig`."""
    del t
    f.only("mlp_bias", False)
    return {**llama_part(f), "attention_bias": f.boolean("attention_bias", False)}


def read_mistral(f: Fields, t: Tensors) -> Data:
    """`MistralConfig`: a window over all layers, or none."""
    del t
    data = llama_part(f)
    return {**data, "attention": sliding(f, data)}


LLAMA = Family(("llama",), read_llama, same, ignored=IGNORED)
MISTRAL = Family(("mistral",), read_mistral, same, ignored=IGNORED)

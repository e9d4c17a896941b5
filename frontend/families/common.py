"""What the configs of decoder families have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields
from liquidc.frontend.rope_config import read_rope
from liquidc.ir.weights import WeightExpr

Data = dict[str, Any]
"""A config in the form of `LiquidConfig.from_dict`."""

HARMLESS = tuple(
    """
    _name_or_path architectures auto_map model_type transformers_version use_cache tokenizer_class
    torch_dtype dtype attn_implementation _attn_implementation id2label label2id is_decoder
    is_encoder_decoder add_cross_attention return_dict output_attentions output_hidden_states
    problem_type chunk_size_feed_forward cross_attention_hidden_size output_router_logits
    router_aux_loss_coef router_jitter_noise router_z_loss_coef initializer_range
    embd_pdrop resid_pdrop sep_token_id decoder_start_token_id tf_legacy_loss torchscript
    finetuning_task task_specific_params pruned_heads prefix rope_theta rope_scaling
    rope_parameters default_theta pretraining_tp unsloth_version unsloth_fixed num_experts_per_token
    """.split()
)
"""Keys that change nothing of what is computed at inference, or are read on their own."""


@dataclass(frozen=True)
class Family:
    """How the checkpoints of some model types are read.

    Attributes:
        model_types: of config.json.
        read: the config's fields, and the tensors that there are, as a Liquid config.
        weight: one of our parameters, by name, of the tensors; None: the tensor of the same name.
        custom_code: whether checkpoints come with code of their own, of which nothing is needed.
        prefixes: that may stand before the names of tensors.
        ignored: patterns of tensors that inference does not need.
    """

    model_types: tuple[str, ...]
    read: Callable[[Fields, Tensors], Data]
    weight: Callable[[str, Tensors, Data], WeightExpr | None]
    custom_code: bool = False
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()


def same(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """Every parameter has the name that it has with us."""
    del name, t, data


def llama_part(
    f: Fields, *, theta: float = 10000.0, eps: float = 1e-6, quantised: bool = False
) -> Data:
    """The fields of a Llama; defaults are those of its classes, or given.

    `quantised`: the caller reads `quantization_config`; otherwise there may be none.
    """
    vocab = f.integer("vocab_size", least=1)
    heads = f.integer("num_attention_heads", least=1)
    positions = f.integer("max_position_embeddings", 2048, least=1)
    base, scaling = read_rope(f, positions, theta)
    groups = f.get("num_key_value_heads", None)
    f.only("hidden_act", "silu")
    f.only("partial_rotary_factor", 1.0)
    f.only("attention_dropout", 0.0)
    if not quantised:
        f.only("quantization_config", None)
    data: Data = {
        "model_type": "liquid",
        "vocab_size": vocab,
        "hidden_size": f.integer("hidden_size", least=1),
        "intermediate_size": f.integer("intermediate_size", least=1),
        "num_hidden_layers": f.integer("num_hidden_layers", least=1),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": f.optional_integer("head_dim"),
        "rms_norm_eps": f.number("rms_norm_eps", eps, above=0.0),
        "rope_theta": base,
        "rope_scaling": scaling,
        "max_position_embeddings": positions,
        "tie_word_embeddings": f.boolean("tie_word_embeddings", False),
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        data[name] = _token(f.get(name, None), vocab)
    return data


def _token(given: Any, vocab: int) -> Any:
    """A token id, or a list of them; ids outside the vocabulary (often -1) mean none."""
    if isinstance(given, list):
        return [i for i in given if type(i) is int and 0 <= i < vocab] or None
    return given if type(given) is int and 0 <= given < vocab else None


def sliding(f: Fields, data: Data, *, on: bool = True, first: int = 0) -> Data:
    """`sliding_window` and `layer_types`, as fields of the section `attention`.

    Args:
        f: the config.
        data: what was read of it before.
        on: whether a window that is given is used.
        first: layer from which layers slide where `layer_types` is not given.
    """
    layers = data["num_hidden_layers"]
    kinds = f.optional_list("layer_types", layers, "full_attention", "sliding_attention")
    if not on:
        f.skip(("sliding_window",))
        return {}
    window = f.optional_integer("sliding_window")
    if window is None:
        f.refuse_if("sliding_attention" in (kinds or ()), "sliding_window", "given: layers slide")
        return {}
    slides = tuple(range(first, layers))
    if kinds is not None:
        slides = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not slides or window >= data["max_position_embeddings"]:
        return {}
    everywhere = len(slides) == layers
    return {"sliding_window": window, "sliding_layers": "all" if everywhere else list(slides)}


def expert_count(f: Fields, default: int) -> int:
    """Experts of a layer, by either of their names."""
    name = "num_local_experts" if "num_local_experts" in f else "num_experts"
    f.skip(("num_experts",))
    return f.integer(name, default, least=1)


def moe_layers(f: Fields, layers: int) -> list[int]:
    """The layers with experts of the Qwen families."""
    step = f.integer("decoder_sparse_step", 1, least=0)
    dense = set(f.indices("mlp_only_layers"))
    return [i for i in range(layers) if i not in dense and step and (i + 1) % step == 0]

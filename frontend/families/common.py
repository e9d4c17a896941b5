"""What the configs of decoder families have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    finetuning_task task_specific_params pruned_heads prefix default_theta pretraining_tp
    unsloth_version unsloth_fixed num_experts_per_token attention_dropout
    """.split()
)
"""Keys that change nothing of what is computed at inference, or are read on their own."""

REFUSED: Mapping[str, str] = {
    "attention_multiplier": "0 or below",
    "attn_scale": "below 0",
    "auto_map": "code of its own, which is never run",
    "clip_qkv": "0 or below",
    "head_dim": "odd",
    "hidden_act": "other than silu and swish, but for GPT-OSS, which does not read it",
    "hidden_size": "0",
    "intermediate_size": "0",
    "intermediate_size_mlp": "0",
    "is_causal": "false",
    "layer_types": "sliding_attention without use_sliding_window in Qwen2-MoE",
    "logits_scaling": "0 or below",
    "max_position_embeddings": "0",
    "mlp_bias": "true, in Llama",
    "num_experts_per_tok": "0",
    "num_hidden_layers": "0",
    "partial_rotary_factor": "other than 1, but with the rule default, which does not read it",
    "per_layer_config": "given",
    "quantization_config": "given, but for MXFP4 in GPT-OSS",
    "rms_norm_eps": "0 or below",
    "rope_scaling": "a rule for each kind of layer",
    "rope_scaling.original_max_position_embeddings": "0",
    "rope_scaling.partial_rotary_factor": "as above",
    "rope_scaling.rope_type": "longrope, proportional",
    "shared_expert_intermediate_size": "0",
    "sliding_window": "0 or below",
    "swiglu_alpha": "other than 1.702",
    "swiglu_limit": "other than 7",
    "transformers_weights": "given",
}
"""Values of fields that are refused here though transformers runs them.

What is said of `rope_scaling` holds for `rope_parameters`, and `type` is `rope_type`.
"""


@dataclass(frozen=True)
class Family:
    """How the checkpoints of some model types are read.

    Attributes:
        model_types: of config.json.
        read: the config's fields, and the tensors that there are, as a Liquid config.
        weight: one of our parameters, by name, of the tensors; None: the tensor of the same name.
        defaults: values of fields that config.json leaves out: those of transformers' class.
        aliases: other names of fields, which take precedence over them.
        section: of config.json, that holds the fields of the text model, if there is one.
        custom_code: whether checkpoints come with code of their own, of which nothing is needed.
        prefixes: that may stand before the names of tensors.
        ignored: patterns of tensors that inference does not need.
    """

    model_types: tuple[str, ...]
    read: Callable[[Fields, Tensors], Data]
    weight: Callable[[str, Tensors, Data], WeightExpr | None]
    defaults: Data
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    section: str = ""
    custom_code: bool = False
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()


def same(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """Every parameter has the name that it has with us."""
    del name, t, data


LLAMA: Data = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Defaults of `LlamaConfig`, which most families change."""


def llama_part(
    f: Fields, *, act: bool = True, quantised: bool = False, rule: Data | None = None
) -> Data:
    """The fields that a Llama has too.

    Args:
        f: the config.
        act: whether there is a `hidden_act`.
        quantised: whether the caller reads `quantization_config`; otherwise there may be none.
        rule: the default of `rope_parameters`.
    """
    vocab, hidden = f.integer("vocab_size", least=1), f.integer("hidden_size", least=1)
    heads = f.integer("num_attention_heads", least=1)
    rope = read_rope(f, f.integer("max_position_embeddings", least=1), rule=rule, strict=False)
    if act and f.get("hidden_act") != "swish":
        f.only("hidden_act", "silu")
    if not quantised:
        f.only("quantization_config", None)
    f.only("is_causal", True)
    f.only("per_layer_config", None)
    f.only("transformers_weights", None)
    data: Data = {
        "model_type": "liquid",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": f.integer("intermediate_size", least=1),
        "num_hidden_layers": f.integer("num_hidden_layers", least=1),
        "num_attention_heads": heads,
        "num_key_value_heads": f.optional_integer("num_key_value_heads") or heads,
        "head_dim": f.optional_integer("head_dim") or hidden // heads,
        "rms_norm_eps": f.number("rms_norm_eps", above=0.0),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "max_position_embeddings": rope.positions,
        "tie_word_embeddings": f.boolean("tie_word_embeddings"),
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        data[name] = _token(f.get(name), vocab)
    return data


def _token(given: Any, vocab: int) -> Any:
    """A token id, or a list of them; ids outside the vocabulary (often -1) mean none."""
    if isinstance(given, list):
        return [i for i in given if type(i) is int and 0 <= i < vocab] or None
    return given if type(given) is int and 0 <= given < vocab else None


def sliding_kinds(f: Fields, data: Data, default: Iterable[int]) -> list[int]:
    """The layers that slide, by `layer_types` or, where it is not given, by a rule."""
    kinds = f.optional_choices(
        "layer_types",
        data["num_hidden_layers"],
        "full_attention",
        "sliding_attention",
        "attention",  # of old: full
    )
    if kinds is None:
        return list(default)
    return [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]


def sliding(data: Data, window: int | None, layers: Sequence[int]) -> Data:
    """A window over some layers, as fields of the section `attention`.

    Args:
        data: what was read of the config before.
        window: tokens that a query sees, its own included; None for all.
        layers: those that slide.
    """
    if window is None or not layers or window >= data["max_position_embeddings"]:
        return {}
    everywhere = len(layers) == data["num_hidden_layers"]
    return {"sliding_window": window, "sliding_layers": "all" if everywhere else list(layers)}


def moe_layers(f: Fields, layers: int) -> list[int]:
    """The layers with experts of the Qwen families."""
    experts = f.integer("num_experts", least=0)
    step = f.integer("decoder_sparse_step", least=-layers)
    dense = f.optional_integers("mlp_only_layers") or []
    if not experts or not step:
        return []
    return [i for i in range(layers) if i not in dense and (i + 1) % step == 0]

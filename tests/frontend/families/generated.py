"""Generated configs of every family: keys left out, null, or with any value that is legal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from tests.frontend.families.oracle import Stored

LEFT_OUT: Any = "(left out)"
"""A key that is not there."""
LAYERS = 4

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""What has to be there: the defaults are those of large models."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "mixtral": {**SIZES, **LOCAL},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**SIZES, **EXPERTS},
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SIZES, **LOCAL},
    "granitemoeshared": {**SIZES, **LOCAL},
    "gpt_oss": {**SIZES, **LOCAL, "head_dim": 8},
    "llama4_text": {**SIZES, **LOCAL, "head_dim": 8, "intermediate_size_mlp": 40},
    "llama4": {**SIZES, **LOCAL, "head_dim": 8, "intermediate_size_mlp": 40},
}
"""The smallest config of each model type; `llama4` holds it in its text_config."""

FLAG = (LEFT_OUT, True, False)
HEADS = (2, 2, 1, None)
KINDS = [
    None,
    ["full_attention"] * LAYERS,
    ["sliding_attention"] * LAYERS,
    ["full_attention", "sliding_attention"] * 2,
    ["sliding_attention", "attention", "attention", "sliding_attention"],
]
COMMON: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (LAYERS, LAYERS, 1, 3),
    "num_key_value_heads": (2, 2, 1, 4),
    "head_dim": (LEFT_OUT, LEFT_OUT, 8, 16),
    "max_position_embeddings": (128, 128, 64, 20, LEFT_OUT),
    "rms_norm_eps": (LEFT_OUT, LEFT_OUT, 1e-6, 0.01),
    "tie_word_embeddings": (LEFT_OUT, False, True, True),
    "attention_dropout": (LEFT_OUT, LEFT_OUT, 0.0, 0, 0.1, 1),
    "hidden_act": (LEFT_OUT,) * 30 + ("silu",) * 8 + ("swish", "gelu"),
    "bos_token_id": (LEFT_OUT, None, 1, 96, -1),
    "eos_token_id": (LEFT_OUT, None, 2, [2, 3]),
    "pad_token_id": (LEFT_OUT, None, 0, -1),
    "quantization_config": (LEFT_OUT, LEFT_OUT, LEFT_OUT, None),
    "use_cache": FLAG,
    "pretraining_tp": (LEFT_OUT, LEFT_OUT, 2),
    "layer_types": (LEFT_OUT, LEFT_OUT, LEFT_OUT, None, *KINDS),
    "sliding_window": (LEFT_OUT, LEFT_OUT, None, 5, 16, 39, 4096),
    "torch_dtype": (LEFT_OUT, "bfloat16", None),
    "made_up": (LEFT_OUT, LEFT_OUT, 1, {"a": None}),
}
QWEN = {
    "num_key_value_heads": HEADS,
    "use_sliding_window": (LEFT_OUT, True, True, False),
    "max_window_layers": (LEFT_OUT, 0, 1, 3, -1, 28),
}
QWEN_MOE = {
    "norm_topk_prob": FLAG,
    "decoder_sparse_step": (LEFT_OUT, 1, 2, 3, 5),
    "mlp_only_layers": (LEFT_OUT, None, [], [1], [2, 0], [0, 0, 99]),
    "num_experts": (4, 4, 6, 0),
    "num_experts_per_tok": (2, 1, 4),
    "use_sliding_window": (LEFT_OUT, True, True, False),
}
GRANITE = {
    "num_key_value_heads": (*HEADS, LEFT_OUT),
    "attention_bias": FLAG,
    "embedding_multiplier": (LEFT_OUT, 3.0, 12, 1),
    "residual_multiplier": (LEFT_OUT, 0.4, 1, -0.5),
    "logits_scaling": (LEFT_OUT, 4, 0.5),
    "attention_multiplier": (LEFT_OUT, None, 0.2, 1),
    "num_experts_per_tok": (2, 1, 4),
}
LLAMA4 = {
    "attention_bias": FLAG,
    "num_experts_per_tok": (LEFT_OUT, 1, 2),
    "moe_layers": (LEFT_OUT, None, [], [1, 3], [3, 0, 7]),
    "interleave_moe_layer_step": (LEFT_OUT, 1, 2, 3),
    "no_rope_layers": (LEFT_OUT, None, [], [1, 0, 1, 0], [0] * LAYERS, [1] * LAYERS),
    "no_rope_layer_interval": (LEFT_OUT, 1, 2, 4),
    "attention_chunk_size": (LEFT_OUT, 3, 8, 40),
    "layer_types": (
        LEFT_OUT,
        LEFT_OUT,
        None,
        ["chunked_attention"] * LAYERS,
        ["chunked_attention", "full_attention"] * 2,
    ),
    "use_qk_norm": FLAG,
    "attn_temperature_tuning": FLAG,
    "floor_scale": (LEFT_OUT, 3, 8),
    "attn_scale": (LEFT_OUT, 0.4, 2.0, 0.0),
}
KEYS: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "attention_bias": FLAG,
        "mlp_bias": (LEFT_OUT,) * 20 + (False, True),
        "num_key_value_heads": (*HEADS, LEFT_OUT),
        "head_dim": (LEFT_OUT, None, 8, 16),
    },
    "mistral": {"layer_types": (LEFT_OUT,) * 5 + (None, *KINDS[1:])},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "attention_bias": FLAG, "head_dim": (8, 16)},
    "mixtral": {
        "head_dim": (LEFT_OUT, LEFT_OUT, 8, 16, None),
        "num_local_experts": (4, LEFT_OUT, 2),
        "num_experts_per_tok": (LEFT_OUT, 1, 2),
        "num_experts": (LEFT_OUT, LEFT_OUT, 4, 6),
    },
    "qwen2_moe": {
        **QWEN_MOE,
        **QWEN,
        "qkv_bias": FLAG,
        "layer_types": (LEFT_OUT, None, *KINDS),
    },
    "qwen3_moe": {
        **QWEN_MOE,
        "max_window_layers": QWEN["max_window_layers"],
        "attention_bias": FLAG,
        "num_local_experts": (LEFT_OUT, LEFT_OUT, 5),
    },
    "olmoe": {
        "attention_bias": FLAG,
        "num_key_value_heads": (*HEADS, LEFT_OUT),
        "head_dim": (LEFT_OUT, 8),
        "clip_qkv": (LEFT_OUT, None, 0.5, 1.5, 8.0),
        "norm_topk_prob": FLAG,
        "num_local_experts": (LEFT_OUT, LEFT_OUT, 5),
        "num_experts_per_tok": (2, 1, 4),
    },
    "granitemoe": {**GRANITE, "shared_intermediate_size": (LEFT_OUT, 24)},
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": (LEFT_OUT, 0, 24)},
    "gpt_oss": {
        "attention_bias": FLAG,
        "head_dim": (8, 16),
        "num_experts": (LEFT_OUT, LEFT_OUT, 6),
        "swiglu_limit": (LEFT_OUT,) * 20 + (7.0,) * 8 + (2.0,),
        "swiglu_alpha": (LEFT_OUT,) * 4 + (1.702,),
        "experts_per_token": (LEFT_OUT, 4),
    },
    "llama4_text": LLAMA4,
    "llama4": LLAMA4,
}
"""Values of keys by model type, beside or instead of those of `COMMON`."""

RULES: dict[str, dict[str, tuple[Any, ...]]] = {
    "default": {},
    "linear": {"factor": (2.0, 4, 1.0, 0.5)},
    "dynamic": {"factor": (2.0, 3)},
    "llama3": {
        "factor": (8.0, 2),
        "low_freq_factor": (1.0, 0.5),
        "high_freq_factor": (4.0, 2.0, 8),
        "original_max_position_embeddings": (LEFT_OUT, 16, 32, 64),
    },
    "yarn": {
        "factor": (4.0, 2, 1.0, 0.5, None),
        "original_max_position_embeddings": (LEFT_OUT, 16, 32, 64),
        "attention_factor": (LEFT_OUT, LEFT_OUT, None, 1.3),
        "beta_fast": (LEFT_OUT, None, 8.0, 32, 0),
        "beta_slow": (LEFT_OUT, None, 2.0, 1),
        "mscale": (LEFT_OUT, 0.7, 0.0),
        "mscale_all_dim": (LEFT_OUT, 1.0, None),
        "truncate": (LEFT_OUT, True, False, None),
    },
    "longrope": {
        "short_factor": ([1.0] * 4,),
        "long_factor": ([2.0] * 4,),
        "factor": (2.0,),
        "original_max_position_embeddings": (16,),
    },
}
PLACES = [[], ["rope_scaling"], ["rope_parameters"]] * 6 + [["rope_scaling", "rope_parameters"]]
"""Where the rule is."""
LEFTOVER = {"finetuned": True, "factor": 8.0, "beta_fast": 4.0, "low_freq_factor": 2.0}


def chosen(draw: st.DrawFn, values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """One value of each key, without those that are left out."""
    made = {key: draw(st.sampled_from(some)) for key, some in values.items()}
    return {key: value for key, value in made.items() if value is not LEFT_OUT}


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """The rotary part of a config, as transformers 4 or 5 has it, or a mixture."""
    top = {
        "rope_theta": (LEFT_OUT, LEFT_OUT, 500.0, 10000, 1e6),
        "partial_rotary_factor": (LEFT_OUT,) * 8 + (1, 1.0, None, 0.5),
        "original_max_position_embeddings": (LEFT_OUT,) * 9 + (32,),
    }
    data = chosen(draw, top)
    kinds = ["default", "linear", "llama3", "llama3", "yarn", "yarn", "yarn", "dynamic"]
    for name in draw(st.sampled_from(PLACES)):
        empty = draw(st.sampled_from([False] * 8 + [True]))
        kind = draw(st.sampled_from([*kinds * 3, "longrope"]))
        rule: dict[str, Any] = {} if empty else chosen(draw, RULES[kind])
        for key in draw(st.lists(st.sampled_from(["rope_type", "type"]), min_size=1, max_size=2)):
            rule |= {} if empty else {key: kind}
        left = draw(st.sets(st.sampled_from(sorted(LEFTOVER)), max_size=2))
        rule = {**{key: LEFTOVER[key] for key in sorted(left)}, **rule}
        rule |= chosen(draw, {"rope_theta": (LEFT_OUT, LEFT_OUT, 700.0)})
        rule |= chosen(draw, {"partial_rotary_factor": (LEFT_OUT,) * 9 + (1.0,)})
        data[name] = draw(st.sampled_from([rule] * 8 + [None]))
    return data


@st.composite
def checkpoints(draw: st.DrawFn, kind: str) -> Stored:
    """A checkpoint of a model type."""
    values = {**COMMON, **KEYS[kind]}
    config = {key: value for key, value in BASES[kind].items() if key not in values}
    config |= chosen(draw, values)
    if kind == "qwen2_moe" and not config.get("use_sliding_window") and draw(st.integers(0, 3)):
        config.pop("layer_types", None)  # most of them are refused
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            config[key] = config[key][: config["num_hidden_layers"]]
    config |= draw(ropes())
    if kind == "llama4":
        config = {"text_config": {**config, "model_type": "llama4_text"}}
    layers = "model.layers"
    more = (f"{layers}.0.self_attn.rotary_emb.inv_freq", f"{layers}.9.mlp.gate_proj.weight")
    return Stored(
        {"model_type": kind, **config},
        original=draw(st.booleans()),
        base=draw(st.booleans()) and not kind.startswith("llama4"),
        prefix=draw(st.sampled_from(["", "language_model."])) if kind == "llama4" else "",
        head=draw(st.sampled_from([None, "equal", "other"])),
        more=draw(st.sampled_from([(), more])),
        seed=draw(st.integers(0, 99)),
    )


WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
RICH: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500.0, "rope_scaling": LLAMA3, "attention_bias": True},
    "mistral": {"sliding_window": 5, "rope_theta": 500.0},
    "qwen2": {**WINDOWED, "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen3": {**WINDOWED, "rope_parameters": {**YARN, "attention_factor": 1.2}},
    "mixtral": {"sliding_window": 5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2_moe": {**WINDOWED, "max_window_layers": 3, "mlp_only_layers": [1]},
    "qwen3_moe": {**WINDOWED, "norm_topk_prob": True, "decoder_sparse_step": 2},
    "olmoe": {"clip_qkv": 0.8, "norm_topk_prob": True, "num_attention_heads": 2},
    "granitemoe": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "granitemoeshared": {"shared_intermediate_size": 16, "residual_multiplier": 0.4},
    "gpt_oss": {"sliding_window": 5},
    "llama4_text": {"attention_chunk_size": 5, "floor_scale": 3, "no_rope_layer_interval": 2},
    "llama4": {"attention_chunk_size": 5, "moe_layers": [1, 2], "rope_scaling": LLAMA3},
}
"""Configs in which every kind of field has an effect."""


def other_values(value: Any) -> list[Any]:
    """Values that a field may take instead of this one, legal or not."""
    match value:
        case bool():
            return [not value]
        case int():
            return [0, value + 1, 2 * value]
        case float():
            return [0.0, 2 * value, 1]
        case str():
            return ["other"]
        case list():
            return [[], value[:1]]
        case _:
            return [True, 1, 0.5, [1]]


def changed(config: Mapping[str, Any], key: str, default: Any) -> list[dict[str, Any]]:
    """The config without a key, with null, and with other values of it."""
    left = {k: v for k, v in config.items() if k != key}
    value = config.get(key, default)
    nested = []
    if isinstance(value, dict):
        whole: dict[str, Any] = dict(value)
        nested = [{**left, key: c} for inner in whole for c in changed(whole, inner, None)]
    values = [None] if nested else [None, *other_values(value)]
    return [left, *({**left, key: v} for v in values), *nested]

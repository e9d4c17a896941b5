"""What config.json leaves out, and what released ones hold."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.families import families, read_family
from liquidc.frontend.families.common import HARMLESS
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields
from tests.frontend.families.generated import BASES, RICH

SAME_CLASS = {"llama4": "llama4_text", "ddllama": "llama", "ddqwen3": "qwen3"}
NO_TENSORS = Tensors(Path("model"), {})
ADDED = {"head_dim": None, "rope_theta": None, "layer_types": None}
"""Keys that every family reads, or whose defaults are elsewhere in transformers' classes."""


def read(kind: str, config: dict[str, Any]) -> LiquidConfig:
    """Without any tensors."""
    return read_family(families()[kind], config, NO_TENSORS)


@pytest.mark.parametrize("kind", families())
def test_defaults_are_those_of_the_class(kind: str) -> None:
    theirs = type(AutoConfig.for_model(SAME_CLASS.get(kind, kind)))
    given = {f.name: f.default for f in fields(theirs) if f.default is not MISSING}
    ours = families()[kind].defaults
    assert ours["rope_theta"] == theirs.default_theta
    assert ours == {**ours, **{name: given[name] for name in ours.keys() & given.keys()}}
    assert ours.keys() - given.keys() <= ADDED.keys()
    own = given.keys() - {f.name for f in fields(PreTrainedConfig)} - {"rope_parameters"}
    assert own - ours.keys() <= set(HARMLESS)


@pytest.mark.parametrize("kind", families())
def test_every_default_is_read(kind: str) -> None:
    family, asked = families()[kind], set[str]()

    class Watched(Fields):
        def get(self, name: str, *default: Any) -> Any:
            asked.add(name)
            return super().get(name, *default)

    family.read(Watched("", {}, family.defaults), NO_TENSORS)
    optional = {"interleave_moe_layer_step", "sliding_window", "hidden_act", "max_window_layers"}
    assert family.defaults.keys() - asked <= optional


@pytest.mark.parametrize("kind", BASES)
def test_integers_for_floats(kind: str) -> None:
    """Anywhere, nested or not."""
    config = {**BASES[kind], **RICH[kind], "rms_norm_eps": 1.0, "attention_dropout": 0.0}
    config |= {"swiglu_limit": 7.0, "attn_scale": 1.0, "logits_scaling": 4.0, "clip_qkv": 8.0}
    config |= {"partial_rotary_factor": 1.0}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(inner) for key, inner in value.items()}
        return int(value) if isinstance(value, float) and value == int(value) else value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(kind, whole(config)) == read(kind, config)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 8192}
USUAL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1 8B": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        {"rope_scaling": "llama3(8.0, 1.0, 4.0, 8192.0)", "head_dim": 128},
    ),
    "Mistral 7B v0.1": (
        {
            "model_type": "mistral",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"attention.sliding_window": 4096, "attention.sliding_layers": "all"},
    ),
    "Mixtral 8x7B": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"moe.num_experts": 8, "attention.sliding_window": None},
    ),
    "Qwen2.5 7B": (
        {
            "model_type": "qwen2",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {"max_position_embeddings": 131072, "attention.sliding_window": None},
    ),
    "Qwen1.5-MoE A2.7B": (
        {
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"moe.shared_intermediate_size": 5632, "moe.post": "none", "attention_bias": True},
    ),
    "Qwen3 8B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"qk_norm": "head", "attention.sliding_window": None},
    ),
    "Qwen3 30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"moe.num_experts": 128, "moe.post": "renorm"},
    ),
    "OLMoE 1B-7B": (
        {
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        {"qk_norm": "full", "rms_norm_eps": 1e-5},
    ),
    "Granite 3.0 1B-A400M": (
        {
            "model_type": "granitemoe",
            "attention_bias": False,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "logits_scaling": 6.0,
            "max_position_embeddings": 4096,
            "num_attention_heads": 16,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "output_router_logits": False,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000,
            "router_aux_loss_coef": 0.0,
            "tie_word_embeddings": True,
            "vocab_size": 49155,
        },
        {"attention.scale": 0.015625, "tie_word_embeddings": True},
    ),
    "GPT-OSS 20B": (
        {
            "model_type": "gpt_oss",
            "attention_bias": True,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "quantization_config": {"modules_to_not_convert": [], "quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "vocab_size": 201088,
        },
        {"attention.sliding_layers": list(range(0, 24, 2)), "max_position_embeddings": 131072},
    ),
    "Llama 4 Scout": (
        {
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 8192,
            "attn_scale": 0.1,
            "attn_temperature_tuning": 4,
            "floor_scale": 8192,
            "head_dim": 128,
            "hidden_size": 5120,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760,
            "no_rope_layers": [],
            "num_attention_heads": 40,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0},
            "rope_theta": 500000.0,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "vocab_size": 202048,
        },
        {"attention.chunk_size": 8192, "attention.no_rope_layers": list(range(3, 48, 4))},
    ),
}
"""Fields of published config.json files, and some of what they mean, in our names."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name: str) -> None:
    given, expected = RELEASED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = read(given["model_type"], {**USUAL, **given}).to_dict()
    flat = {**told, **{f"{s}.{k}": v for s in ("attention", "moe") for k, v in told[s].items()}}
    assert {key: flat[key] for key in expected} == expected

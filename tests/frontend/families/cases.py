"""Tiny random checkpoints of every family, written by transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""What all have in common; weights are large enough for every term to matter."""


@dataclass(frozen=True)
class Case:
    """A model: its configuration class, and what differs from `SMALL`."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    original: bool = True

    def model(self, seed: int = 0) -> Any:
        """The transformers model in float32; biases, norms and sinks are random too."""
        import transformers

        config: Any = getattr(transformers, f"{self.kind}Config")(**{**SMALL, **self.changes})
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        names = {"Llama4Text": "Llama4ForCausalLM"}
        model = getattr(transformers, names.get(self.kind, f"{self.kind}ForCausalLM"))(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.1 if parameter.dim() == 1 else 0.3
                parameter.normal_(std=spread)
                if "norm" in name:
                    parameter.add_(1.0)
        return model.eval().float()

    def save(self, model: Any, directory: Path) -> None:
        """As the Hub has it, or with the tensors that transformers 5 holds in memory."""
        model.save_pretrained(directory, save_original_format=self.original, max_shard_size="20KB")


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**MOE, "shared_expert_intermediate_size": 40}
CASES = {
    "llama": Case("Llama"),
    "llama-tied-llama3-bias": Case(
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "llama-linear": Case(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": Case("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-sliding": Case("Mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": Case("Qwen2"),
    "qwen2-sliding-tied": Case(
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-yarn": Case("Qwen2", {"rope_parameters": YARN}),
    "qwen3": Case("Qwen3", {"head_dim": 16}),
    "qwen3-bias": Case("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": Case("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral-stacked-sliding": Case(
        "Mixtral", {"num_local_experts": 4, "sliding_window": 6}, original=False
    ),
    "qwen2-moe": Case("Qwen2Moe", {**SHARED, "norm_topk_prob": False}),
    "qwen2-moe-normed-mixed-stacked": Case(
        "Qwen2Moe",
        {**SHARED, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False},
        original=False,
    ),
    "qwen3-moe": Case("Qwen3Moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-raw-sparse-stacked": Case(
        "Qwen3Moe",
        {**MOE, "head_dim": 8, "norm_topk_prob": False, "decoder_sparse_step": 2},
        original=False,
    ),
    "olmoe": Case("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5}),
    "olmoe-normed-stacked": Case(
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
        original=False,
    ),
    "granite-moe": Case(
        "GraniteMoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "granite-moe-shared-tied": Case(
        "GraniteMoeShared",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        original=False,
    ),
    "gpt-oss": Case(
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "llama4": Case(
        "Llama4Text",
        {
            "num_hidden_layers": 5,
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 5,
            "floor_scale": 3,
            "attn_scale": 0.4,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama4-other-chunks": Case(
        "Llama4Text",
        {
            "num_local_experts": 4,
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["full_attention", "chunked_attention", "chunked_attention"],
        },
    ),
    "llama4-all-sparse": Case(
        "Llama4Text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0, 1],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "intermediate_size_mlp": 40,
        },
    ),
}

"""Names, shapes and random values of the tensors of a small liquid model (model-spec 5.2)."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle.defaults import DEPTH_GATE_DEFAULTS, MOE_DEFAULTS


def draw(
    config: Mapping[str, Any], seed: int, zero: Sequence[str] = ()
) -> dict[str, NDArray[np.float32]]:
    """Random float32 weights; every tensor has its own stream. `zero`: globs of names set to 0.

    The scales keep activations of order one and the gates undecided.
    """
    drawn: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes(config).items():
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale, centre = _scale(name, shape)
        value = (centre + scale * noise.standard_normal(shape)).astype(np.float32)
        still = any(fnmatch.fnmatch(name, pattern) for pattern in zero)
        drawn[name] = np.zeros_like(value) if still else value
    return drawn


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Native tensor names and shapes of a config (spec 5.2)."""
    gate = {**DEPTH_GATE_DEFAULTS, **config.get("depth_gate", {})}
    moe = {**MOE_DEFAULTS, **config.get("moe", {})}
    d, ff, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    hd = config["head_dim"] or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    def swiglu(name: str, width: int) -> None:
        linear(f"{name}.gate_proj", width, d)
        linear(f"{name}.up_proj", width, d)
        linear(f"{name}.down_proj", d, width)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = (d,)
        found[f"{layer}.post_attention_layernorm.weight"] = (d,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{layer}.self_attn.{part}_proj", rows, d, config["attention_bias"])
            if config["qk_norm"] != "none" and part != "v":
                width = hd if config["qk_norm"] == "head" else rows
                found[f"{layer}.self_attn.{part}_norm.weight"] = (width,)
        linear(f"{layer}.self_attn.o_proj", d, q, config["attention_bias"])
        if i in gate["layers"]:
            second = ["depth_gate_ffn"] if gate["scope"] == "attn_ffn" else []
            for name in ("depth_gate", *second):
                outputs, bias = gate["router_num_logits"], gate["router_bias"]
                if gate["router_type"] == "linear":
                    linear(f"{layer}.{name}.proj1", outputs, d, bias)
                    continue
                width = gate["router_hidden_size"] or max(1, d // 16)
                linear(f"{layer}.{name}.proj1", width, d, bias)
                linear(f"{layer}.{name}.proj2", outputs, width, bias)
                if gate["router_norm"]:
                    found[f"{layer}.{name}.norm.weight"] = (width,)
            if gate["skip_path"] == "adapter":
                width = gate["adapter_intermediate_size"] or max(1, ff // 16)
                swiglu(f"{layer}.depth_adapter", width)
        experts = moe["num_experts"]
        if not experts or (moe["layers"] != "all" and i not in moe["layers"]):
            swiglu(f"{layer}.mlp", ff)
            continue
        width = moe["moe_intermediate_size"] or ff
        choices = experts + moe["num_zero_experts"]
        linear(f"{layer}.mlp.gate", choices, d, moe["router_bias"])
        if moe["selection_bias"]:
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = (choices,)
        found[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * width, d)
        found[f"{layer}.mlp.experts.down_proj"] = (experts, d, width)
        if moe["shared_intermediate_size"]:
            swiglu(f"{layer}.mlp.shared_expert", moe["shared_intermediate_size"])
            if moe["shared_gate"] == "sigmoid":
                linear(f"{layer}.mlp.shared_expert_gate", 1, d)
    found["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, d)
    return found


def _scale(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Standard deviation and mean of a random tensor."""
    fan_in = shape[-1] ** -0.5
    if name.endswith("norm.weight"):
        return 0.2, 1.0
    if name.endswith("e_score_correction_bias"):
        return 0.3, -0.4
    if name.endswith("bias"):
        return 0.2, 0.0
    if "depth_gate" in name:
        return 1.5 * fan_in, 0.0
    if "embed_tokens" in name:
        return 1.0, 0.0
    return (2.0 if name.endswith("mlp.gate.weight") else 1.0) * fan_in, 0.0

"""The models that benches compile: random weights of known shapes, and the sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.moe_config import MoeConfig
from liquidc.frontend.router import DepthRouter

SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "tiny-liquid"
SHAPES = ("sample", "dense", "moe")
LAYERS = 8


def wide(
    kind: str, policy: str, *, vocabulary: int = 256, layers: int = LAYERS, gated: bool = True
) -> LiquidConfig:
    """Width 1,024, 16 heads, 4 key/value heads: `dense`, 2,816 hidden; `moe`, top-2 of 16 experts.

    All layers are gated. The head is a weight of its own, as it is in models of this size.
    """
    gate = DepthGateConfig(layers=tuple(range(layers)), kv_policy=policy, router_bias=True)
    config = LiquidConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4608,
        tie_word_embeddings=False,
        depth_gate=gate if gated else DepthGateConfig(),
    )
    if kind == "dense":
        return config
    moe = MoeConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=1408)
    return replace(config, moe=moe)


def random_model(config: LiquidConfig, seed: int = 0) -> LiquidForCausalLM:
    """Random weights, with gates that let about half of random tokens through, each its own half.

    Layer by layer, a gate's bias becomes minus the median of its scores over 512 tokens.
    """
    torch.manual_seed(seed)
    model = LiquidForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (1, 512))
    with torch.no_grad():
        for index, layer in enumerate(config.depth_gate.layers):
            score = model(ids).gate_score[index]
            router = cast(DepthRouter, model.get_submodule(f"model.layers.{layer}.depth_gate"))
            router.last.bias -= score.median()
    return model


def without_gates(model: LiquidForCausalLM) -> LiquidForCausalLM:
    """The same model whose layers all run."""
    static = LiquidForCausalLM(replace(model.config, depth_gate=DepthGateConfig())).eval()
    static.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "depth_gate" not in name}
    )
    return static

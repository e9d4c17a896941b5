"""What four bits save: the file of weights of a dense model of width 1,024, 8 layers."""

from __future__ import annotations

from pathlib import Path

import torch

from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions


def test_four_bits_take_less_than_three_tenths_of_bf16(tmp_path: Path) -> None:
    """4 bits and 32 for the scale of each 64: 0.281; norms, routers, head and table take more."""
    torch.manual_seed(0)
    config = LiquidConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        depth_gate=DepthGateConfig(layers=tuple(range(8)), kv_policy="own"),
    )
    model = LiquidForCausalLM(config).eval()
    compile_model(model, tmp_path / "engine", CompileOptions(quantize="int4{block=64}"))
    bf16 = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "engine" / "weights.bin").stat().st_size <= 0.30 * bf16

"""The files that `make bench` gives to llama.cpp hold the shapes of the liquid model."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from bench.gguf_model import TYPES, tensors, write
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.moe_config import MoeConfig

DENSE = LiquidConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
SPARSE = replace(
    DENSE, moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
def test_as_many_weights_as_the_model(config: LiquidConfig) -> None:
    parameters = LiquidForCausalLM(config).parameters()
    assert sum(map(prod, tensors(config).values())) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
def test_names_shapes_and_types(config: LiquidConfig, type: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", config, type)
    reader = GGUFReader(tmp_path / "model.gguf")
    found = {t.name: t for t in reader.tensors}
    # GGUF counts dimensions from the innermost one.
    shapes = {name: tuple(reversed(t.shape.tolist())) for name, t in found.items()}
    assert shapes == tensors(config)
    for name, tensor in found.items():
        plain = "norm" in name or "gate_inp" in name
        wanted = GGMLQuantizationType.F32 if plain else TYPES[type][0]
        assert tensor.tensor_type == wanted, name
    down = next(t for name, t in found.items() if "ffn_down" in name)
    floats = quants.dequantize(down.data, down.tensor_type)
    assert abs(float(np.std(floats)) - 0.02) < 0.002
    assert reader.fields["general.architecture"].contents() == "llama"
    experts = reader.fields.get("llama.expert_count")
    assert (experts is not None) == bool(config.moe.num_experts)

"""A small model on disk and its null engine, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "liquid",
    "liquid_version": 1,
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "depth_gate": {"layers": [1, 2], "kv_policy": "drop"},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def save_byte_tokenizer(path: Path) -> None:
    """One token for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    order = [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]
    inner = Inner(models.BPE(vocab={character: i for i, character in enumerate(order)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(path))


def save_model(path: Path, config: dict[str, object] | None = None, seed: int = 0) -> Path:
    """A model with random weights and gates that differ from token to token."""
    from liquidc.frontend.config import LiquidConfig
    from liquidc.frontend.model import LiquidForCausalLM

    torch.manual_seed(seed)
    model = LiquidForCausalLM(LiquidConfig.from_dict(config or CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "depth_gate" in name:
                parameter.normal_()
            elif "norm" not in name:
                parameter.mul_(8)
    model.save_directory(path)
    save_byte_tokenizer(path / "tokenizer.json")
    (path / "heldout.txt").write_text("Der Wert ändert sich; 12 + 30 = 42. The end of it.\n" * 12)
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with tokenizer and held-out text; nobody changes it."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def null_engine(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its null engine; nobody changes it."""
    from liquidc.pipeline import CompileOptions, compile_model

    output = tmp_path_factory.mktemp("engines") / "tiny"
    compile_model(model_directory, output, CompileOptions(target="null", verify_each=True))
    assert json.loads((output / "manifest.json").read_bytes())["format"] == "liquidc-engine"
    return output


@pytest.fixture(scope="session")
def profile_file(null_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the small model that was made up."""
    from liquidc.engine import read_manifest
    from tests.liquidc.profiles import made_profile, write_profile

    profile = made_profile(read_manifest(null_engine).model.sha256)
    return write_profile(profile, tmp_path_factory.mktemp("profiles") / "made.json")


@pytest.fixture(scope="session")
def profiled_engine(
    model_directory: Path, profile_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A null engine compiled with that profile, its experts ordered; nobody changes it."""
    from liquidc.pipeline import CompileOptions, compile_model

    output = tmp_path_factory.mktemp("engines") / "profiled"
    options = CompileOptions(target="null", profile=profile_file, add=("order-experts",))
    compile_model(model_directory, output, options)
    return output

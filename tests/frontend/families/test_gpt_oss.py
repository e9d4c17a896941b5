"""GPT-OSS as released: experts in MXFP4."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liquidc.errors import CheckpointError, ConfigError
from liquidc.frontend.families import open_model
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.ir import DType, TensorType
from liquidc.ir.mxfp4 import Mxfp4
from liquidc.ir.weights import Stored, materialize
from tests.frontend.families.cases import CASES
from tests.frontend.families.test_parity import error, tokens

KINDS = ("gate_up_proj", "down_proj")
CASE = replace(CASES["gpt-oss"], changes={**CASES["gpt-oss"].changes, "intermediate_size": 64})
"""Widths are multiples of 32, as blocks have them."""


def codes(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks [..., G, 16] and exponents [..., G] for values of some tenths."""
    numbers = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=numbers, dtype=torch.uint8)
    return blocks, torch.randint(122, 126, shape, generator=numbers, dtype=torch.uint8)


class Source:
    """Two tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


def test_every_code_and_exponent() -> None:
    """Against the definition: sign, two bits of exponent with bias 1, one bit of mantissa."""
    byte = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    power = torch.arange(120, 136, dtype=torch.uint8).reshape(1, 16)
    types = (TensorType(DType.U8, t.shape) for t in (byte, power))
    expr = Mxfp4(*(Stored(n, t) for n, t in zip(("b", "s"), types, strict=True)))
    want: list[float] = []
    for group in range(16):
        for pair in byte[0, group].tolist():
            for code in (pair & 15, pair >> 4):
                sign, exponent, half = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
                value = half * 0.5 if exponent == 0 else (1 + half / 2) * 2.0 ** (exponent - 1)
                want.append(sign * value * 2.0 ** (int(power[0, group]) - 127))
    source = Source(b=byte, s=power)
    got = materialize(expr, source)
    assert got.dtype == torch.bfloat16
    assert got.flatten().tolist() == want
    part = expr.read(source, ((0, 1), (37, 101)))
    assert part.flatten().tolist() == want[37:101]


def quantised(directory: Path) -> torch.Tensor:
    """A checkpoint whose experts are MXFP4; logits of transformers with the same values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CASE.model()
        model.config.save_pretrained(directory)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        for layer in range(3):
            for seed, kind in enumerate(KINDS):
                name = f"model.layers.{layer}.mlp.experts.{kind}"
                count, inputs, outputs = state.pop(name).shape
                blocks, scales = codes((count, outputs, -(-inputs // 32)), 10 * layer + seed)
                state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                types = (TensorType(DType.U8, t.shape) for t in (blocks, scales))
                expr = Mxfp4(*(Stored(n, t) for n, t in zip("bs", types, strict=True)))
                values = materialize(expr, Source(b=blocks, s=scales)).float()
                parameter = model.get_parameter(name)
                with torch.no_grad():
                    parameter.copy_(values[..., :inputs].transpose(1, 2))
        save_file({n: t.contiguous() for n, t in state.items()}, directory / "model.safetensors")
        with torch.no_grad():
            return model(tokens()).logits


def config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_released_form(tmp_path: Path) -> None:
    want = quantised(tmp_path)
    config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    model = LiquidForCausalLM.from_directory(tmp_path).eval()
    with torch.no_grad():
        assert error(model(tokens()).logits, want) < 1e-4


def test_other_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    quantised(tmp_path)
    config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quant_method is 'gptq'"):
        open_model(tmp_path)


def test_exponents_of_another_shape(tmp_path: Path) -> None:
    quantised(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    state[name] = state[name][:, :-1].contiguous()
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"down_proj.*: mxfp4 of blocks"):
        open_model(tmp_path)

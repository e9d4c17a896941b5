"""Element types: an engine computes what `model.float()` computes, and keeps named roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import liquidc
from liquidc.frontend.trace import trace
from liquidc.inputs import ModuleInput
from liquidc.ir.interpreter import Interpreter
from tests.frontend.test_modules import CLOSE, IDS, assert_equal, make, wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.head(self.block(x))

    model = make(forward).to(dtype)
    engine = liquidc.compile(model, tmp_path / "engine")
    got, want = engine.logits(IDS[0, :9].tolist()), wanted(model, IDS[:1, :9])[0].numpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max())


def test_a_16_bit_type_by_name_in_a_16_bit_module() -> None:
    """PyTorch computes in 16 bits throughout, the engine rounds where the code says so."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(ids).float().to(torch.bfloat16)))

    model = make(forward).bfloat16()
    run = Interpreter(trace(model), ModuleInput(model).weights)
    got = run.run("prefill", {"input_ids": IDS})["logits"]
    with torch.no_grad():
        want = model(IDS).float()
    assert (got - want).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_rounding_that_the_code_asks_for_is_kept(
    dtype: torch.dtype, target: str, tmp_path: Path
) -> None:
    """To the last bit, as PyTorch does: of states, of each product and sum, of logits."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.embedding(ids).to(dtype)
        return (x * 1.1 + x * x).float().repeat(1, 1, 3).to(dtype)

    model = make(forward)
    engine = liquidc.compile(model, tmp_path / "engine", target=target)
    got, want = engine.logits(IDS[0, :9].tolist()), wanted(model, IDS[:1, :9])[0].numpy()
    np.testing.assert_array_equal(got, want)


def test_the_smallest_float64_stays_finite() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float64).min
        masked = self.embedding(ids).double().masked_fill(ids.unsqueeze(-1) > 20, lowest)
        return self.head(masked.softmax(-1).float())

    assert_equal(make(forward), 9)

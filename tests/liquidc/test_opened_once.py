"""A compile opens its checkpoint once."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from liquidc.errors import LiquidWarning
from liquidc.frontend import checkpoint
from liquidc.frontend.checkpoint import CheckpointSource
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.pipeline import CompileOptions, compile_model
from tests.liquidc.conftest import save_model


def test_headers_models_and_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / checkpoint.SINGLE)
    save_file(
        {**tensors, "nobody.uses.this": tensors["model.norm.weight"].clone()},
        model / checkpoint.SINGLE,
    )
    counts: Counter[str] = Counter()

    def counted(kind: type, name: str) -> None:
        original = kind.__init__

        def init(self: object, *args: object, **kwargs: object) -> None:
            counts[name] += 1
            original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", init)

    counted(CheckpointSource, "headers")
    counted(LiquidForCausalLM, "models")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compile_model(model, tmp_path / "engine", CompileOptions(target="null"))
    assert counts == {"headers": 1, "models": 1}
    unused = [str(w.message) for w in said if issubclass(w.category, LiquidWarning)]
    assert len([line for line in unused if "nobody.uses.this" in line]) == 1

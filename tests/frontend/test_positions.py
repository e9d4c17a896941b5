"""The context of a module of one's own: named, read off its tables, or not limited at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquidc
from liquidc.errors import ConfigError, InputError
from liquidc.frontend import protocol
from liquidc.inputs import ModuleInput

ROWS, WIDTH = 12, 16


class Layer(nn.Module):
    """Attention over one head, without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, step: Any, cache: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, WIDTH)).unbind(2)
        cache, limit = protocol.append(cache, k, v, step.valid)
        a = protocol.attend(q, cache.key, cache.value, limit, scale=WIDTH**-0.5)
        return x + a.flatten(-2), cache


class Learned(nn.Module):
    """Learned positions; `place` gives the row of each."""

    place = staticmethod(lambda positions: positions)

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.table = nn.Embedding(61, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList([Layer()])
        if config is not None:
            self.config = config

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.table(self.place(positions))

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tokens.weight)

    def new_cache(self, batch: int, capacity: int) -> Any:
        empty = self.tokens.weight.new_zeros(batch, 1, capacity, WIDTH)
        length = torch.zeros(batch, dtype=torch.int64)
        return SimpleNamespace(layers=[protocol.LayerCache(empty, empty, length)])


class Shifted(Learned):
    place = staticmethod(lambda positions: positions + 2)


class Clamped(Learned):
    place = staticmethod(lambda positions: positions.clamp(max=ROWS - 1))


class Wrapped(Learned):
    place = staticmethod(lambda positions: positions - positions.div(ROWS).floor().long() * ROWS)


class Plain(nn.Module):
    """No cache: positions counted by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(61, WIDTH), nn.Embedding(ROWS, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.table(torch.arange(input_ids.shape[1]))
        return F.linear(x, self.tokens.weight)


class Relative(nn.Module):
    """A table that is read by the distance of two tokens."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(61, WIDTH), nn.Embedding(ROWS, 1)
        if config is not None:
            self.config = config

    def forward(self, input_ids: Tensor) -> Tensor:
        x, at = self.tokens(input_ids), torch.arange(input_ids.shape[1])
        distance = at.unsqueeze(1) - at.unsqueeze(0) + ROWS // 2
        return F.linear(self.table(distance).squeeze(-1) @ x, self.tokens.weight)


def named(context: int) -> Any:
    return SimpleNamespace(to_dict=lambda: {"max_position_embeddings": context})


def context(module: nn.Module) -> object:
    return ModuleInput(module).trace().attributes.get("max_positions")


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (Learned(), ROWS),
        (Shifted(), ROWS - 2),
        (Clamped(), ROWS),
        (Plain(), ROWS),
        (Learned(named(7)), 7),
        (Clamped(named(99)), 99),
        (Wrapped(named(99)), 99),
        (Relative(named(6)), 6),
    ],
)
def test_the_context(module: nn.Module, wanted: int) -> None:
    assert context(module) == wanted


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Learned(named(13)), "a table of 12 rows is read by position.*must be at most 12"),
        (Shifted(named(11)), "max_position_embeddings is 11; it must be at most 10"),
        (Relative(), "name the context as max_position_embeddings of the module's config"),
        (Wrapped(), "name the context as max_position_embeddings of the module's config"),
    ],
)
def test_what_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        context(module)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_padding_reads_no_row_that_is_not_there(target: str, tmp_path: Path) -> None:
    """A table that is not clamped, beside a row that is full; beyond it is a message."""
    with liquidc.compile(Learned(), tmp_path / "e", target=target) as engine:
        ids = list(range(ROWS))
        whole = engine.logits(ids)
        session = engine.session(batch=2)
        session.prefill([ids[:-1], ids[:2]])
        found = session.prefill([[], ids[2:9]], every=True).logits[1]
        np.testing.assert_allclose(found, whole[2:9], rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match=f"at most the context of the model, {ROWS}"):
            engine.logits([*ids, 1])

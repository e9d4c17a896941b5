"""What can't be compiled is refused in one line that names the operator and the user's line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liquidc
from liquidc.errors import InputError, UnsupportedError
from liquidc.frontend import protocol
from liquidc.frontend.protocol import LayerCache, Step
from liquidc.frontend.trace import trace
from tests.frontend.other_model import Expert, OtherModel, ParallelLayer


class Plain(nn.Module):
    """A module without the protocol, which uses the inverse of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        return self.table(ids) @ torch.linalg.inv(self.mix.weight)


class Embeds(OtherModel):
    """The embedding can't be compiled."""

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Refused."""
        return torch.erfinv(super().embed(input_ids, positions))


class Branches(OtherModel):
    """The head looks at its data."""

    def head(self, x: Tensor) -> Tensor:
        """Refused."""
        if x.sum() > 0:
            x = -x
        return super().head(x)


@protocol.expert
def refused_expert(x: Tensor, *params: Tensor) -> Tensor:
    """Refused."""
    return torch.erfinv(x)


class Experts(ParallelLayer):
    """The experts can't be compiled."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """Refused."""
        index, weight = protocol.route(self.router(x), step.valid, 2)
        params = [e.weights() for e in self.experts if isinstance(e, Expert)]
        return protocol.dispatch(x, index, weight, refused_expert, params), cache


class Arm(ParallelLayer):
    """The arm of a gate can't be compiled."""

    def compute(self, n: Tensor) -> Tensor:
        """Refused."""
        return n

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """As the layers of the protocol, with `compute` in the arm."""
        mask, _ = step.depth_gate(self.gate(x).squeeze(-1))

        def run(x: Tensor, mask: Tensor) -> tuple[Tensor]:
            return (x + protocol.keep(mask, self.compute(self.norm(x))),)

        def skip(x: Tensor, mask: Tensor) -> tuple[Tensor]:
            return (x.clone(),)

        return protocol.gated(mask, run, skip, x, mask)[0], cache


class ArmOperator(Arm):
    """The arm's method uses an operator without translation."""

    def compute(self, n: Tensor) -> Tensor:
        """Refused."""
        return n + torch.erfinv(n)


class ArmBranches(Arm):
    """The arm looks at its data."""

    def compute(self, n: Tensor) -> Tensor:
        """Refused."""
        if n.sum() > 0:
            n = -n
        return n


def with_layer(layer: type[ParallelLayer]) -> Callable[[], OtherModel]:
    """A model of one layer, made when it is called."""

    def make() -> OtherModel:
        model = OtherModel()
        model.layers = nn.ModuleList([layer()])
        return model

    make.__name__ = layer.__name__
    return make


ERFINV = "the operator aten.erfinv.default has no translation"
CASES: list[tuple[Callable[[], nn.Module], str, str]] = [
    (
        Plain,
        "the operator aten.linalg_inv.default has no translation",
        "return self.table(ids) @ torch.linalg.inv(self.mix.weight)",
    ),
    (Embeds, ERFINV, "return torch.erfinv(super().embed(input_ids, positions))"),
    (with_layer(Experts), ERFINV, "return torch.erfinv(x)"),
    (with_layer(ArmOperator), ERFINV, "return n + torch.erfinv(n)"),
    (with_layer(ArmBranches), "torch.export can't trace", "if n.sum() > 0:"),
    (Branches, "torch.export can't trace", "if x.sum() > 0:"),
]


@pytest.mark.parametrize(
    ("make", "reason", "code"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_the_error_names_the_operator_and_the_line(
    make: Callable[[], nn.Module], reason: str, code: str
) -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.strip() == code)
    with pytest.raises(UnsupportedError) as caught:
        trace(make())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(reason)
    assert f"tests/frontend/test_unsupported.py:{number}: `{code}`" in message


def test_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="linalg_inv"):
        liquidc.compile(Plain(), tmp_path / "engine", target="null")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_body_without_its_mark() -> None:
    x, index = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    unmarked: Any = torch.nn.functional.linear
    with pytest.raises(InputError, match=r"is no expert body: decorate it with @protocol\.expert"):
        protocol.dispatch(x, index, torch.ones(2, 1), unmarked, [torch.ones(1, 4, 4)])

"""Modules that no engine can stand for are refused in one line: what, where, what to do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquidc
from liquidc.errors import CheckpointError, InputError, UnsupportedError
from liquidc.frontend.trace import trace
from liquidc.inputs import ModuleInput

WIDTH, VOCABULARY = 8, 12
TABLE = torch.randn(VOCABULARY, 500)


class Base(nn.Module):
    """What the cases share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("count", torch.zeros(()))
        self.plain, self.calls, self.seen = torch.zeros(WIDTH), 0, dict[str, int]()

    total = 0


def model(forward: Callable[..., Any]) -> Any:
    """A module with that forward."""
    return type("Model", (Base,), {"forward": forward})()


def size_one(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    if ids.shape[1] == 1:
        x = x * 2
    return self.head(x)


def size_above_one(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(x + 1 if ids.size(1) > 1 else x)


def one_row(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(x * 2 if ids.size(0) == 1 else x)


def size_above(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    if ids.shape[1] > 4:
        x = x * 2
    return self.head(x)


def even_size(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(x if ids.shape[1] % 2 else x * 2)


def size_of_the_limit(self: Any, ids: Tensor) -> Tensor:
    tokens = ids.shape[1]
    x = self.embedding(ids) + TABLE.view(-1)[:tokens].view(1, -1, 1)
    return self.head(x * 2 if tokens == TABLE.numel() else x)


def few_rows(self: Any, ids: Tensor) -> Tensor:
    assert ids.shape[0] <= 8
    return self.head(self.embedding(ids))


def loop_over_tokens(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(torch.stack([x[:, t] for t in range(ids.shape[1])], 1))


def unbound_tokens(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(torch.stack(x.unbind(1), 1))


def root_of_a_size(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids) / math.sqrt(ids.shape[1]))


def shifted_tokens(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    return self.head(torch.cat([x[:, :1], x[:, :-1]], 1))


def squeezed(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids)).squeeze()


def branch_on_data(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids)
    if (ids == 0).any():
        x = x * 2
    return self.head(x)


def item(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids) * self.head.bias.sum().item())


def random_numbers(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids) + torch.rand(WIDTH))


def dropout_always(self: Any, ids: Tensor) -> Tensor:
    return self.head(F.dropout(self.embedding(ids), 0.5))


def counts_in_a_buffer(self: Any, ids: Tensor) -> Tensor:
    self.count += 1
    return self.head(self.embedding(ids) * self.count)


def assigns_a_buffer(self: Any, ids: Tensor) -> Tensor:
    self.count = self.count + 1
    return self.head(self.embedding(ids) * self.count)


def assigns_a_tensor(self: Any, ids: Tensor) -> Tensor:
    self.plain = self.plain + 1
    return self.head(self.embedding(ids) * self.plain)


def counts_in_python(self: Any, ids: Tensor) -> Tensor:
    self.calls += 1
    return self.head(self.embedding(ids) * self.calls)


def counts_in_the_class(self: Any, ids: Tensor) -> Tensor:
    self.total += 1
    return self.head(self.embedding(ids) * self.total)


def counts_in_a_dict(self: Any, ids: Tensor) -> Tensor:
    self.seen["calls"] = self.seen.get("calls", 0) + 1
    return self.head(self.embedding(ids) * self.seen["calls"])


def changes_a_parameter(self: Any, ids: Tensor) -> Tensor:
    self.head.bias.add_(1)
    return self.head(self.embedding(ids))


def large_constant(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids) + TABLE[ids].sum(-1, keepdim=True))


def largest_index(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids.new_zeros(1) + self.embedding(ids).argmax(-1)))


def scattered(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids).scatter_(2, ids[..., None] % WIDTH, 1.0))


def assigned_by_index(self: Any, ids: Tensor) -> Tensor:
    x = self.embedding(ids).clone()
    x[:, :, torch.tensor([1, 3])] = 0
    return self.head(x)


def short_integers(self: Any, ids: Tensor) -> Tensor:
    return self.head(self.embedding(ids.to(torch.int16).long()))


def complex_numbers(self: Any, ids: Tensor) -> Tensor:
    x = torch.view_as_complex(self.embedding(ids).unflatten(-1, (-1, 2)))
    return self.head(torch.view_as_real(x * 1j).flatten(-2))


STATE = "keeps no state from call to call"
CASES: list[tuple[Callable[..., Tensor], str, str]] = [
    (size_one, "right only for T ≠ 1", "if ids.shape[1] == 1:"),
    (size_above_one, "right only for T > 1", "return self.head(x + 1 if ids.size(1) > 1 else x)"),
    (one_row, "right only for B ≠ 1", "return self.head(x * 2 if ids.size(0) == 1 else x)"),
    (size_above, "right only for T > 4", "if ids.shape[1] > 4:"),
    (
        even_size,
        "right only for Mod(T, 2) ≠ 0",
        "return self.head(x if ids.shape[1] % 2 else x * 2)",
    ),
    (
        size_of_the_limit,
        f"right only for T ≠ {TABLE.numel()}",
        "return self.head(x * 2 if tokens == TABLE.numel() else x)",
    ),
    (few_rows, "right only for B <= 8", "assert ids.shape[0] <= 8"),
    (
        loop_over_tokens,
        "right only for T = 5",
        "return self.head(torch.stack([x[:, t] for t in range(ids.shape[1])], 1))",
    ),
    (unbound_tokens, "right only for T = 5", "return self.head(torch.stack(x.unbind(1), 1))"),
    (
        root_of_a_size,
        "right only for T = 5",
        "return self.head(self.embedding(ids) / math.sqrt(ids.shape[1]))",
    ),
    (shifted_tokens, "T - 1", "return self.head(torch.cat([x[:, :1], x[:, :-1]], 1))"),
    (squeezed, "unknown size is squeezed", "return self.head(self.embedding(ids)).squeeze()"),
    (branch_on_data, "Python needs the value of a tensor", "if (ids == 0).any():"),
    (
        item,
        "Python needs the value of a tensor",
        "return self.head(self.embedding(ids) * self.head.bias.sum().item())",
    ),
    (
        random_numbers,
        "aten.rand.default gives random numbers",
        "return self.head(self.embedding(ids) + torch.rand(WIDTH))",
    ),
    (
        dropout_always,
        "pass training=self.training",
        "return self.head(F.dropout(self.embedding(ids), 0.5))",
    ),
    (counts_in_a_buffer, STATE, "self.count += 1"),
    (assigns_a_buffer, STATE, "self.count = self.count + 1"),
    (assigns_a_tensor, STATE, "self.plain = self.plain + 1"),
    (counts_in_python, STATE, "self.calls += 1"),
    (counts_in_the_class, STATE, "self.total += 1"),
    (counts_in_a_dict, STATE, 'self.seen["calls"] = self.seen.get("calls", 0) + 1'),
    (changes_a_parameter, STATE, "self.head.bias.add_(1)"),
    (
        large_constant,
        "neither a parameter nor a buffer: register it",
        "return self.head(self.embedding(ids) + TABLE[ids].sum(-1, keepdim=True))",
    ),
    (
        largest_index,
        "aten.argmax.default has no translation",
        "return self.head(self.embedding(ids.new_zeros(1) + self.embedding(ids).argmax(-1)))",
    ),
    (
        scattered,
        "aten.scatter_.value has no translation",
        "return self.head(self.embedding(ids).scatter_(2, ids[..., None] % WIDTH, 1.0))",
    ),
    (
        assigned_by_index,
        "only one value where a mask holds can be assigned",
        "x[:, :, torch.tensor([1, 3])] = 0",
    ),
    (
        short_integers,
        "tensors of torch.int16 are not supported",
        "return self.head(self.embedding(ids.to(torch.int16).long()))",
    ),
    (
        complex_numbers,
        "aten.view_as_complex.default has no translation",
        "x = torch.view_as_complex(self.embedding(ids).unflatten(-1, (-1, 2)))",
    ),
]


@pytest.mark.parametrize(
    ("forward", "reason", "code"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_the_error_names_the_line(
    forward: Callable[..., Tensor], reason: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.strip() == code)
    # torch.export keeps the lines of functions that are named forward.
    named = forward.__code__.replace(co_name="forward")
    monkeypatch.setattr(forward, "__code__", named)
    with pytest.raises(UnsupportedError) as caught:
        trace(model(forward))
    message = str(caught.value)
    assert reason in message
    assert f"tests/frontend/test_refused_modules.py:{number}: `{code}`" in message
    assert "\n" not in message


FORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "no batch": (lambda self, ids: self.head(self.embedding(ids))[0], "gives f32[T, 12]"),
    "last token": (lambda self, ids: self.head(self.embedding(ids))[:, -1], "gives f32[B, 12]"),
    "flat": (lambda self, ids: self.head(self.embedding(ids)).flatten(0, 1), "gives f32[B*T, 12]"),
    "turned": (lambda self, ids: self.head(self.embedding(ids.t())), "gives f32[T, B, 12]"),
    "integers": (lambda self, ids: ids.unsqueeze(-1).repeat(1, 1, 3), "gives i64[B, T, 3]"),
    "nothing": (lambda self, ids: None, "returns nothing; liquidc needs a tensor, the logits"),
    "a dict": (lambda self, ids: {"a": ids, "b": ids}, "returns a dict of a, b"),
    "an empty tuple": (lambda self, ids: (), "returns a tuple; liquidc needs a tensor"),
    "two arguments": (lambda self, ids, mask: ids, "can't be called with input_ids alone"),
    "no argument": (lambda self: self.head.weight, "can't be called with input_ids alone"),
    "by name only": (lambda self, *, ids: ids, "can't be called with input_ids alone"),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_arguments_and_results(name: str) -> None:
    forward, reason = FORMS[name]
    with pytest.raises(UnsupportedError) as caught:
        trace(model(forward))
    assert reason in str(caught.value)
    assert str(caught.value).startswith("Model.forward")


def uninitialised() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.LazyLinear(3))


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3, device="meta"))


def with_buffer(buffer: Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.register_buffer("kept", buffer)
        return nn.Sequential(nn.Embedding(3, 4), layer)

    return build


def not_finite() -> nn.Module:
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.bias, math.inf)
    return nn.Sequential(nn.Embedding(3, 4), layer)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (uninitialised, "1.weight is of type UninitializedParameter"),
        (on_meta, "1.weight is on the meta device and has no values"),
        (with_buffer(torch.tensor([math.nan])), "the buffer 1.kept holds NaN"),
        (with_buffer(torch.eye(2).to_sparse()), "1.kept is a sparse or quantized tensor"),
        (not_finite, "the weight 1.bias holds NaN or infinity"),
    ],
)
def test_tensors_without_values(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ModuleInput(build()).check()


def test_infinity_is_a_buffers_right() -> None:
    ModuleInput(with_buffer(torch.tensor([-math.inf, 1]))()).check()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_things_than_modules(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="give the Python module"):
        ModuleInput(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))  # pyright: ignore
    given: Any = torch.relu
    with pytest.raises(InputError, match=r"a model is a directory or a torch\.nn\.Module"):
        liquidc.compile(given, tmp_path / "engine")
    locked = nn.Sequential(nn.Embedding(3, 4))
    locked.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedError, match="Sequential can't be copied to be traced"):
        trace(locked)


def test_a_count_in_the_class_under_the_name_of_a_submodule() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        self.norm += 1
        return self.head(self.embedding(ids) * self.norm)

    counting: Any = type("Counting", (Base,), {"forward": forward, "norm": 0})()
    counting._modules["norm"] = nn.LayerNorm(WIDTH)
    with pytest.raises(UnsupportedError, match=f"forward changes the attribute norm: .*{STATE}"):
        trace(counting)

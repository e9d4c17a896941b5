"""Modules of all kinds compute in the IR, and in an engine, what they compute in PyTorch."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquidc
from liquidc.errors import InputError
from liquidc.frontend.parts import one_tensor
from liquidc.frontend.trace import trace
from liquidc.inputs import ModuleInput
from liquidc.ir import print_module
from liquidc.ir.interpreter import Interpreter

VOCABULARY, WIDTH, CONTEXT = 48, 16, 32
IDS = torch.tensor(np.random.default_rng(3).integers(0, VOCABULARY, (2, CONTEXT)))
CLOSE = 1e-5
"""Bound on float32 logits, relative to the largest: some ten roundings of 6e-8 and sums of 32."""

Named = namedtuple("Named", "loss logits")
TABLE = torch.linspace(-1, 1, WIDTH)


@dataclass
class Output:
    """Logits among other things."""

    logits: Tensor
    loss: Tensor | None = None


class Block(nn.Module):
    """A feed-forward part with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """States [B, T, D]."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Base(nn.Module):
    """An embedding, and a head that does not hide a shift or a scale of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()
        self.head = nn.Linear(WIDTH, VOCABULARY)


def make(forward: Callable[..., Any], prepare: Callable[[Any], object] | None = None) -> nn.Module:
    """A module with that forward, in evaluation mode."""
    torch.manual_seed(0)
    model = type("Model", (Base,), {"forward": forward})()
    if prepare is not None:
        prepare(model)
    return model.eval()


def states(update: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A forward that changes states by a function."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(update(self.block(self.embedding(ids))))

    return forward


def plain(self: Any, ids: Tensor) -> Tensor:
    """Logits."""
    return self.head(self.block(self.embedding(ids)))


def wanted(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of `model.float()`."""
    with torch.no_grad():
        return one_tensor(copy.deepcopy(model).float()(ids.clone()), "logits", "").float()


def assert_equal(model: nn.Module, *lengths: int) -> None:
    """The IR computes what the module does, for each number of tokens."""
    module = trace(model)
    run = Interpreter(module, ModuleInput(model).weights)
    for length in lengths or (1, 2, 7):
        ids = IDS[:, :length]
        got = run.run("prefill", {"input_ids": ids})["logits"]
        want = wanted(model, ids)
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= CLOSE * want.abs().max()


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "list": lambda y: [y, y.sum()],
    "nested": lambda y: ((y, y.sum()), [y]),
    "loss first": lambda y: (None, y),
    "dict": lambda y: {"loss": y.sum(), "logits": y},
    "one in a dict": lambda y: {"scores": y},
    "namedtuple": lambda y: Named(y.sum(), y),
    "dataclass": lambda y: Output(y),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_found_in_the_result(kind: str) -> None:
    assert_equal(make(lambda self, ids: OUTPUTS[kind](self.head(self.embedding(ids)))), 3)


def test_arguments_that_have_defaults() -> None:
    def forward(self: Any, tokens: Tensor, *more: Any, scale: float = 2.0, **rest: Any) -> Tensor:
        return self.head(self.embedding(tokens) * scale)

    assert_equal(make(forward), 3)


def add(x: Tensor) -> Tensor:
    x += 1
    x.mul_(2).sub_(x.mean(-1, keepdim=True))
    return x


def assign(x: Tensor) -> Tensor:
    x[..., :4] = 0
    x[:, 0] = 3
    x[:, -1] += 2
    x[:, :1, 5] = x[:, :1, 6]
    return x


def assign_views(x: Tensor) -> Tensor:
    x = x.clone()
    x.transpose(1, 2)[:, 3] = 1
    x.view(*x.shape[:2], 4, 4)[:, :, 1].zero_()
    x.view(-1, 2, 8)[:, 1].zero_()
    x[:, 0].mul_(2)
    return x


def assign_where(x: Tensor) -> Tensor:
    x.masked_fill_(x > 1, 0.5)
    x[x < -1] = -1
    x.copy_(torch.where(x > 0, x, x * 0.1))
    return F.relu(x, inplace=True) + F.dropout(x, 0.5, False, inplace=True)


def out_argument(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    return y


def in_an_arm(x: Tensor) -> Tensor:
    def run(x: Tensor) -> Tensor:
        y = x.clone()
        y += 1
        y[..., 0] = 3
        return y

    return torch.cond(x.sum() > 0, run, lambda x: x - 1, (x,))


def sizes(x: Tensor) -> Tensor:
    tokens = x.shape[1]
    shift = torch.arange(1, tokens + 1).view(1, -1, 1)
    return x.cumsum(1) / shift * tokens + 1 / tokens + (tokens + 1) * 0.5


def masks(x: Tensor) -> Tensor:
    tokens = x.shape[1]
    above = torch.full((tokens, tokens), float("-inf")).triu(1)
    below = torch.ones(tokens, tokens).tril(-1) == 1
    scores = torch.einsum("btd,bsd->bts", x, x) + above
    place = torch.arange(tokens)
    scores = scores - 0.1 * (place[:, None] - place).abs() + below.float()
    return scores.softmax(-1) @ x


def rotate(x: Tensor) -> Tensor:
    rates = 10000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    angle = torch.outer(torch.arange(x.shape[1]).float(), rates)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def grouped(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, 4)).transpose(1, 2)
    kv = q[:, :2]
    y = F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)
    wide = kv.repeat_interleave(2, 1) + kv.repeat(1, 2, 1, 1)
    return (y + wide).transpose(1, 2).flatten(2)


def maths(x: Tensor) -> Tensor:
    y = F.softplus(x) + F.mish(x) + F.elu(x) + F.leaky_relu(x) + F.hardswish(x) + F.selu(x)
    y = y + x.log_softmax(-1) + x.abs() + x**3 + x.square() + (x * x + 1) ** -0.5 + 2**x
    y = y + x.sign() + x.std(-1, keepdim=True) + F.normalize(x, dim=-1) + x.norm(dim=-1)[..., None]
    return y + x.max(-1, keepdim=True)[0] + x.amin(-1, keepdim=True) + (x @ x[0, 0])[..., None]


def parts(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    joined = torch.stack([a, b, a]).sum(0).expand_as(a)
    return F.glu(torch.cat([joined, b, x], -1)) @ torch.eye(WIDTH) + x[..., [1] * WIDTH]


UPDATES = (
    *(add, assign, assign_views, assign_where, out_argument, in_an_arm),
    *(sizes, masks, rotate, grouped, maths, parts),
)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_what_states_go_through(update: Callable[[Tensor], Tensor]) -> None:
    assert_equal(make(states(update)))


def test_ids_are_computed_with() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        ids = ids.clamp_(max=40)
        x = self.embedding((ids * 7 + 3) % VOCABULARY) + self.embedding(ids.int() // 2)
        hot = F.one_hot(ids, VOCABULARY).float() @ self.embedding.weight
        seen = (ids > 5) & ~(ids == 7) | (ids < 2)
        return self.head((x + hot + self.embedding.weight[ids]) * seen.unsqueeze(-1))

    assert_equal(make(forward))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Its result."""
        return self.function(x)


def containers() -> nn.Module:
    """Sequential, lists and dicts of modules and parameters, functions as modules."""
    model = make(
        lambda self, ids: self.last(
            self.named["x"](self.first(ids) * self.listed[0] + self.listed[1]) * self.scales["k"]
        )
    )
    doubled: Any = partial(torch.add, other=1.0)
    model.first = nn.Sequential(model.embedding, Lambda(lambda x: x * 2), Lambda(doubled))
    model.listed = nn.ParameterList([torch.randn(WIDTH) for _ in range(2)])
    model.named, model.last = nn.ModuleDict({"x": model.block}), nn.Sequential(model.head)
    model.scales = nn.ParameterDict({"k": torch.randn(WIDTH)})
    return model


def shared() -> nn.Module:
    """A block under two names, a tied head, a parametrized weight, a hook."""
    model = make(lambda self, ids: self.head(self.again(self.block(self.embedding(ids)))))
    model.again = model.block
    model.head.weight = model.embedding.weight
    nn.utils.parametrizations.weight_norm(model.block.up)
    model.block.register_forward_hook(lambda module, given, y: y * 2)
    return model


def tensors() -> nn.Module:
    """Tensors that are no parameters: buffers, attributes, in lists, of the file."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.table[ids].float() + self.hidden * self.listed[0] + TABLE
        return self.head(x * self.scale + self.codes[0].float() * self.frozen)

    model = make(forward)
    model.register_buffer("hidden", torch.randn(WIDTH), persistent=False)
    model.register_buffer("codes", torch.randint(-9, 9, (1, WIDTH), dtype=torch.int8))
    model.table, model.listed = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64), [TABLE * 3]
    model.scale = nn.Parameter(torch.tensor(1.5))
    model.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    return model


def wrapped(wrapper: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    return lambda: wrapper(make(plain))


def contexts() -> nn.Module:
    """Gradients switched off and on, autocast switched off, a checkpoint of activations."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = self.embedding(ids)
        with torch.enable_grad():
            x = self.block(x)
        again: Any = torch.utils.checkpoint.checkpoint
        return self.head(again(self.block, x, use_reentrant=False))

    return make(forward)


def library() -> nn.Module:
    """PyTorch's own layer, whose fast path is an operator of its own."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layer(self.embedding(ids), src_mask=mask, is_causal=True))

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    return make(forward, lambda model: setattr(model, "layer", layer.eval()))


@pytest.mark.parametrize(
    "build",
    [
        *(containers, shared, tensors, contexts, library),
        pytest.param(wrapped(nn.DataParallel), id="DataParallel"),
    ],
)
def test_kinds_of_modules(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert_equal(model, 1, 5)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own
def test_a_compiled_module_is_the_module_inside() -> None:
    model = make(plain)
    compiled: Any = torch.compile(model)  # pyright: ignore[reportUnknownMemberType]
    assert print_module(trace(compiled)) == print_module(trace(model))
    assert trace(compiled).weights.keys() == dict(model.named_parameters()).keys()


def test_the_model_stays_as_it_is() -> None:
    """Training mode by module, dtype, attributes."""
    model = make(states(add)).bfloat16().train()
    model.block.eval()
    model.kept = torch.ones(3)  # pyright: ignore[reportAttributeAccessIssue]
    before = {name: id(t) for name, t in model.named_parameters()}
    trace(model)
    assert model.training
    assert not model.block.training
    assert "kept" in vars(model)
    assert before == {name: id(t) for name, t in model.named_parameters()}
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}


# Limits


class TinyGPT(Base):
    """Learned positions and a mask of the whole context, both cut to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, CONTEXT, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        mask = torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits and a loss."""
        batch, tokens = ids.shape
        assert tokens <= CONTEXT, "the sequence is too long"
        x = self.embedding(ids) + self.positions[:, :tokens]
        shape = (batch, tokens, 2, WIDTH // 2)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).split(WIDTH, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:, :, :tokens, :tokens] == 0, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(batch, tokens, WIDTH)
        logits = self.head(self.block(x + y))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def test_a_limit_on_tokens_is_the_context(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyGPT().eval()
    engine = liquidc.compile(model, tmp_path / "engine")
    assert engine.manifest.model.context == CONTEXT
    for length in (1, 5, CONTEXT - 1, CONTEXT):
        got = engine.logits(IDS[0, :length].tolist())
        want = wanted(model, IDS[:1, :length])[0].numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max())
    with pytest.raises(InputError, match=f"at most the context of the model, {CONTEXT}"):
        engine.logits([1] * (CONTEXT + 1))


def test_rows_of_different_lengths_need_a_model_that_knows_padding(tmp_path: Path) -> None:
    """The mean over a row's tokens would count the other rows' length."""
    model = make(
        lambda self, ids: self.head(self.embedding(ids) - self.embedding(ids).mean(1, True))
    )
    engine = liquidc.compile(model, tmp_path / "engine", target="null")
    session = engine.session(batch=2, capacity=9)
    with pytest.raises(InputError, match="rows of one length"):
        session.prefill([[1, 2, 3], [4]])
    got = session.prefill([[1, 2, 3], [4, 5, 6]], every=True).logits
    want = wanted(model, torch.tensor([[1, 2, 3], [4, 5, 6]])).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max())

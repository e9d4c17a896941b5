"""Decoders in other forms than the example's: element types, results, operations in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import liquidc
from liquidc.errors import InputError, UnsupportedError
from liquidc.frontend import protocol
from liquidc.frontend.fingerprint import fingerprint
from liquidc.frontend.protocol import LayerCache, Step
from liquidc.frontend.trace import trace
from liquidc.inputs import ModuleInput
from liquidc.ir import Module, print_module
from liquidc.ir.interpreter import Interpreter, first_call
from tests.frontend.other_model import (
    HEAD_WIDTH,
    HEADS,
    SCALE,
    USED,
    WIDTH,
    Cache,
    OtherModel,
    ParallelLayer,
    gelu_expert,
)

IDS = list(range(3, 15))
CLOSE = 1e-5
Result = Any


def build(cls: type[OtherModel] = OtherModel, layer: type[ParallelLayer] | None = None) -> Any:
    """A model of two layers; with the same seed the same weights."""
    torch.manual_seed(5)
    model = cls().eval()
    if layer is not None:
        model.layers = nn.ModuleList(layer() for _ in range(3)).eval()
        torch.manual_seed(5)
        model.load_state_dict(OtherModel().state_dict(), strict=False)
    del model.layers[2]
    return model


def logits(model: nn.Module) -> Tensor:
    """Of the last token of `IDS`, by the interpreter."""
    module = trace(model)
    inputs = first_call(module.functions["prefill"].args, IDS)
    return Interpreter(module, ModuleInput(model).weights).run("prefill", inputs)["logits"]


@cache
def wanted() -> Tensor:
    """The logits of the example's own form."""
    return logits(build())


class OtherResults(OtherModel):
    """A tuple of states, a dict with logits."""

    def embed(self, input_ids: Tensor, positions: Tensor) -> Result:
        """States and something else."""
        return super().embed(input_ids, positions), None

    def head(self, x: Tensor) -> Result:
        """Logits and something else."""
        return {"states": x, "logits": super().head(x)}


class InPlace(ParallelLayer):
    """In place in the layer, in both arms of its gate and on what it is given."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """The state and the cache in a list and a tuple."""
        x += 1
        x.sub_(1)
        mask, _ = step.depth_gate(self.gate(x).squeeze(-1))
        n = self.norm(x)
        cache, limit = protocol.append(cache, *self.key_value(n), step.valid)

        def run(x: Tensor, n: Tensor, mask: Tensor, *kv: Tensor) -> tuple[Tensor, Tensor]:
            q = self.q(n).unflatten(-1, (HEADS, HEAD_WIDTH))
            f = self.o(protocol.attend(q, *kv, SCALE).flatten(-2))
            index, weight = protocol.route(self.router(n), mask, USED)
            params: Any = [expert.weights() for expert in self.experts]  # pyright: ignore
            f += protocol.dispatch(n, index, weight, gelu_expert, params)
            y = x.clone()
            y += protocol.keep(mask, f)
            return y, index

        def skip(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            none = torch.empty((*x.shape[:-1], USED), dtype=torch.int64)
            none[:] = -1
            return x.clone(), none

        y, step.experts = protocol.gated(mask, run, skip, x, n, mask, cache.key, cache.value, limit)
        return [y, tuple(cache)]


@pytest.mark.parametrize(
    "model",
    [
        lambda: build(OtherResults),
        lambda: build(layer=InPlace),
        lambda: build().double(),
        lambda: torch.nn.DataParallel(build()),
    ],
    ids=["results", "in-place", "float64", "DataParallel"],
)
def test_other_forms_compute_the_same(model: Callable[[], nn.Module]) -> None:
    got, given = logits(model()), wanted()
    assert (got - given).abs().max() <= CLOSE * given.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_compiled_as_its_float32_form(dtype: torch.dtype, tmp_path: Path) -> None:
    """Cache and logits are float32, the stored weights are those of 16 bits."""
    model = build().to(dtype)
    engine = liquidc.compile(model, tmp_path / "engine")
    got = engine.logits(IDS)
    assert got.dtype == np.float32
    assert engine.manifest.cache is not None
    assert engine.manifest.cache.dtype == "f32"
    want = logits(model.float())[0, 0].numpy()
    np.testing.assert_allclose(got[-1], want, rtol=0, atol=CLOSE * np.abs(want).max())


class NarrowCache(OtherModel):
    """A cache in bfloat16, by name."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty one."""
        empty = torch.zeros(batch, HEADS, capacity, HEAD_WIDTH, dtype=torch.bfloat16)
        length = torch.zeros(batch, dtype=torch.int64)
        return Cache([LayerCache(empty, empty, length) for _ in self.layers])


class NarrowLayer(ParallelLayer):
    """Rounds keys and values for its cache."""

    def key_value(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded."""
        k, v = super().key_value(n)
        return k.to(torch.bfloat16), v.to(torch.bfloat16)

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """Attention alone."""
        n = self.norm(x)
        cache, limit = protocol.append(cache, *self.key_value(n), step.valid)
        q = self.q(n).unflatten(-1, (HEADS, HEAD_WIDTH))
        y = protocol.attend(q, cache.key.float(), cache.value.float(), limit, SCALE)
        return x + self.o(y.flatten(-2)), cache


class RoundingLayer(NarrowLayer):
    """Rounds keys and values, and widens them again."""

    def key_value(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded."""
        k, v = super().key_value(n)
        return k.float(), v.float()


def test_a_16_bit_cache_keeps_its_rounding() -> None:
    got = logits(build(NarrowCache, NarrowLayer))
    want = logits(build(layer=RoundingLayer))
    np.testing.assert_array_equal(got, want)


# What is refused


class NoCache(OtherModel):
    """Not a cache."""

    def new_cache(self, batch: int, capacity: int) -> Result:
        """Refused."""
        return None


class MixedCaches(OtherModel):
    """Layers whose caches differ."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Refused."""
        caches: list[LayerCache] = []
        for width in range(len(self.layers)):
            empty = torch.zeros(batch, HEADS, capacity, 8 * width + 8)
            caches.append(LayerCache(empty, empty, torch.zeros(batch, dtype=torch.int64)))
        return Cache(caches)


class StateAlone(ParallelLayer):
    """Returns no cache."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        return x


class Narrower(ParallelLayer):
    """Returns a part of the state."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        return x[..., :16], cache


class MovesPositions(ParallelLayer):
    """Changes what the other layers read."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        step.positions.add_(1)
        return x, cache


class ChangesAnOperand(ParallelLayer):
    """An arm changes what it is given."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        mask, _ = step.depth_gate(self.gate(x).squeeze(-1))

        def run(x: Tensor) -> tuple[Tensor]:
            x += 1
            return (x,)

        return protocol.gated(mask, run, lambda x: (x.clone(),), x)[0], cache


class Counts(ParallelLayer):
    """Keeps a count in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        self._calls += 1
        return x * self._calls, cache


class OneToken(ParallelLayer):
    """Does something else for one token."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        return (x * 2 if x.shape[1] == 1 else x), cache


class ManyGates(ParallelLayer):
    """More gates than a layer may have."""

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Result:
        """Refused."""
        for _ in range(9):
            step.depth_gate(self.gate(x).squeeze(-1))
        return x, cache


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build(NoCache), r"NoCache\.new_cache must give an object whose `layers` are 2"),
        (lambda: build(MixedCaches), "gives layers caches of different shapes"),
        (lambda: build(layer=StateAlone), r"returns float32\[…, …, 32\] instead of \(x, cache\)"),
        (lambda: build(layer=Narrower), r"takes x as .*32\] and returns .*16\]"),
        (lambda: build(layer=MovesPositions), "changes an argument in place that other layers"),
        (lambda: build(layer=ChangesAnOperand), "an arm .* changes an operand in place: clone it"),
        (lambda: build(layer=Counts), r"changes its attribute _calls at .*`self\._calls \+= 1`"),
        (lambda: build(layer=OneToken), "right only for T ≠ 1"),
        (lambda: build(layer=ManyGates), "a layer may have 8 depth gates"),
    ],
)
def test_what_is_refused(model: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        trace(model())


# Which layers are alike


def traced_layers(model: OtherModel) -> tuple[Module, int]:
    """The IR, and how many layers are distinct."""
    return trace(model), len({fingerprint(layer) for layer in model.layers})


class Scaled(ParallelLayer):
    """Scales its state by an attribute, private or a tensor."""

    _scale = 1.0
    table: Tensor | None = None

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """The layer on a scaled state."""
        x = x * self._scale if self.table is None else x * self.table
        return super().forward(x, step, cache)


def test_layers_that_differ_are_traced_apart() -> None:
    """In a private attribute, in a hook, in which parameters they share."""
    private, hooked, tied = build(layer=Scaled), build(), build()
    private.layers[1]._scale = 2.0
    hooked.layers[1].register_forward_hook(lambda module, given, result: (result[0] * 2, result[1]))
    tied.layers[1].q.weight = tied.layers[1].o.weight
    plain = trace(build())
    for model in (private, hooked, tied):
        module, count = traced_layers(model)
        assert count == 2
        assert print_module(module) != print_module(plain)
    assert traced_layers(build())[1] == 1


def test_layers_share_a_trace_but_not_their_tensors() -> None:
    """Attributes that are tensors are weights by name; the result is that of buffers."""
    model, buffers = build(layer=Scaled), build(layer=Scaled)
    for number, (layer, other) in enumerate(zip(model.layers, buffers.layers, strict=True)):
        layer.rates = other.rates = torch.rand(WIDTH) + number
        type(layer).table = property(lambda self: self.rates)  # pyright: ignore
        del other.rates
        other.register_buffer("rates", layer.rates)
    try:
        module = trace(model)
        assert {"layers.0.rates", "layers.1.rates"} <= module.weights.keys()
        np.testing.assert_array_equal(logits(model), logits(buffers))
    finally:
        Scaled.table = None


def test_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="right only for T ≠ 1"):
        liquidc.compile(build(layer=OneToken), tmp_path / "engine", target="null")
    assert list(tmp_path.iterdir()) == []

"""Emits ops into a module under construction, with random choices and small random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from liquidc.ir import Block, DType, Function, Location, Module, Op, TensorType, Value, ops
from liquidc.ir import weights as lazy

WIDTH = 8
"""Width of the state, f32[B, T, WIDTH]."""


class Builder:
    """A module that grows op by op.

    Args:
        rng: makes every choice.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.module = Module("generated")
        self.block = Block()
        self.tensors: dict[str, torch.Tensor] = {}
        self.numbers = torch.Generator().manual_seed(rng.getrandbits(16))

    def function(self, name: str, args: Sequence[tuple[str, TensorType]]) -> Function:
        """Start a function; ops go into it from here on."""
        function = self.module.add(Function(name, args))
        self.block = function.body
        return function

    def chance(self, percent: int) -> bool:
        """True in so many cases of 100."""
        return self.rng.randrange(100) < percent

    def add(self, op: Op) -> Value:
        """Emit an op with one result."""
        return self.emit(op)[0]

    def emit(self, op: Op) -> list[Value]:
        """Emit an op, some with the place of the model that they come from."""
        if self.chance(10):
            op.loc = Location('a "model".py', len(self.block.ops) + 1)
        return self.block.append(op).results

    @contextmanager
    def inside(self, block: Block) -> Iterator[Block]:
        """Ops go into `block` for a while."""
        outer, self.block = self.block, block
        yield block
        self.block = outer

    def conditional(
        self,
        cond: Value,
        label: str,
        then: Callable[[], Sequence[Value]],
        otherwise: Callable[[], Sequence[Value]],
        **identity: Any,
    ) -> list[Value]:
        """An `if` whose arms are emitted by two functions that give what they yield."""
        arms: list[Block] = []
        for fill in (then, otherwise):
            with self.inside(Block()) as block:
                self.emit(ops.Yield(list(fill())))
            arms.append(block)
        return self.emit(ops.If(cond, label=label, **identity, then=arms[0], otherwise=arms[1]))

    def weight(self, *shape: int) -> Value:
        """A new weight with elements around 1/√(last dimension), now and then an expression."""
        name = f"part{len(self.tensors)}.weight"
        kind = self.rng.choice(("plain", "plain", "transposed", "cut", "joined", "cast"))
        if kind == "transposed" and len(shape) == 2:
            expr: lazy.WeightExpr = lazy.Transpose(self._stored(name, *shape[::-1]), (1, 0))
        elif kind == "cut":
            expr = lazy.Slice(self._stored(name, shape[0] + 3, *shape[1:]), 0, 2, 2 + shape[0])
        elif kind == "joined" and shape[0] > 1:
            first = self._stored(f"{name}.first", 1, *shape[1:])
            expr = lazy.Concat((first, self._stored(name, shape[0] - 1, *shape[1:])), 0)
        elif kind == "cast":
            expr = lazy.cast(self._stored(name, *shape, dtype=DType.BF16), DType.F32)
        else:
            expr = self._stored(name, *shape)
        return self.declared(name, expr)

    def stack(self, count: int, *shape: int) -> list[str]:
        """Names of `count` weights that are the entries of one stored tensor."""
        base = f"part{len(self.tensors)}.experts"
        stored = self._stored(base, count, *shape)
        names = [f"{base}.{i}" for i in range(count)]
        for i, name in enumerate(names):
            self.module.weights[name] = lazy.Select(stored, i)
        return names

    def declared(self, name: str, expr: lazy.WeightExpr) -> Value:
        """A weight op for an expression, declared under `name`."""
        self.module.weights[name] = expr
        return self.read(name)

    def read(self, name: str) -> Value:
        """A weight op for a declared weight."""
        type = self.module.weights[name].type
        return self.add(ops.Weight(weight=name, result_types=[type]))

    def stored(self, *shape: int) -> lazy.Stored:
        """A new tensor of the checkpoint, not yet read."""
        return self._stored(f"part{len(self.tensors)}.weight", *shape)

    def _stored(self, name: str, *shape: int, dtype: DType = DType.F32) -> lazy.Stored:
        values = torch.randn(shape, generator=self.numbers) / shape[-1] ** 0.5
        self.tensors[name] = values.to(lazy.torch_dtype(dtype))
        return lazy.Stored(name, TensorType(dtype, shape))

    def scalar(self, number: int | float | bool, dtype: DType = DType.F32) -> Value:
        """A constant without dimensions."""
        return self.add(ops.Constant(value=(number,), result_types=[TensorType(dtype)]))

    def reshape(self, x: Value, *shape: int | str) -> Value:
        """`x` in another shape."""
        return self.add(ops.Reshape(x, shape=shape))

    def stacked(self, values: Sequence[Value]) -> Value:
        """Values of one type along a new first dimension, as the trace stacks results."""
        rows = [self.reshape(value, 1, *value.shape) for value in values]
        return self.add(ops.Concat(rows, dim=0))

    def linear(self, x: Value, width: int) -> Value:
        """A projection with a new weight and sometimes a bias."""
        weight = self.weight(width, _size(x))
        bias = self.weight(width) if self.chance(30) else None
        return self.add(ops.Linear(x, weight, bias))

    def norm(self, x: Value) -> Value:
        """A normalisation with or without weights."""
        weight = self.weight(_size(x)) if self.chance(70) else None
        if self.chance(70):
            return self.add(ops.RMSNorm(x, weight, eps=0.01))
        bias = self.weight(_size(x)) if self.chance(50) else None
        return self.add(ops.LayerNorm(x, weight, bias, eps=0.01))

    def any(self, mask: Value) -> Value:
        """Whether any token is in `mask` [B, T]."""
        return self.add(ops.Any(mask, dims=(0, 1)))

    def masked(self, mask: Value, x: Value, other: Value) -> Value:
        """`x` [B, T, ...] where the mask [B, T] holds, else `other`."""
        ones = [1] * (x.type.rank - 2)
        return self.add(ops.Where(self.reshape(mask, "B", "T", *ones), x, other))


def _size(x: Value) -> int:
    (width,) = lazy.sizes(x.shape[-1:])
    return width

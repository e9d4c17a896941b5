"""Weight expressions that rearrange or compute: `take`, `xor`, `mix`, `product`; and all by name.

Like those of `liquidc.ir.weights`, their elements depend neither on the box that is read nor on
threads: sums are taken in float64 in a fixed order, or rounded correctly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liquidc.ir.mxfp4 import Mxfp4
from liquidc.ir.quantised import Codes, Scales, Zeros
from liquidc.ir.rotary import Rotation
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import (
    Box,
    Cast,
    Concat,
    Select,
    Slice,
    Stack,
    Stored,
    Transpose,
    WeightExpr,
    WeightSource,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Take(WeightExpr):
    """`take(x, dim, [2, 0])`: entries of one dimension by number, in that order."""

    x: WeightExpr
    dim: int
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.dim < self.x.type.rank:
            raise ValueError(f"{self.x.type} has no dimension {self.dim}")
        size = self.x.sizes[self.dim]
        if not self.index or not all(type(i) is int and 0 <= i < size for i in self.index):
            raise ValueError(f"entries {list(self.index)} of {self.x.type}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        shape = list(self.x.type.shape)
        shape[self.dim] = len(self.index)
        return self.x.type.with_shape(*shape)

    def __str__(self) -> str:
        return f"take({self.x}, {self.dim}, [{', '.join(map(str, self.index))}])"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        if self.dim == 0:
            return self.x.entry(self.index[index])
        return Take(self.x.entry(index), self.dim - 1, self.index)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        wanted = self.index[slice(*box[self.dim])]
        before, after = box[: self.dim], box[self.dim + 1 :]
        if self.dim == 0:  # rows are what a source reads by themselves
            return torch.cat([self.x.read(source, ((i, i + 1), *after)) for i in wanted])
        first = min(wanted)
        span = self.x.read(source, (*before, (first, max(wanted) + 1), *after))
        return span.index_select(self.dim, torch.tensor([i - first for i in wanted]))


@dataclass(frozen=True, slots=True)
class Xor(WeightExpr):
    """`xor(x, 128)`: every byte of `x` with some bits flipped.

    Codes of eight bits whose zero is 128 become signed ones with 128, two of four bits whose zero
    is 8 with 136 (hex 88).
    """

    x: WeightExpr
    mask: int

    def __post_init__(self) -> None:
        if self.x.type.dtype != DType.U8 or not 0 <= self.mask <= 255:
            raise ValueError(f"xor of {self.x.type} and {self.mask}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.x.type

    def __str__(self) -> str:
        return f"xor({self.x}, {self.mask})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        return Xor(self.x.entry(index), self.mask)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        return self.x.read(source, box) ^ self.mask


@dataclass(frozen=True, slots=True)
class Mix(WeightExpr):
    """`mix([x, y], [0.75, 0.25])`: a weighted sum of tensors of one type."""

    xs: tuple[WeightExpr, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len({x.type for x in self.xs}) != 1 or len(self.xs) != len(self.shares):
            raise ValueError(f"can't mix {[str(x.type) for x in self.xs]} by {list(self.shares)}")
        if not self.xs[0].type.dtype.is_float or not all(map(math.isfinite, self.shares)):
            raise ValueError(f"can't mix {self.xs[0].type} by {list(self.shares)}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.xs[0].type

    def __str__(self) -> str:
        shares = ", ".join(repr(float(share)) for share in self.shares)
        return f"mix([{', '.join(map(str, self.xs))}], [{shares}])"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return tuple(name for x in self.xs for name in x.sources())

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        return Mix(tuple(x.entry(index) for x in self.xs), self.shares)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        first = self.xs[0].read(source, box)
        total = first.to(torch.float64) * self.shares[0]
        for x, share in zip(self.xs[1:], self.shares[1:], strict=True):
            total += x.read(source, box).to(torch.float64) * share
        return total.to(first.dtype)


@dataclass(frozen=True, slots=True)
class Product(WeightExpr):
    """`product(a, b)`: a [m, k] · b [k, n], every element correctly rounded; for small matrices."""

    a: WeightExpr
    b: WeightExpr

    def __post_init__(self) -> None:
        a, b = self.a.type, self.b.type
        if a.rank != 2 or b.rank != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
            raise ValueError(f"can't multiply {a} and {b}")
        if not a.dtype.is_float:
            raise ValueError(f"can't multiply {a}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.a.type.with_shape(self.a.type.shape[0], self.b.type.shape[1])

    def __str__(self) -> str:
        return f"product({self.a}, {self.b})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.a.sources() + self.b.sources()

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        middle = (0, self.a.sizes[1])
        read = self.a.read(source, (box[0], middle))
        a, b = read.to(torch.float64), self.b.read(source, (middle, box[1])).to(torch.float64)
        rows = [[math.fsum((row * column).tolist()) for column in b.T] for row in a]
        made = torch.tensor(rows, dtype=torch.float64).reshape(a.shape[0], b.shape[1])
        return made.to(read.dtype)


FUNCTIONS: dict[str, Callable[..., WeightExpr]] = {
    "tensor": Stored,
    "slice": Slice,
    "select": Select,
    "transpose": lambda x, perm: Transpose(x, tuple(perm)),
    "concat": lambda xs, dim: Concat(tuple(xs), dim),
    "stack": lambda xs: Stack(tuple(xs)),
    "cast": Cast,
    "take": lambda x, dim, index: Take(x, dim, tuple(index)),
    "xor": Xor,
    "mix": lambda xs, shares: Mix(tuple(xs), tuple(map(float, shares))),
    "product": Product,
    "rotation": Rotation,
    "mxfp4": Mxfp4,
    "codes": Codes,
    "scales": Scales,
    "zeros": Zeros,
}
"""Constructors by their name in the text form."""

"""Weights as lazy expressions over the tensors of a checkpoint.

Nothing is read while a model is compiled; `evaluate` yields a weight in blocks of rows (slices of
its first dimension) while the engine is written, so that the memory it takes is bounded by the
block and not by the tensor. The result depends neither on the size of the block nor on threads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from liquidc.ir.types import Dim, DType, TensorType

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 1024 * 1024
"""Default upper bound of one block of rows, in bytes of the result and of what reading it takes.

The allocator keeps and reuses memory of this size; larger blocks are mapped anew each time, and the
kernel clears their pages: 256 MB take twice the time.
"""

Box = tuple[tuple[int, int], ...]
"""A half-open range per dimension."""


class WeightSource(Protocol):
    """Where tensors come from; `liquidc.frontend.checkpoint.CheckpointSource` is one."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of the tensor `name`, in its stored dtype.

        From a source that gives float64 instead, expressions are not rounded either.
        """
        ...


class WeightExpr:
    """A tensor that can be read box by box."""

    @property
    def type(self) -> TensorType:
        """Type of the whole tensor; every dimension is a size."""
        raise NotImplementedError

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """The elements inside `box`."""
        raise NotImplementedError

    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors that the expression reads, in order."""
        raise NotImplementedError

    def entry(self, index: int) -> WeightExpr:
        """One entry of the first dimension, which disappears; reads no more than that entry.

        Its text names no tensor of other entries: an expert says what it holds, not its stack.
        """
        return Select(self, index)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape as sizes."""
        return sizes(self.type.shape)

    @property
    def work(self) -> int:
        """Bytes of memory that reading takes for each byte of the result, about."""
        return max((part.work for part in self._parts()), default=1)

    def _parts(self) -> Iterator[WeightExpr]:
        """The expressions that this one is made of."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value: object = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, WeightExpr):
                    yield part


def sizes(shape: Sequence[Dim]) -> tuple[int, ...]:
    """`shape` as sizes.

    Raises:
        ValueError: a dimension is a name.
    """
    result = tuple(dim for dim in shape if isinstance(dim, int))
    if len(result) != len(shape):
        raise ValueError(f"a weight has sizes, not names: {list(shape)}")
    return result


def byte_size(type: TensorType) -> int:
    """Bytes of a tensor of this type."""
    count = type.dtype.bytes
    for size in sizes(type.shape):
        count *= size
    return count


@dataclass(frozen=True, slots=True)
class Stored(WeightExpr):
    """`tensor("name", bf16[2, 3])`: a tensor of the checkpoint."""

    name: str
    stored: TensorType

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.stored

    def __str__(self) -> str:
        return f"tensor({json.dumps(self.name)}, {self.stored})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return (self.name,)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        if not box:
            return source.read_rows(self.name, 0, 1).reshape(())
        rows = source.read_rows(self.name, *box[0])
        return rows[(slice(None), *(slice(*bounds) for bounds in box[1:]))]


@dataclass(frozen=True, slots=True)
class Slice(WeightExpr):
    """`slice(x, dim, start, stop)`: part of one dimension."""

    x: WeightExpr
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        _check_dim(self.x, self.dim)
        if not 0 <= self.start < self.stop <= self.x.sizes[self.dim]:
            raise ValueError(f"slice {self.start}:{self.stop} is outside {self.x.type}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        shape = list(self.x.type.shape)
        shape[self.dim] = self.stop - self.start
        return self.x.type.with_shape(*shape)

    def __str__(self) -> str:
        return f"slice({self.x}, {self.dim}, {self.start}, {self.stop})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        if self.dim == 0:
            return self.x.entry(self.start + index)
        return Slice(self.x.entry(index), self.dim - 1, self.start, self.stop)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        low, high = box[self.dim]
        moved = (low + self.start, high + self.start)
        return self.x.read(source, (*box[: self.dim], moved, *box[self.dim + 1 :]))


@dataclass(frozen=True, slots=True)
class Select(WeightExpr):
    """`select(x, index)`: one entry of the first dimension, which disappears."""

    x: WeightExpr
    index: int

    def __post_init__(self) -> None:
        _check_dim(self.x, 0)
        if not 0 <= self.index < self.x.sizes[0]:
            raise ValueError(f"index {self.index} is outside {self.x.type}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.x.type.with_shape(*self.x.type.shape[1:])

    def __str__(self) -> str:
        return f"select({self.x}, {self.index})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        return self.x.read(source, ((self.index, self.index + 1), *box))[0]


@dataclass(frozen=True, slots=True)
class Transpose(WeightExpr):
    """`transpose(x, [1, 0])`: dimension i of the result is dimension perm[i] of `x`."""

    x: WeightExpr
    perm: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.perm) != list(range(self.x.type.rank)):
            raise ValueError(f"{list(self.perm)} does not permute {self.x.type}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.x.type.with_shape(*(self.x.type.shape[i] for i in self.perm))

    def __str__(self) -> str:
        return f"transpose({self.x}, [{', '.join(map(str, self.perm))}])"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        if self.perm[0] != 0:
            return Select(self, index)
        return Transpose(self.x.entry(index), tuple(i - 1 for i in self.perm[1:]))

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        bounds = dict(zip(self.perm, box, strict=True))
        return self.x.read(source, tuple(bounds[i] for i in range(len(box)))).permute(self.perm)


@dataclass(frozen=True, slots=True)
class Concat(WeightExpr):
    """`concat([x, y], dim)`: tensors one after the other along one dimension."""

    xs: tuple[WeightExpr, ...]
    dim: int

    def __post_init__(self) -> None:
        first = self.xs[0].type
        for x in self.xs:
            _check_dim(x, self.dim)
            rest, other = list(first.shape), list(x.type.shape)
            rest[self.dim] = other[self.dim] = 0
            if rest != other or x.type.dtype != first.dtype:
                raise ValueError(f"can't concatenate {first} and {x.type} along {self.dim}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        shape = list(self.xs[0].type.shape)
        shape[self.dim] = sum(x.sizes[self.dim] for x in self.xs)
        return self.xs[0].type.with_shape(*shape)

    def __str__(self) -> str:
        return f"concat([{', '.join(map(str, self.xs))}], {self.dim})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return tuple(name for x in self.xs for name in x.sources())

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        if self.dim > 0:
            return Concat(tuple(x.entry(index) for x in self.xs), self.dim - 1)
        for x in self.xs:
            if index < x.sizes[0]:
                return x.entry(index)
            index -= x.sizes[0]
        raise ValueError(f"{self.type} has no entry {index}")

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        parts: list[torch.Tensor] = []
        offset, (low, high) = 0, box[self.dim]
        for x in self.xs:
            size = x.sizes[self.dim]
            bounds = (max(low - offset, 0), min(high - offset, size))
            if bounds[0] < bounds[1]:
                inner = (*box[: self.dim], bounds, *box[self.dim + 1 :])
                parts.append(x.read(source, inner))
            offset += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True, slots=True)
class Stack(WeightExpr):
    """`stack([x, y])`: tensors of one type along a new first dimension."""

    xs: tuple[WeightExpr, ...]

    def __post_init__(self) -> None:
        if len({x.type for x in self.xs}) != 1:
            raise ValueError(f"can't stack {sorted({str(x.type) for x in self.xs})}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.xs[0].type.with_shape(len(self.xs), *self.xs[0].type.shape)

    def __str__(self) -> str:
        return f"stack([{', '.join(map(str, self.xs))}])"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return tuple(name for x in self.xs for name in x.sources())

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        return self.xs[index]

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        return torch.stack([x.read(source, box[1:]) for x in self.xs[slice(*box[0])]])


@dataclass(frozen=True, slots=True)
class Cast(WeightExpr):
    """`cast(x, f32)`: another element type."""

    x: WeightExpr
    dtype: DType

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.x.type.with_dtype(self.dtype)

    def __str__(self) -> str:
        return f"cast({self.x}, {self.dtype})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`."""
        return Cast(self.x.entry(index), self.dtype)

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        read = self.x.read(source, box)
        made = read.to(torch_dtype(self.dtype))
        return made if read.dtype == torch_dtype(self.x.type.dtype) else made.to(read.dtype)


def _check_dim(x: WeightExpr, dim: int) -> None:
    if not 0 <= dim < x.type.rank:
        raise ValueError(f"{x.type} has no dimension {dim}")


def cast(x: WeightExpr, dtype: DType) -> WeightExpr:
    """`x` in another element type; `x` itself when it has that type."""
    return x if x.type.dtype == dtype else Cast(x, dtype)


def stack(xs: Sequence[WeightExpr]) -> WeightExpr:
    """`Stack`, or the tensor of which the `xs` are all the entries in order: nothing is rebuilt."""
    first = xs[0]
    if isinstance(first, Cast):
        inner = [x.x for x in xs if isinstance(x, Cast) and x.dtype == first.dtype]
        return Cast(stack(inner), first.dtype) if len(inner) == len(xs) else Stack(tuple(xs))
    if isinstance(first, Select) and list(xs) == [
        Select(first.x, i) for i in range(first.x.sizes[0])
    ]:
        return first.x
    return Stack(tuple(xs))


def evaluate(
    expr: WeightExpr, source: WeightSource, block_bytes: int = BLOCK_BYTES
) -> Iterator[torch.Tensor]:
    """The tensor in contiguous blocks of rows (slices of the first dimension), in order.

    Args:
        expr: the weight.
        source: where its tensors are read.
        block_bytes: upper bound of a block in bytes, and of what reading it takes; one row is the
            least that is read.
    """
    shape = expr.sizes
    if not shape:
        yield expr.read(source, ())
        return
    row = expr.type.dtype.bytes * expr.work
    for size in shape[1:]:
        row *= size
    step = max(1, block_bytes // max(row, 1))
    rest = tuple((0, size) for size in shape[1:])
    for start in range(0, shape[0], step):
        yield expr.read(source, ((start, min(start + step, shape[0])), *rest)).contiguous()


def materialize(expr: WeightExpr, source: WeightSource) -> torch.Tensor:
    """The whole tensor."""
    import torch

    blocks = list(evaluate(expr, source))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The PyTorch name of an element type."""
    import torch

    return {
        DType.F64: torch.float64,
        DType.F32: torch.float32,
        DType.F16: torch.float16,
        DType.BF16: torch.bfloat16,
        DType.I64: torch.int64,
        DType.I32: torch.int32,
        DType.I8: torch.int8,
        DType.U8: torch.uint8,
        DType.BOOL: torch.bool,
    }[dtype]

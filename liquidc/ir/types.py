"""Tensor types: an element type and a shape of sizes and *named* dimensions (`f32[B, T, 256]`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

Dim = int | str
"""A size, or the name of a dimension known at run time; a product of both is written `2*B*T`."""

_DIM = re.compile(r"[A-Za-z_]\w*|(?:\d+\*)?[A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*")


class DType(StrEnum):
    """Element types, named as in the text form."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @property
    def is_float(self) -> bool:
        """True for the floating-point types."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return _BYTES[self]

    @property
    def numpy(self) -> str:
        """What numpy calls these elements; bfloat16, which it lacks, is read as its 16 bits."""
        return _NUMPY[self]


_NUMPY = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "uint16",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I8: "int8",
    DType.U8: "uint8",
    DType.BOOL: "bool",
}
_BYTES = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I64: 8,
    DType.I32: 4,
    DType.I8: 1,
    DType.U8: 1,
    DType.BOOL: 1,
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a value: element type and shape; a scalar has the shape `()`."""

    dtype: DType
    shape: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def with_shape(self, *shape: Dim) -> TensorType:
        """The same element type with another shape."""
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        """The same shape with another element type."""
        return TensorType(dtype, self.shape)


def is_dim(text: str) -> bool:
    """True if `text` is a well-formed dimension name or product."""
    return _DIM.fullmatch(text) is not None


def dim_names(dims: Iterable[Dim]) -> set[str]:
    """The names that occur in `dims`, products taken apart."""
    return {
        name
        for dim in dims
        if isinstance(dim, str)
        for name in dim.split("*")
        if not name.isdigit()
    }


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of a shape, canonical (`2*B*T`): equal products compare equal."""
    size, names = 1, list[str]()
    for dim in dims:
        if isinstance(dim, int):
            size *= dim
            continue
        for part in dim.split("*"):
            if part.isdigit():
                size *= int(part)
            else:
                names.append(part)
    if size == 0 or not names:
        return size
    return "*".join(([str(size)] if size != 1 else []) + sorted(names))


def broadcast(shapes: Iterable[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The NumPy broadcast of `shapes`; a named dimension meets only itself and 1.

    Raises:
        ValueError: two dimensions can't be broadcast.
    """
    result: list[Dim] = []
    for shape in shapes:
        width = max(len(result), len(shape))
        left = [1] * (width - len(result)) + result
        right = [1] * (width - len(shape)) + list(shape)
        result = []
        for a, b in zip(left, right, strict=True):
            if a != b and a != 1 and b != 1:
                raise ValueError(f"dimensions {a} and {b} can't be broadcast")
            result.append(b if a == 1 else a)
    return tuple(result)

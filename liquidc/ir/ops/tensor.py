"""Elementwise maths, shapes, reductions. Shapes broadcast as in NumPy."""

from __future__ import annotations

from liquidc.ir.core import Op, Value, attribute, operand, result, variadic
from liquidc.ir.types import Dim, DType, TensorType, broadcast, product


def same_dtype(*values: Value) -> DType:
    """The common element type.

    Raises:
        ValueError: the types differ.
    """
    if len({value.dtype for value in values}) != 1:
        raise ValueError(f"element types differ: {', '.join(str(v.dtype) for v in values)}")
    return values[0].dtype


def check_dim(value: Value, dim: int) -> int:
    """`dim`, checked to be a dimension of `value`.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= dim < value.type.rank:
        raise ValueError(f"{value.type} has no dimension {dim}")
    return dim


class Unary(Op):
    """Elementwise, one operand."""

    x: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the operand."""
        return (self.x.type,)

    def verify(self) -> None:
        """Defined for floating-point operands."""
        if not self.x.dtype.is_float:
            raise ValueError(f"needs a float, not {self.x.dtype}")


class Neg(Unary, name="neg", tokenwise=True):
    """-x."""


class Exp(Unary, name="exp", tokenwise=True):
    """e to the x."""


class Log(Unary, name="log", tokenwise=True):
    """Natural logarithm."""


class Floor(Unary, name="floor", tokenwise=True):
    """The largest whole number that is no larger."""


class Sqrt(Unary, name="sqrt", tokenwise=True):
    """Square root."""


class Rsqrt(Unary, name="rsqrt", tokenwise=True):
    """1 / √x."""


class Sin(Unary, name="sin", tokenwise=True):
    """Sine of x in radians."""


class Cos(Unary, name="cos", tokenwise=True):
    """Cosine of x in radians."""


class Tanh(Unary, name="tanh", tokenwise=True):
    """Hyperbolic tangent."""


class Sigmoid(Unary, name="sigmoid", tokenwise=True):
    """1 / (1 + e⁻ˣ)."""


class ReLU(Unary, name="relu", tokenwise=True):
    """max(x, 0)."""


class SiLU(Unary, name="silu", tokenwise=True):
    """x · sigmoid(x)."""


class GELU(Unary, name="gelu", tokenwise=True):
    """x · Φ(x), exactly or by the tanh formula."""

    approximate: str = attribute(default="none")

    def verify(self) -> None:
        """The formula is known."""
        super().verify()
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f'approximate is "none" or "tanh", not "{self.approximate}"')


class Not(Op, name="not", tokenwise=True):
    """Logical negation."""

    x: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the operand."""
        if self.x.dtype != DType.BOOL:
            raise ValueError(f"needs bool, not {self.x.dtype}")
        return (self.x.type,)


class Cast(Op, name="cast", tokenwise=True):
    """Another element type; floats round to nearest even, to bool means ≠ 0."""

    x: Value = operand()
    to: DType = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The shape of the operand."""
        return (self.x.type.with_dtype(self.to),)


class Binary(Op):
    """Elementwise, two operands of one element type."""

    a: Value = operand()
    b: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The broadcast shape."""
        return (TensorType(same_dtype(self.a, self.b), broadcast([self.a.shape, self.b.shape])),)


class Add(Binary, name="add", tokenwise=True):
    """a + b."""


class Sub(Binary, name="sub", tokenwise=True):
    """a - b."""


class Mul(Binary, name="mul", tokenwise=True):
    """a · b."""


class Div(Binary, name="div", tokenwise=True):
    """a / b, of floats."""

    def verify(self) -> None:
        """Integer division is not needed by any model and rounds differently per target."""
        if not self.a.dtype.is_float:
            raise ValueError(f"needs floats, not {self.a.dtype}")


class Maximum(Binary, name="maximum", tokenwise=True):
    """The larger of both."""


class Minimum(Binary, name="minimum", tokenwise=True):
    """The smaller of both."""


class Compare(Binary):
    """Elementwise comparison."""

    def infer(self) -> tuple[TensorType, ...]:
        """Booleans of the broadcast shape."""
        (both,) = super().infer()
        return (both.with_dtype(DType.BOOL),)


class Eq(Compare, name="eq", tokenwise=True):
    """a = b."""


class Ne(Compare, name="ne", tokenwise=True):
    """a ≠ b."""


class Lt(Compare, name="lt", tokenwise=True):
    """a < b."""


class Le(Compare, name="le", tokenwise=True):
    """a ≤ b."""


class Gt(Compare, name="gt", tokenwise=True):
    """a > b."""


class Ge(Compare, name="ge", tokenwise=True):
    """a ≥ b."""


class Logical(Binary):
    """Elementwise, on booleans."""

    def verify(self) -> None:
        """Both are booleans."""
        if self.a.dtype != DType.BOOL:
            raise ValueError(f"needs bool, not {self.a.dtype}")


class And(Logical, name="and", tokenwise=True):
    """Both."""


class Or(Logical, name="or", tokenwise=True):
    """At least one."""


class Where(Op, name="where", tokenwise=True):
    """`a` where the mask holds, else `b`; what the other holds there (NaN too) plays no part."""

    mask: Value = operand()
    a: Value = operand()
    b: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The broadcast shape of all three."""
        if self.mask.dtype != DType.BOOL:
            raise ValueError(f"the mask must be bool, not {self.mask.dtype}")
        shape = broadcast([self.mask.shape, self.a.shape, self.b.shape])
        return (TensorType(same_dtype(self.a, self.b), shape),)


class Reshape(Op, name="reshape"):
    """The same elements in row-major order under another shape."""

    x: Value = operand()
    shape: tuple[Dim, ...] = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The given shape."""
        if product(self.shape) != product(self.x.shape):
            raise ValueError(f"{self.x.type} has not the elements of [{_dims(self.shape)}]")
        return (self.x.type.with_shape(*self.shape),)


class Broadcast(Op, name="broadcast"):
    """The operand repeated along its missing and unit dimensions."""

    x: Value = operand()
    shape: tuple[Dim, ...] = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The given shape."""
        if broadcast([self.x.shape, self.shape]) != self.shape:
            raise ValueError(f"{self.x.type} can't be broadcast to [{_dims(self.shape)}]")
        return (self.x.type.with_shape(*self.shape),)


class AssumeSizes(Op, name="assume_sizes"):
    """The operand, whose named dimensions are known to have these sizes where the op stands."""

    x: Value = operand()
    shape: tuple[Dim, ...] = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The given shape."""
        fits = len(self.shape) == self.x.type.rank and all(
            old == new or isinstance(old, str)
            for old, new in zip(self.x.shape, self.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{self.x.type} can't be [{_dims(self.shape)}]")
        return (self.x.type.with_shape(*self.shape),)


class Transpose(Op, name="transpose"):
    """Dimension i of the result is dimension perm[i] of the operand."""

    x: Value = operand()
    perm: tuple[int, ...] = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The permuted shape."""
        if sorted(self.perm) != list(range(self.x.type.rank)):
            raise ValueError(f"{list(self.perm)} does not permute {self.x.type}")
        return (self.x.type.with_shape(*(self.x.shape[i] for i in self.perm)),)


class Slice(Op, name="slice"):
    """`start:stop` of one dimension whose size is known."""

    x: Value = operand()
    dim: int = attribute()
    start: int = attribute()
    stop: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The operand's shape with that dimension cut."""
        size = self.x.shape[check_dim(self.x, self.dim)]
        if not isinstance(size, int):
            raise ValueError(f"dimension {self.dim} of {self.x.type} has no known size")
        if not 0 <= self.start < self.stop <= size:
            raise ValueError(f"{self.start}:{self.stop} is outside dimension {self.dim} of {size}")
        shape = list(self.x.shape)
        shape[self.dim] = self.stop - self.start
        return (self.x.type.with_shape(*shape),)


class Concat(Op, name="concat"):
    """Tensors one after the other along one dimension."""

    xs: list[Value] = variadic()
    dim: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The sum along that dimension; the others agree."""
        if not self.xs:
            raise ValueError("needs at least one operand")
        dtype, shape = same_dtype(*self.xs), list(self.xs[0].shape)
        along = [x.shape[check_dim(x, self.dim)] for x in self.xs]
        for x in self.xs:
            rest = list(x.shape)
            rest[self.dim] = shape[self.dim]
            if rest != shape:
                raise ValueError(f"{self.xs[0].type} and {x.type} differ outside dim {self.dim}")
        known = [size for size in along if isinstance(size, int)]
        if len(known) != len(along):
            if len(along) != 1:
                raise ValueError(f"dimension {self.dim} has no known size")
            return (self.xs[0].type,)
        shape[self.dim] = sum(known)
        return (TensorType(dtype, tuple(shape)),)


class Gather(Op, name="gather"):
    """Entries of one dimension, by index; the shape of `index` takes that dimension's place."""

    x: Value = operand()
    index: Value = operand()
    dim: int = attribute(default=0)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The operand's shape with the dimension replaced."""
        check_dim(self.x, self.dim)
        if self.index.dtype not in (DType.I64, DType.I32):
            raise ValueError(f"the index must be an integer, not {self.index.dtype}")
        before, after = self.x.shape[: self.dim], self.x.shape[self.dim + 1 :]
        return (self.x.type.with_shape(*before, *self.index.shape, *after),)


class Reduce(Op):
    """Over some dimensions, which stay with size 1 if `keep`."""

    x: Value = operand()
    dims: tuple[int, ...] = attribute()
    keep: bool = attribute(default=False)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """The operand's shape without the dimensions."""
        dims = {check_dim(self.x, dim) for dim in self.dims}
        shape: list[Dim] = []
        for i, size in enumerate(self.x.shape):
            if i not in dims:
                shape.append(size)
            elif self.keep:
                shape.append(1)
        return (self.x.type.with_shape(*shape),)


class Sum(Reduce, name="sum"):
    """The sum."""


class Mean(Reduce, name="mean"):
    """The mean of floats."""


class Max(Reduce, name="max"):
    """The largest."""


class Any(Reduce, name="any"):
    """True if any element is."""

    def verify(self) -> None:
        """Of booleans."""
        if self.x.dtype != DType.BOOL:
            raise ValueError(f"needs bool, not {self.x.dtype}")


class CumSum(Op, name="cumsum"):
    """Running sum along one dimension, the element itself included."""

    x: Value = operand()
    dim: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the operand."""
        check_dim(self.x, self.dim)
        return (self.x.type,)


def _dims(shape: tuple[Dim, ...]) -> str:
    return ", ".join(map(str, shape))

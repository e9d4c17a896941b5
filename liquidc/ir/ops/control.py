"""Functions, conditionals, constants, weights."""

from __future__ import annotations

from liquidc.ir.core import Block, Op, Value, attribute, operand, region, result, results, variadic
from liquidc.ir.types import Dim, DType, TensorType, dim_names, product


class Constant(Op, name="constant"):
    """A small tensor written in the program, elements in row-major order."""

    value: tuple[int | float | bool, ...] = attribute()
    y: Value = result()

    def verify(self) -> None:
        """The number of elements fits the type."""
        if product(self.y.shape) != len(self.value):
            raise ValueError(f"{len(self.value)} elements don't fill {self.y.type}")


class Weight(Op, name="weight"):
    """A weight of the module, by name."""

    weight: str = attribute()
    y: Value = result()


class Size(Op, name="size"):
    """The size of a named dimension, as a scalar."""

    dim: Dim = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """A scalar."""
        return (TensorType(DType.I64),)


class Iota(Op, name="iota"):
    """0, 1, 2, … along a new vector of the given size."""

    dim: Dim = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """A vector."""
        return (TensorType(DType.I64, (self.dim,)),)


class Yield(Op, name="yield", terminator=True):
    """Ends a block; its operands become the results of the op that holds the block."""

    values: list[Value] = variadic()

    def infer(self) -> tuple[TensorType, ...]:
        """Nothing."""
        return ()


class Return(Op, name="return", terminator=True):
    """Ends a function with its results."""

    values: list[Value] = variadic()

    def infer(self) -> tuple[TensorType, ...]:
        """Nothing."""
        return ()


class If(Op, name="if"):
    """Runs one of two blocks; `label` names the part of the model (`layer3`, `layer3/expert5`).

    `lowering` says how a gate's tokens are to be computed: all of them if one runs (`branch`), or
    those that run (`compact`); empty if that was not decided.
    """

    cond: Value = operand()
    label: str = attribute(default="")
    lowering: str = attribute(default="")
    then: Block = region()
    otherwise: Block = region()
    values: list[Value] = results()

    def infer(self) -> tuple[TensorType, ...]:
        """The types that `then` yields."""
        return tuple(value.type for value in self.then.terminator.operands)

    def verify(self) -> None:
        """A boolean scalar decides; both arms yield the same types and take no arguments."""
        if self.cond.type != TensorType(DType.BOOL):
            raise ValueError(f"the condition must be bool[], not {self.cond.type}")
        if self.lowering not in ("", "branch", "compact"):
            raise ValueError(f"lowering is branch or compact, not {self.lowering!r}")
        yields = [[v.type for v in arm.terminator.operands] for arm in (self.then, self.otherwise)]
        if yields[0] != yields[1]:
            left, right = (", ".join(map(str, types)) for types in yields)
            raise ValueError(f"the arms yield different types: ({left}) and ({right})")
        if self.then.args or self.otherwise.args:
            raise ValueError("the arms take no arguments")


def named_dims(op: Op) -> set[str]:
    """Names of dimensions that the attributes of `op` mention and that must be known there."""
    if isinstance(op, Size | Iota):
        return dim_names([op.dim])
    shape = op.attributes.get("shape")
    if isinstance(shape, tuple):
        return dim_names([dim for dim in shape if isinstance(dim, str)])
    return set()

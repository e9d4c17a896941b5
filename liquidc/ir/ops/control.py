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


NUMBERS = {
    "": (),
    "gate": ("gate", "region", "layer"),
    "expert": ("expert",),  # and the layer, in a model that has layers
    "path": (),
    "form": (),
}
"""The roles of an `if`, and the numbers by which regions of a role are told apart."""


class If(Op, name="if"):
    """Runs one of two blocks; `role` and the numbers say which part of the model it is.

    A `gate`'s region runs the tokens that the gate chose: `gate` is the number of the gate among
    all of the model, `region` numbers what one gate opens. An `expert`'s region is that of `expert`
    in `layer`. A `path` is code for an expected depth path, then what takes its results over. A
    `form` is one of several forms of the same computation. -1 is no number.

    `label` is for people (`layer3`, `layer3/expert5`): names of nodes are made of it, and nothing
    reads it. `lowering` says how a gate's tokens are to be computed: all of them if one runs
    (`branch`), or those that run (`compact`); empty if that was not decided.
    """

    cond: Value = operand()
    label: str = attribute(default="")
    lowering: str = attribute(default="")
    role: str = attribute(default="")
    gate: int = attribute(default=-1)
    layer: int = attribute(default=-1)
    expert: int = attribute(default=-1)
    then: Block = region()
    otherwise: Block = region()
    region: int = attribute(default=-1)  # last, since it hides the function of this name
    values: list[Value] = results()

    def infer(self) -> tuple[TensorType, ...]:
        """The types that `then` yields."""
        return tuple(value.type for value in self.then.terminator.operands)

    def verify(self) -> None:
        """A boolean scalar decides; arms yield the same types; a role has its own numbers."""
        if self.cond.type != TensorType(DType.BOOL):
            raise ValueError(f"the condition must be bool[], not {self.cond.type}")
        if self.lowering not in ("", "branch", "compact"):
            raise ValueError(f"lowering is branch or compact, not {self.lowering!r}")
        if self.role not in NUMBERS:
            raise ValueError(f"role is one of {', '.join(NUMBERS)[2:]}, not {self.role!r}")
        numbers = {"gate": self.gate, "region": self.region}
        numbers |= {"layer": self.layer, "expert": self.expert}
        for name, number in numbers.items():
            needed = name in NUMBERS[self.role]
            if (number >= 0) != needed and (self.role, name) != ("expert", "layer"):
                raise ValueError(f"role {self.role!r} {'needs a' if needed else 'has no'} {name}")
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

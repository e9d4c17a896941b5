"""The six concepts of the IR: `Module`, `Function`, `Block`, `Op`, `Value`, `Location`.

An op class reads as its own signature::

    class Linear(Op, name="linear"):
        '''y = x · weightᵀ + bias over the last dimension.'''

        x: Value = operand()
        weight: Value = operand()
        bias: Value | None = optional()
        y: Value = result()

Values are in static single assignment form and know their uses. Control flow is structured: an op
may hold blocks (the arms of a conditional, the body of an expert); a value of a block is visible
in that block after its definition and in the blocks nested there, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

from liquidc.ir.types import Dim, DType, TensorType
from liquidc.ir.weights import WeightExpr

Attribute = int | float | bool | str | DType | TensorType | tuple[int | float | bool | str, ...]
"""What an attribute may be; a tuple holds sizes, dimension names or the elements of a constant."""


@dataclass(frozen=True, slots=True)
class Location:
    """A line of the user's model, relative to a directory that does not depend on the machine."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Value:
    """A typed result of an op or argument of a block, with the ops that use it."""

    __slots__ = ("name", "owner", "type", "uses")

    def __init__(self, type: TensorType, name: str = "", owner: Op | Block | None = None) -> None:
        self.type = type
        self.name = name
        self.owner = owner
        self.uses: dict[Op, int] = {}

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def op(self) -> Op | None:
        """The op that defines the value; None for an argument of a block."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape, sizes and names."""
        return self.type.shape

    def replace_by(self, other: Value) -> None:
        """Make every op that uses this value use `other`."""
        for user in list(self.uses):
            user.set_operands([other if value is self else value for value in user.operands])


@dataclass(frozen=True, slots=True)
class Field:
    """One line of an op's signature."""

    kind: str  # operand | optional | variadic | attribute | region | result | results
    name: str = ""
    default: Any = None
    required: bool = True


def operand() -> Any:
    """A value that the op reads."""
    return Field("operand")


def optional(*, default: None = None) -> Any:
    """A value that the op may read; written `name=%v`."""
    return Field("optional", required=False)


def variadic() -> Any:
    """Any number of values; written `[%a, %b]`."""
    return Field("variadic")


_MISSING = object()


def attribute(*, default: Any = _MISSING) -> Any:
    """A constant of the op; written `name=value`, left out when it has its default."""
    return Field("attribute", default=default, required=default is _MISSING)


def region(*, kw_only: bool = True) -> Any:
    """A nested block."""
    return Field("region")


def result(*, init: bool = False) -> Any:
    """A value that the op defines."""
    return Field("result", required=False)


def results(*, init: bool = False) -> Any:
    """Any number of values that the op defines."""
    return Field("results", required=False)


def extra(*, default: None, kw_only: bool = True) -> Any:
    """What the constructor of every op takes beside its fields; no part of the signature."""
    return default


OPS: dict[str, type[Op]] = {}
"""Every op class by its name in the text form."""


@dataclass_transform(
    field_specifiers=(operand, optional, variadic, attribute, region, result, results, extra)
)
class _Signature:
    """Base that tells type checkers how an op's constructor follows from its fields."""


class Op(_Signature):
    """An operation: operands, attributes, nested blocks, results. Subclasses declare fields."""

    loc: Location | None = extra(default=None)
    result_types: Sequence[TensorType] | None = extra(default=None)
    op_name: ClassVar[str] = ""
    fields: ClassVar[tuple[Field, ...]] = ()
    terminator: ClassVar[bool] = False
    tokenwise: ClassVar[bool] = False
    """Each token's result depends on that token's operands alone (leading dimensions are free)."""

    def __init_subclass__(
        cls, *, name: str = "", terminator: bool = False, tokenwise: bool = False
    ) -> None:
        super().__init_subclass__()
        cls.op_name, cls.terminator, cls.tokenwise = name, terminator, tokenwise
        own = [
            Field(f.kind, key, f.default, f.required)
            for key, f in vars(cls).items()
            if isinstance(f, Field)
        ]
        cls.fields = (*cls.fields, *own)
        for f in own:
            setattr(cls, f.name, _ACCESSORS[f.kind](f.name))
        if name:
            if name in OPS:
                raise TypeError(f"op {name} is declared twice")
            OPS[name] = cls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        loc: Location | None = kwargs.pop("loc", None)
        result_types: Sequence[TensorType] | None = kwargs.pop("result_types", None)
        names = [f.name for f in self.fields if not f.kind.startswith("result")]
        if len(args) > len(names):
            raise TypeError(f"{self.op_name} takes {len(names)} arguments, not {len(args)}")
        given = dict(zip(names, args, strict=False)) | kwargs
        if unknown := given.keys() - set(names):
            raise TypeError(f"{self.op_name} has no {', '.join(sorted(unknown))}")
        self.loc = loc
        self.parent: Block | None = None
        self.attributes: dict[str, Attribute] = {}
        self.segments: dict[str, slice] = {}
        self.regions: dict[str, Block] = {}
        self.operands: list[Value] = []
        self.results: list[Value] = []
        for f in self.fields:
            self._take(f, given)
        for value in self.operands:
            value.uses[self] = value.uses.get(self, 0) + 1
        types = self.infer() if result_types is None else tuple(result_types)
        self.results = [Value(t, owner=self) for t in types]

    def _take(self, f: Field, given: Mapping[str, Any]) -> None:
        if f.kind.startswith("result"):
            return
        value = given.get(f.name, f.default if f.kind == "attribute" else None)
        if f.required and (value is None or value is _MISSING):
            raise TypeError(f"{self.op_name} needs {f.name}")
        if f.kind == "attribute":
            self.attributes[f.name] = tuple(cast(Any, value)) if isinstance(value, list) else value
        elif f.kind == "region":
            self.regions[f.name] = value
            value.parent = self
        else:
            values = [] if value is None else [value] if isinstance(value, Value) else list(value)
            start = len(self.operands)
            self.operands += values
            self.segments[f.name] = slice(start, len(self.operands))

    def infer(self) -> tuple[TensorType, ...]:
        """The types of the results, from operands, attributes and regions.

        Raises:
            ValueError: operands and attributes don't fit together.
        """
        raise NotImplementedError(f"{self.op_name} needs explicit result types")

    def verify(self) -> None:
        """Check what `infer` and the signature can't say.

        Raises:
            ValueError: the op is wrong; the message says why.
        """

    def introduces(self) -> tuple[str, ...]:
        """Names of dimensions whose size this op defines at run time."""
        return ()

    def __repr__(self) -> str:
        from liquidc.ir.printer import print_op

        return print_op(self)

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    def set_operands(self, values: Sequence[Value]) -> None:
        """Replace all operands, one for one."""
        for value in self.operands:
            value.uses.pop(self, None)
        self.operands = list(values)
        for value in self.operands:
            value.uses[self] = value.uses.get(self, 0) + 1

    def set_attribute(self, name: str, value: Attribute) -> None:
        """Change one attribute of the signature."""
        if name not in self.attributes:
            raise TypeError(f"{self.op_name} has no attribute {name}")
        self.attributes[name] = value

    def detach(self) -> None:
        """Take the op out of its block and of its operands' uses, nested ops included."""
        if self.parent is not None:
            self.parent.ops.remove(self)
        self.forget()

    def forget(self) -> None:
        """Drop the uses that this op and its nested ops make; the block's list is the caller's."""
        self.parent = None
        for value in self.operands:
            value.uses.pop(self, None)
        for block in self.regions.values():
            for op in block.ops:
                op.forget()

    def clone(
        self, mapping: dict[Value, Value] | None = None, *, reinfer: bool = False, **changes: Any
    ) -> Self:
        """A copy that keeps all but `changes`: whatever changes an op does it so.

        Args:
            mapping: old value → new value of operands; gets the results if they are as many.
            reinfer: compute the result types anew instead of copying them.
            changes: what the constructor takes, by name; a block is taken, not copied.
        """
        mapping = {} if mapping is None else mapping
        given: dict[str, Any] = {**self.attributes, "loc": self.loc, **changes}
        for f in self.fields:
            if f.name in self.segments and f.name not in changes:
                values = [mapping.get(v, v) for v in self.operands[self.segments[f.name]]]
                given[f.name] = values if f.kind == "variadic" else values[0] if values else None
            elif f.name in self.regions and f.name not in changes:
                given[f.name] = self.regions[f.name].clone(mapping, reinfer=reinfer)
        if not (reinfer and self.infers()):
            given.setdefault("result_types", [v.type for v in self.results])
        copy = type(self)(**given)
        if len(copy.results) == len(self.results):
            for old, new in zip(self.results, copy.results, strict=True):
                new.name = old.name
                mapping[old] = new
        return copy

    @classmethod
    def infers(cls) -> bool:
        """True if the result types follow from the rest of the op."""
        return cls.infer is not Op.infer

    def walk(self) -> Iterator[Op]:
        """This op and the ops nested in it, in order."""
        yield self
        for block in self.regions.values():
            yield from block.walk()


def _operand_accessor(name: str) -> property:
    return property(lambda self: self.operands[self.segments[name].start])


def _optional_accessor(name: str) -> property:
    def get(self: Op) -> Value | None:
        segment = self.segments[name]
        return self.operands[segment.start] if segment.start < segment.stop else None

    return property(get)


def _result_accessor(name: str) -> property:
    def get(self: Op) -> Value:
        names = [f.name for f in self.fields if f.kind == "result"]
        return self.results[names.index(name)]

    return property(get)


_ACCESSORS: dict[str, Callable[[str], property]] = {
    "operand": _operand_accessor,
    "optional": _optional_accessor,
    "variadic": lambda name: property(lambda self: self.operands[self.segments[name]]),
    "attribute": lambda name: property(lambda self: self.attributes[name]),
    "region": lambda name: property(lambda self: self.regions[name]),
    "result": _result_accessor,
    "results": lambda name: property(lambda self: self.results),
}


AnyOp = TypeVar("AnyOp", bound=Op)


class Block:
    """A list of ops that ends in a terminator, with arguments."""

    def __init__(self, args: Sequence[tuple[str, TensorType]] = ()) -> None:
        self.parent: Op | Function | None = None
        self.args = [Value(t, name, self) for name, t in args]
        self.ops: list[Op] = []

    def append(self, op: AnyOp, *names: str) -> AnyOp:
        """Add `op` at the end; `names` are hints for its results."""
        op.parent = self
        self.ops.append(op)
        for value, name in zip(op.results, names, strict=False):
            value.name = name
        return op

    def insert_before(self, anchor: Op, op: AnyOp) -> AnyOp:
        """Add `op` right before `anchor`."""
        op.parent = self
        self.ops.insert(self.ops.index(anchor), op)
        return op

    @property
    def terminator(self) -> Op:
        """The last op."""
        return self.ops[-1]

    def walk(self) -> Iterator[Op]:
        """All ops of the block and of the blocks nested in it, in order."""
        for op in list(self.ops):
            yield from op.walk()

    def clone(self, mapping: dict[Value, Value], *, reinfer: bool = False) -> Block:
        """A copy; `mapping` gets the values defined here, and may already map the arguments."""
        block = Block()
        for arg in self.args:
            new = mapping.get(arg)
            copy = Value(arg.type if new is None else new.type, arg.name, block)
            block.args.append(copy)
            mapping[arg] = copy
        for op in self.ops:
            block.append(op.clone(mapping, reinfer=reinfer))
        return block


class Function:
    """A named entry point: a block whose arguments and returned values have names."""

    def __init__(self, name: str, args: Sequence[tuple[str, TensorType]]) -> None:
        self.name = name
        self.body = Block(args)
        self.body.parent = self
        self.result_names: tuple[str, ...] = ()

    @property
    def args(self) -> list[Value]:
        """The arguments."""
        return self.body.args

    @property
    def returned(self) -> list[Value]:
        """The values that the function returns, in the order of `result_names`."""
        return self.body.terminator.operands

    def arg(self, name: str) -> Value:
        """The argument `name`.

        Raises:
            KeyError: there is none.
        """
        for value in self.args:
            if value.name == name:
                return value
        raise KeyError(name)

    def clone(self, name: str) -> Function:
        """A copy under another name."""
        copy = Function(name, [])
        copy.body = self.body.clone({})
        copy.body.parent = copy
        copy.result_names = self.result_names
        return copy


@dataclass(slots=True)
class Module:
    """A program: functions, weights as lazy expressions, and facts about the model."""

    name: str
    functions: dict[str, Function] = field(default_factory=dict[str, Function])
    weights: dict[str, WeightExpr] = field(default_factory=dict[str, WeightExpr])
    attributes: dict[str, Attribute] = field(default_factory=dict[str, Attribute])

    def add(self, function: Function) -> Function:
        """Add `function` under its name."""
        self.functions[function.name] = function
        return function

    def walk(self) -> Iterator[Op]:
        """All ops of all functions, in order."""
        for function in self.functions.values():
            yield from function.body.walk()

    def clone(self) -> Module:
        """A copy that shares only immutable things."""
        copy = Module(self.name, {}, dict(self.weights), dict(self.attributes))
        for function in self.functions.values():
            copy.add(function.clone(function.name))
        return copy

"""What makes a module valid. Every rule has a negative test in tests/ir/test_verifier.py.

1. A value is used after its definition, in its block or in one nested there (*scope*).
2. A block ends in its only terminator: `return` in a function, `yield` elsewhere.
3. Result types are what the op infers; attributes are of their declared kind; `Op.verify` holds.
4. A named dimension is known where it is used: from the function's arguments or an op before.
5. A run-time dimension is introduced once in a function.
6. A weight exists and has the type of its use.
7. The function's results are named, once each; every value knows its uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from liquidc.errors import IRError
from liquidc.ir.core import Block, Function, Module, Op, Value
from liquidc.ir.ops import Return, Weight, Yield
from liquidc.ir.ops.control import named_dims
from liquidc.ir.types import Dim, dim_names


def verify(module: Module) -> None:
    """Check the whole module.

    Raises:
        IRError: a rule is broken; the message names the function, the op and the rule.
    """
    for name, expr in module.weights.items():
        if not all(isinstance(size, int) and size > 0 for size in expr.type.shape):
            raise IRError(f"weight @{name}: {expr.type} is empty or has named dimensions")
    for function in module.functions.values():
        _FunctionVerifier(module, function).run()


class _FunctionVerifier:
    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.introduced: set[str] = set()

    def fail(self, op: Op | None, message: str) -> IRError:
        where = f"@{self.function.name}"
        if op is not None:
            source = f" ({op.loc})" if op.loc else ""
            where += f": {op!r}{source}"
        return IRError(f"{where}: {message}")

    def run(self) -> None:
        function = self.function
        if function.name not in self.module.functions:
            raise self.fail(None, "the function is not known under its name")
        names = Counter(arg.name for arg in function.args)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise self.fail(None, f"two arguments are named {repeated[0]}")
        dims = dim_names(dim for arg in function.args for dim in arg.shape)
        self.block(function.body, Return, set(), dims)
        if len(function.result_names) != len(function.returned):
            raise self.fail(function.body.terminator, "every result needs a name")
        if len(set(function.result_names)) != len(function.result_names):
            raise self.fail(function.body.terminator, "two results have the same name")

    def block(self, block: Block, end: type[Op], outer: set[Value], dims: set[str]) -> None:
        """Check a block; `outer` and `dims` are what is visible at its start."""
        visible, dims = outer | set(block.args), set(dims)
        for arg in block.args:
            self.dims_known(None, arg.shape, dims)
        if not block.ops or not isinstance(block.terminator, end):
            owner = block.parent if isinstance(block.parent, Op) else None
            raise self.fail(owner, f"a block must end in {end.op_name}")
        for op in block.ops:
            if op.parent is not block:
                raise self.fail(op, "the op does not know its block")
            if op.terminator and op is not block.terminator:
                raise self.fail(op, f"{op.op_name} may only end a block")
            self.op(op, visible, dims)
            visible.update(op.results)
        if not all(op.results or op.terminator for op in block.ops):
            raise self.fail(None, "an op without results has no effect")

    def op(self, op: Op, visible: set[Value], dims: set[str]) -> None:
        for value, count in Counter(op.operands).items():
            if value not in visible:
                raise self.fail(op, f"%{value.name or '?'} is not visible here")
            if value.uses.get(op) != count:
                raise self.fail(op, f"%{value.name or '?'} does not know this use")
        self.attributes(op)
        for name in op.introduces():
            if name in self.introduced or name in dims:
                raise self.fail(op, f"dimension {name} is introduced twice")
            self.introduced.add(name)
        self.dims_known(op, sorted(named_dims(op)), dims)
        for block in op.regions.values():
            self.block(block, Yield, visible, dims)
        dims.update(op.introduces())
        try:
            inferred = op.infer() if op.infers() else tuple(v.type for v in op.results)
            if inferred != tuple(v.type for v in op.results):
                types = ", ".join(map(str, inferred))
                raise ValueError(f"the result types are not the inferred ones ({types})")
            op.verify()
        except (ValueError, IndexError) as error:
            raise self.fail(op, str(error)) from None
        for value in op.results:
            self.dims_known(op, value.shape, dims)
        if isinstance(op, Weight):
            expr = self.module.weights.get(op.weight)
            if expr is None:
                raise self.fail(op, "there is no such weight")
            if expr.type != op.y.type:
                raise self.fail(op, f"the weight has the type {expr.type}")

    def attributes(self, op: Op) -> None:
        for f in op.fields:
            if f.kind == "attribute" and not _has_kind(type(op), f.name, op.attributes[f.name]):
                raise self.fail(op, f"{f.name} can't be {op.attributes[f.name]!r}")

    def dims_known(self, op: Op | None, shape: Iterable[Dim], dims: set[str]) -> None:
        for name in sorted(dim_names(shape) - dims):
            raise self.fail(op, f"dimension {name} is not known here")


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "Dim": (int, str),
    "DType": (str,),
}


def _has_kind(cls: type[Op], name: str, value: object) -> bool:
    """Whether an attribute's value is of the kind that the class declares."""
    declared = next(
        c.__annotations__[name] for c in cls.__mro__ if name in vars(c).get("__annotations__", {})
    )
    if declared.startswith("tuple["):
        inner = declared.removeprefix("tuple[").removesuffix(", ...]")
        kinds = tuple(kind for part in inner.split(" | ") for kind in _KINDS[part])
        return isinstance(value, tuple) and all(_is(item, kinds) for item in value)
    return _is(value, _KINDS[declared])


def _is(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds)

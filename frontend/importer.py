"""From a graph of `torch.export` to ops of the IR, one node at a time.

`aten` and `semantic_import` hold what each operator becomes; this file walks graphs, keeps the
dimensions' names, follows `torch.cond` into its arms and finds the user's source lines.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import sympy
import torch
from torch import fx, nn
from torch.fx.traceback import annotate_fn, preserve_node_meta
from torch.utils.weak import WeakIdKeyDictionary

from liquidc.errors import UnsupportedError
from liquidc.ir import Block, Dim, DType, Location, Module, Op, TensorType, Value, ops
from liquidc.ir.types import product

DTYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
}

AnyOp = TypeVar("AnyOp", bound=Op)
R = TypeVar("R")
Import = Callable[["Importer", fx.Node], Any]
"""Translates one node: the node's value, or a list of values for an operator with several."""

_ASSERTIONS = ("aten._assert_scalar.default", "aten._assert_tensor_metadata.default")
"""Checks that the tracer adds for sizes and dtypes, which the verifier makes again."""

_SIZES = WeakIdKeyDictionary()
"""Shapes of traced tensors, which take long to read and are read again for every layer alike."""

_PICKS = ("<built-in function getitem>",)
"""Operators whose traced shape may name sizes anew (results of `torch.cond`)."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>[^\n]*)')
_PACKAGE = Path(__file__).resolve().parent.parent
_PLUMBING = (
    "importer.py",
    "parts.py",
    "protocol.py",
    "semantic_import.py",
    "semantic_ops.py",
    "trace.py",
)
"""Files of the frontend whose lines are never the user's."""


@dataclass
class Part:
    """A part of the model that is traced as one graph, and where it stands.

    `label` names its conditionals for people (`layer3`); `conditionals` counts those at its top.
    For a layer: its number, the number of its first gate among all gates, the layers that remain,
    and how many regions each gate has opened so far.
    """

    label: str
    conditionals: int = 0
    layer: int = -1
    gate: int = 0
    remaining: int = 0
    conditionals_seen: int = 0
    gates_seen: int = 0
    regions: Counter[int] = field(default_factory=Counter[int])

    def next_label(self) -> str:
        """The label of the next conditional at the top: of two, attention, then feed-forward."""
        number, self.conditionals_seen = self.conditionals_seen, self.conditionals_seen + 1
        match self.conditionals:
            case 1:
                return self.label
            case 2:
                return f"{self.label}/{('attn', 'ffn')[number]}"
            case _:
                return f"{self.label}/part{number}"


@dataclass
class Importer:
    """Translates one graph into the end of a block.

    Args:
        module: where weights are declared.
        block: where ops are added.
        dims: names of the symbols in the graph's shapes.
        part: which part of the model the graph is.
    """

    module: Module
    block: Block
    dims: dict[str, Dim]
    part: Part
    env: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])

    def run(self, module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """Translate all of `module`; `inputs` are the values of its placeholders, in order.

        Returns:
            What the graph returns, in order.

        Raises:
            UnsupportedError: an operator has no translation.
        """
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(given)
            elif node.op == "get_attr":
                self.env[node] = self._attribute(module, str(node.target))
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                return [self.env.get(arg) for arg in node.args[0]]
        raise UnsupportedError("the traced graph returns nothing")

    def _attribute(self, module: fx.GraphModule, name: str) -> Any:
        thing = getattr(module, name)
        if isinstance(thing, torch.Tensor):
            return self.constant_tensor(thing)
        return thing

    def _call(self, node: fx.Node) -> Any:
        from liquidc.frontend.aten import TABLE
        from liquidc.frontend.semantic_import import SEMANTIC

        fake, name = node.meta.get("val"), str(node.target)
        if isinstance(fake, bool | torch.SymBool) or name in _ASSERTIONS:
            return None
        if isinstance(fake, int | torch.SymInt):
            return self.dim(fake)
        translate = TABLE.get(name) or SEMANTIC.get(name)
        if translate is None:
            raise self.unsupported(node, f"the operator {name} has no translation")
        try:
            result = translate(self, node)
        except ValueError as error:
            raise self.unsupported(node, f"{name}: {error}") from None
        if isinstance(result, Value) and isinstance(fake, torch.Tensor) and name not in _PICKS:
            expected = self.type_of(fake)
            if result.type != expected:
                raise self.unsupported(node, f"{name} became {result.type}, not {expected}")
        return result

    # What translations use

    def weight(self, name: str) -> Value:
        """A weight of the module."""
        expr = self.module.weights[name]
        op = self.emit(ops.Weight(weight=name, result_types=[expr.type]))
        op.y.name = name.removeprefix("model.")
        return op.y

    def arg(self, node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
        """An argument as given: by position, else by name, with nodes replaced by their values."""
        given = node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
        return self.resolve(given)

    def resolve(self, given: Any) -> Any:
        """`given` with every node in it replaced by its value."""
        if isinstance(given, fx.Node):
            return self.env[given]
        if isinstance(given, (list, tuple)):
            return [self.resolve(item) for item in given]
        return given

    def emit(self, op: AnyOp, node: fx.Node | None = None) -> AnyOp:
        """Add an op at the end of the block, at the node's source line."""
        if node is not None:
            found = source_line(node.meta.get("stack_trace"))
            op.loc = found[0] if found else None
        return self.block.append(op)

    def type_of(self, fake: torch.Tensor) -> TensorType:
        """The IR type of a traced tensor.

        Raises:
            UnsupportedError: dtype or a dimension has no name in the IR.
        """
        if fake.dtype not in DTYPES:
            raise UnsupportedError(f"tensors of {fake.dtype} are not supported")
        sizes = _SIZES.get(fake)
        if sizes is None:
            sizes = _SIZES[fake] = tuple(fake.shape)
        return TensorType(DTYPES[fake.dtype], self.shape(sizes))

    def shape(self, sizes: Sequence[Any]) -> tuple[Dim, ...]:
        """Sizes and symbols as IR dimensions."""
        return tuple(self.dim(size) for size in sizes)

    def dim(self, size: Any) -> Dim:
        """A size: an int, or a symbol or product of symbols by its name."""
        if isinstance(size, int):
            return size
        expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        factors = _factors(expr)
        if any(isinstance(factor, str) and factor not in self.dims for factor in factors):
            raise UnsupportedError(f"the size {expr} is no product of the inputs' dimensions")
        named = [self.dims[f] if isinstance(f, str) else f for f in factors]
        return named[0] if len(named) == 1 else product(named)

    def scalar(self, value: float | bool, dtype: DType) -> Value:
        """A constant without dimensions."""
        number = (
            float(value) if dtype.is_float else bool(value) if dtype == DType.BOOL else int(value)
        )
        return self.emit(ops.Constant(value=(number,), result_types=[TensorType(dtype)])).y

    def constant_tensor(self, tensor: torch.Tensor) -> Value:
        """A small tensor that the model made itself.

        Raises:
            UnsupportedError: it is large, or was made on the meta device and has no elements.
        """
        if tensor.device.type == "meta":
            raise UnsupportedError(
                "the model keeps a tensor that is neither a parameter nor a buffer; register it"
            )
        if tensor.numel() > 4096:
            raise UnsupportedError(f"a constant of {tensor.numel()} elements must be a buffer")
        type = TensorType(DTYPES[tensor.dtype], tuple(tensor.shape))
        return self.emit(
            ops.Constant(value=tuple(tensor.flatten().tolist()), result_types=[type])
        ).y

    def cast(self, value: Value, dtype: DType) -> Value:
        """`value` in the element type."""
        return value if value.dtype == dtype else self.emit(ops.Cast(value, to=dtype)).y

    def operand(self, given: Any, dtype: DType) -> Value:
        """A tensor or Python number as a value of the element type."""
        return self.cast(given, dtype) if isinstance(given, Value) else self.scalar(given, dtype)

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """`value` in another shape."""
        if value.shape == tuple(shape):
            return value
        return self.emit(ops.Reshape(value, shape=tuple(shape))).y

    def fill(self, value: float | bool, type: TensorType) -> Value:
        """A tensor of one repeated number."""
        scalar = self.scalar(value, type.dtype)
        return self.emit(ops.Broadcast(scalar, shape=type.shape)).y if type.shape else scalar

    def inner(self, label: str) -> Importer:
        """An importer for a nested block."""
        part = Part(label, layer=self.part.layer, regions=self.part.regions)
        return Importer(self.module, Block(), self.dims, part)

    def arm(self, graph: fx.GraphModule, inputs: Sequence[Any], label: str) -> Block:
        """A branch of `torch.cond` as a block that ends in yield."""
        inner = self.inner(label)
        inner.part.conditionals = count_conditionals(graph)
        outputs = inner.run(graph, inputs)
        inner.block.append(ops.Yield(outputs))
        return inner.block

    def unsupported(self, node: fx.Node, message: str) -> UnsupportedError:
        """The error for `node`, with the user's line."""
        found = source_line(node.meta.get("stack_trace"))
        where = f" at {found[0]}: `{found[1]}`" if found else ""
        return UnsupportedError(f"{message}{where} (docs/ops.md lists what can be compiled)")


def count_conditionals(graph: fx.GraphModule) -> int:
    """How many `torch.cond` stand at the top of a graph."""
    return sum(
        "cond" == getattr(node.target, "name", None) or str(node.target) == "cond"
        for node in graph.graph.nodes
    )


def export(part: nn.Module, args: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    """The graph of `part`, which keeps the semantic operators whole.

    Args:
        part: what is traced.
        args: example arguments.
        shapes: `dynamic_shapes` of `torch.export.export`.

    Raises:
        UnsupportedError: the model can't be traced, or is wrong.
    """
    try:
        # Without preserve_node_meta nodes in the arms of torch.cond lose their source lines.
        with torch.no_grad(), preserve_node_meta():
            return torch.export.export(part, args, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        told = str(error)
        found = source_line("".join(traceback.format_tb(error.__traceback__)) + told)
        where = f" {found[0]}: `{found[1]}`" if found else ""
        lines = [line for line in told.splitlines() if line.strip() and not line.endswith(":")]
        reason = lines[0].strip() if lines else type(error).__name__
        raise UnsupportedError(
            f"torch.export can't trace{where}: {reason} (docs/protocol.md)"
        ) from error


def traced(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, traced with its lines; `torch.export` keeps those of `forward` alone."""
    return annotate_fn({})(function)


@lru_cache(maxsize=4096)
def _factors(expr: Any) -> tuple[Dim, ...]:
    """The numbers and names of symbols whose product a size is."""
    factors = expr.args if expr.is_Mul else (expr,)
    return tuple(int(f) if f.is_Integer else str(f) for f in factors)


@lru_cache(maxsize=4096)  # the ops of a layer are imported again for every layer that is alike
def source_line(stack: str | None) -> tuple[Location, str] | None:
    """The innermost line of the model in a formatted stack, and its code."""
    frames = list(_FRAME.finditer(stack or ""))
    for frame in reversed(frames):
        path = Path(frame["file"])
        if (
            frame["file"].startswith("<")
            or "torch" in path.parts
            or (path.name in _PLUMBING and path.parent.name == "frontend")
        ):
            continue
        return Location(stable_path(path), int(frame["line"])), frame["code"].strip()
    return None


def stable_path(path: Path) -> str:
    """`path` without what differs between machines: from the package, else the file's name."""
    resolved = path.resolve()
    if resolved.is_relative_to(_PACKAGE):
        return resolved.relative_to(_PACKAGE).as_posix()
    return path.name

"""From a graph of `torch.export` to ops of the IR, one node at a time.

`aten` and `semantic_import` hold what each operator becomes; this file walks graphs, keeps the
dimensions' names, follows `torch.cond` into its arms and finds the user's source lines.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from liquidc.errors import UnsupportedError
from liquidc.frontend.functional import ASSERTIONS, WROTE, results, user_inputs
from liquidc.frontend.source_lines import place, source_line
from liquidc.frontend.trace_errors import DATA
from liquidc.ir import Block, Dim, DType, Module, Op, TensorType, Value, ops
from liquidc.ir.types import product

STORED = {
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
"""Element types of tensors as they are stored."""

DTYPES = STORED | dict.fromkeys((torch.float64, torch.float16, torch.bfloat16), DType.F32)
"""Element types of tensors as an engine computes with them: every float is float32."""

NARROW = {torch.float16: DType.F16, torch.bfloat16: DType.BF16}
"""Floats whose rounding is kept: each result is rounded to them, as PyTorch does."""

_MOVES = (ops.Reshape, ops.Transpose, ops.Slice, ops.Concat, ops.Gather, ops.Embed)
"""Ops that round nothing."""

_LARGEST = float(torch.finfo(torch.float32).max)

AnyOp = TypeVar("AnyOp", bound=Op)
Import = Callable[["Importer", fx.Node], Any]
"""Translates one node: the node's value, or a list of values for an operator with several."""

_SIZES = WeakIdKeyDictionary()
"""Shapes of traced tensors, which take long to read and are read again for every layer alike."""

_PICKS = ("<built-in function getitem>",)
"""Operators whose traced shape may name sizes anew (results of `torch.cond`)."""


_ARITHMETIC: dict[Any, tuple[DType | None, Callable[..., Op]]] = {
    operator.add: (None, ops.Add),
    operator.sub: (None, ops.Sub),
    operator.mul: (None, ops.Mul),
    operator.neg: (DType.F32, ops.Neg),
    operator.truediv: (DType.F32, ops.Div),
    torch.sym_float: (DType.F32, lambda x: ops.Cast(x, to=DType.F32)),
    torch.sym_min: (None, ops.Minimum),
    torch.sym_max: (None, ops.Maximum),
    torch._sym_sqrt: (DType.F32, ops.Sqrt),  # pyright: ignore
}
"""Operators on numbers made from sizes; the element type of operands if it is not the result's."""


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

    def run_program(
        self,
        program: torch.export.ExportedProgram,
        inputs: Sequence[Any],
        weight: Callable[[str], Value] | None = None,
    ) -> list[Any]:
        """Translate an exported program; returns what its function returned, in order.

        Args:
            program: what was exported.
            inputs: the values of its input tensors, in order.
            weight: gives the value of a parameter or buffer by its name in the program.

        Raises:
            UnsupportedError: as `run`; or it uses a large tensor that has no name.
        """
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        given = dict(zip((node.name for node in user_inputs(program)), inputs, strict=True))
        values: list[Value | None] = []
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names and weight is not None:
                values.append(weight(names[node.name]) if node.users else None)
            elif node.name in constants and node.users:
                tensor = program.constants[constants[node.name]]
                values.append(self._constant_of(node, tensor))
            else:
                values.append(given.get(node.name))
        return self.run(program.graph_module, values)[-len(results(program)) :]

    def _constant_of(self, node: fx.Node, tensor: Any) -> Value:
        try:
            return self.constant_tensor(tensor)
        except ValueError as error:
            raise self.unsupported(next(iter(node.users)), str(error)) from None

    def _attribute(self, module: fx.GraphModule, name: str) -> Any:
        thing = getattr(module, name)
        if isinstance(thing, torch.Tensor):
            return self.constant_tensor(thing)
        return thing

    def _call(self, node: fx.Node) -> Any:
        from liquidc.frontend.operators import OPERATORS

        fake, name = node.meta.get("val"), str(node.target)
        if isinstance(fake, bool | torch.SymBool) or name in ASSERTIONS:
            return None
        translate = OPERATORS.get(name)
        try:
            if isinstance(fake, int | float | torch.SymInt | torch.SymFloat):
                return self._number(node, fake)
            if translate is None:
                called = node.meta.get(WROTE, name)
                raise self.unsupported(node, f"the operator {called} has no translation")
            result = translate(self, node)
            if isinstance(result, Value) and isinstance(fake, torch.Tensor) and name not in _PICKS:
                expected = self.type_of(fake)
                if result.type != expected:
                    raise ValueError(f"it became {result.type}, not {expected}")
                if result.op is not None:
                    result.op.verify()
                result = self._rounded(node, result, fake.dtype)
        except ValueError as error:
            raise self.unsupported(node, f"{name}: {error}") from None
        except (TypeError, LookupError, AttributeError) as error:  # arguments of an unknown form
            raise self.unsupported(node, f"{name} has no translation as it is called") from error
        return result

    def _rounded(self, node: fx.Node, value: Value, dtype: torch.dtype) -> Value:
        """A node's result rounded to the 16-bit float that it has in PyTorch."""
        if dtype not in NARROW:
            return value
        given = [(self.env.get(n), n.meta.get("val")) for n in node.all_input_nodes]
        read = {t.dtype for _, t in given if isinstance(t, torch.Tensor) and t.is_floating_point()}
        moved = isinstance(value.op, _MOVES) or any(v is value for v, _ in given)
        if moved and read == {dtype}:
            return value
        return self.cast(self.emit(ops.Cast(value, to=NARROW[dtype]), node).y, DType.F32)

    def _number(self, node: fx.Node, fake: Any) -> Dim | float | Value:
        """A number that Python computed from sizes: a dimension, or else a scalar.

        Raises:
            ValueError: the operator is not known for sizes.
        """
        if isinstance(fake, int | float):
            return fake
        if isinstance(fake, torch.SymInt):
            factors = _factors(fake.node.expr)
            if all(isinstance(factor, int) or factor in self.dims for factor in factors):
                return self.dim(fake)
        dtype = DType.I64 if isinstance(fake, torch.SymInt) else DType.F32
        if str(node.target).partition(".default")[0] in ("aten.item", "aten._local_scalar_dense"):
            raise ValueError(DATA)
        if node.target not in _ARITHMETIC:
            raise ValueError("numbers made from sizes are added, multiplied and divided alone")
        inner, build = _ARITHMETIC[node.target]
        operands = [self.operand(self.resolve(arg), inner or dtype) for arg in node.args]
        return self.cast(self.emit(build(*operands), node).results[0], dtype)

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
            ValueError: dtype or a dimension has no name in the IR.
        """
        if fake.dtype not in DTYPES:
            raise ValueError(f"tensors of {fake.dtype} are not supported")
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
            text = " ".join(str(self.dims.get(part, part)) for part in str(expr).split())
            raise ValueError(f"the size {text} is no product of the inputs' dimensions")
        named = [self.dims[f] if isinstance(f, str) else f for f in factors]
        return named[0] if len(named) == 1 else product(named)

    def scalar(self, value: float | bool, dtype: DType) -> Value:
        """A constant without dimensions."""
        if dtype.is_float and math.isfinite(value):  # of a wider float, such as finfo.min
            value = min(max(value, -_LARGEST), _LARGEST)
        number = (
            float(value) if dtype.is_float else bool(value) if dtype == DType.BOOL else int(value)
        )
        return self.emit(ops.Constant(value=(number,), result_types=[TensorType(dtype)])).y

    def constant_tensor(self, tensor: torch.Tensor) -> Value:
        """A small tensor that the model made itself.

        Raises:
            ValueError: it is large, of a dtype without a name, or has no elements.
        """
        if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            raise ValueError(
                "the model keeps a tensor that is neither a parameter nor a buffer: register it"
            )
        if tensor.numel() > 4096:
            raise ValueError(
                f"the model uses a tensor of shape {list(tensor.shape)} that is neither a "
                "parameter nor a buffer: register it"
            )
        type = self.type_of(tensor)
        return self.emit(
            ops.Constant(value=tuple(tensor.flatten().tolist()), result_types=[type])
        ).y

    def cast(self, value: Value, dtype: DType) -> Value:
        """`value` in the element type."""
        return value if value.dtype == dtype else self.emit(ops.Cast(value, to=dtype)).y

    def operand(self, given: Any, dtype: DType) -> Value:
        """A tensor, a Python number or a dimension's name as a value of the element type."""
        if isinstance(given, str):
            given = self.emit(ops.Size(dim=given)).y
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
        where = place(node.meta.get("stack_trace"))
        where = f" at {where}" if where else ""
        return UnsupportedError(f"{message}{where} (docs/ops.md lists what can be compiled)")


def count_conditionals(graph: fx.GraphModule) -> int:
    """How many `torch.cond` stand at the top of a graph."""
    return sum(
        "cond" == getattr(node.target, "name", None) or str(node.target) == "cond"
        for node in graph.graph.nodes
    )


@lru_cache(maxsize=4096)
def _factors(expr: Any) -> tuple[Dim, ...]:
    """The numbers and names of symbols whose product a size is."""
    factors = expr.args if expr.is_Mul else (expr,)
    return tuple(int(f) if f.is_Integer else str(f) for f in factors)

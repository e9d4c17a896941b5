"""An ONNX graph under construction, and the graphs of its conditionals' arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from liquidc.backends.base import Choices
from liquidc.errors import UnsupportedError
from liquidc.ir import Block, Dim, DType, Module, Op, Value, ops
from liquidc.ir.regions import Key
from liquidc.ir.types import dim_names
from liquidc.ir.weights import WeightExpr

OPSET = 24
IR_VERSION = 11
CONTRIB = "com.microsoft"
ELEMENT: dict[DType, int] = {
    DType.F64: TensorProto.DOUBLE,
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
    DType.I64: TensorProto.INT64,
    DType.I32: TensorProto.INT32,
    DType.I8: TensorProto.INT8,
    DType.U8: TensorProto.UINT8,
    DType.BOOL: TensorProto.BOOL,
}
Form = tuple[int, tuple[int, ...]]


@dataclass
class Shared:
    """What a graph and its arms have in common.

    `weights` are stored beside the model, `constants` inside it; `counts` numbers names,
    `layers` says where experts belong, `witnesses` by which op a region's tokens are counted,
    `forms` the element type and shape of weights that are no plain tensors. `emit` adds the nodes
    of a block. Without `branching` there is no If.
    """

    module: Module
    emit: Callable[[Graph, Block], None]
    branching: bool = True
    choices: Choices = field(default_factory=Choices)
    weights: dict[str, WeightExpr] = field(default_factory=dict[str, WeightExpr])
    constants: dict[Any, str] = field(default_factory=dict[Any, str])
    initializers: list[onnx.TensorProto] = field(default_factory=list[onnx.TensorProto])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    layers: dict[Op, int] = field(default_factory=dict[Op, int])
    witnesses: dict[Op, Key] = field(default_factory=dict[Op, Key])
    forms: dict[str, Form] = field(default_factory=dict[str, Form])

    def unique(self, name: str) -> str:
        """`name`, with a number from its second use on."""
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        return f"{name}_{count}" if count else name


class Graph:
    """One graph: the model's, or an arm that sees the names of the graphs around it.

    Args:
        shared: of the whole model.
        prefix: of the names of its nodes (`layer3/run`).
        parent: the graph around an arm.
    """

    def __init__(self, shared: Shared, prefix: str = "", parent: Graph | None = None) -> None:
        self.shared, self.prefix, self.parent = shared, prefix, parent
        self.nodes: list[onnx.NodeProto] = []
        self.names: dict[Value, str] = {}
        self.memo: dict[Any, Any] = {}
        self.dims: dict[str, str] = {}
        self.wanted: dict[Value, str] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        count: int = 1,
        *,
        domain: str = "",
        name: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> Any:
        """Add a node; the name of its output, or a list of names."""
        name = self.shared.unique(name or (f"{self.prefix}/{kind}" if self.prefix else kind))
        outs = list(outputs or [f"{name}:{i}" for i in range(count)])
        self.nodes.append(
            helper.make_node(kind, list(inputs), outs, name=name, domain=domain, **attributes)
        )
        return outs[0] if len(outs) == 1 else outs

    def contrib(self, kind: str, inputs: Sequence[str], count: int = 1, **attributes: Any) -> Any:
        """A node of the domain com.microsoft."""
        return self.op(kind, inputs, count, domain=CONTRIB, **attributes)

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant of the model."""
        array: NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared.constants:
            name = f"const_{len(self.shared.constants)}"
            self.shared.constants[key] = name
            self.shared.initializers.append(numpy_helper.from_array(array, name))
        return self.shared.constants[key]

    def weight(self, name: str, expert: int | None = None) -> str:
        """A weight of the IR module, or one expert's part of it, as an initialiser of its own."""
        name, expr = self.weight_expr(name, expert)
        self.shared.weights.setdefault(name, expr)
        return name

    def weight_expr(self, name: str, expert: int | None = None) -> tuple[str, WeightExpr]:
        """What a weight is called, and what it holds; or one expert's part of it."""
        expr = self.shared.module.weights[name]
        return (name, expr) if expert is None else (f"{name}.{expert}", expr.entry(expert))

    def view(self, name: str, expr: WeightExpr, element: int, shape: Sequence[int]) -> str:
        """The bytes of `expr`, as an initialiser of another element type and shape.

        The name must be no weight's of the module: both may be stored.
        """
        self.shared.weights.setdefault(name, expr)
        self.shared.forms[name] = (element, tuple(shape))
        return name

    def name(self, value: Value) -> str:
        """The ONNX name of an IR value."""
        graph: Graph | None = self
        while graph is not None:
            if value in graph.names:
                return graph.names[value]
            graph = graph.parent
        if isinstance(value.op, ops.Weight):
            return self.weight(value.op.weight)
        raise UnsupportedError(f"onnxruntime: %{value.name} was not lowered before its use")

    def expert(self, value: Value, expert: int | None) -> str:
        """A value, or one expert's entry of it; a weight's entry is stored by itself."""
        if isinstance(value.op, ops.Weight):
            return self.weight(value.op.weight, expert)
        name = self.name(value)
        return name if expert is None else self.op("Gather", [name, self.const(expert)])

    def remember(self, key: Any) -> Any:
        """Something made earlier in this graph or one around it; None if nothing."""
        graph: Graph | None = self
        while graph is not None:
            if key in graph.memo:
                return graph.memo[key]
            graph = graph.parent
        return None

    def size(self, dim: Dim) -> str:
        """The size of a dimension, i64[1]."""
        if isinstance(dim, int):
            return self.const([dim])
        parts = dim.split("*")
        if len(parts) > 1:
            first, *others = (self.size(int(p) if p.isdigit() else p) for p in parts)
            for factor in others:
                first = self.once("Mul", [first, factor])
            return first
        graph: Graph | None = self
        while graph is not None:
            if dim in graph.dims:
                return graph.dims[dim]
            graph = graph.parent
        raise UnsupportedError(f"onnxruntime: the size of dimension {dim} is not known")

    def shape(self, dims: Sequence[Dim]) -> str:
        """A shape, i64[rank]."""
        if not dim_names(dims):
            return self.const(list(dims))
        return self.once("Concat", [self.size(dim) for dim in dims], axis=0)

    def once(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """A node that is made once in this graph and what it sees."""
        key = (kind, *inputs)
        known = self.remember(key)
        if known is None:
            known = self.memo[key] = self.op(kind, inputs, **attributes)
        return known

    def reshape(self, x: str, old: Sequence[Dim], new: Sequence[Dim]) -> str:
        """Reshape, with a constant shape wherever one says it."""
        if tuple(old) == tuple(new):
            return x
        source, dims = self.remember(("source", x)) or ("", None)
        if dims == tuple(new):
            return source
        if dims is not None and len(dims) == 2 and len(new) == 3 and dims[-1] == new[-1]:
            return self.unflat(source, new)
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        rest = new[same:]
        if sum(isinstance(dim, str) for dim in rest) <= 1:
            target = [0] * same + [-1 if isinstance(dim, str) else dim for dim in rest]
            return self.op("Reshape", [x, self.const(target)])
        return self.op("Reshape", [x, self.shape(new)], allowzero=1)

    def flat(self, x: str, old: Sequence[Dim]) -> str:
        """The leading dimensions of x made one: [-1, last]."""
        if len(old) == 2:
            return x
        known = self.remember(("flat", x))
        if known is None:
            known = self.memo["flat", x] = self.op("Reshape", [x, self.const([-1, old[-1]])])
        return known

    def unflat(self, x: str, dims: Sequence[Dim]) -> str:
        """Rows [-1, last] in their shape, which `flat` takes back; nobody has to use it.

        A size in it may be 0, of tokens that an expert has not got.
        """
        if len(dims) == 2:
            return x
        y = self.op("Reshape", [x, self.shape(dims)], allowzero=1)
        self.memo["flat", y] = x
        return y

    def viewed(self, x: str, old: Sequence[Dim], new: Sequence[Dim]) -> str:
        """A value of the shape `old` in the shape `new`; `reshape` takes it back."""
        y = self.reshape(x, old, new)
        if y != x:
            self.memo["source", y] = (x, tuple(old))
        return y

    def lead(self, x: str, shape: Sequence[Dim], *, make: bool = True) -> str:
        """X with one more dimension of size 1 in front; empty if nobody made it and `make` is off.

        What gates decide is made so, for all gates are stacked in the end.
        """
        source, dims = self.remember(("source", x)) or ("", None)
        if dims == (1, *shape):
            return source
        known = self.remember(("lead", x))
        if known is None and make:
            known = self.memo["lead", x] = self.op("Reshape", [x, self.shape((1, *shape))])
        return known or ""

    def root(self) -> Graph:
        """The model's graph, which every arm sees."""
        graph = self
        while graph.parent is not None:
            graph = graph.parent
        return graph

    def arm(self, prefix: str) -> Graph:
        """An arm of a conditional."""
        return Graph(self.shared, prefix, self)

    def conditional(self, cond: str, then: Graph, otherwise: Graph, count: int, **kw: Any) -> Any:
        """An If over two arms that were closed by `finish`."""
        arms = {"then_branch": then.memo["graph"], "else_branch": otherwise.memo["graph"]}
        return self.op("If", [cond], count, **arms, **kw)

    def finish(self, outputs: Sequence[str]) -> None:
        """Close an arm: what it did not make itself, or yields twice, goes through Identity."""
        made = {name for node in self.nodes for name in node.output}
        outs: list[str] = []
        for name in outputs:
            fresh = name in made and name not in outs
            outs.append(name if fresh else self.op("Identity", [name]))
        infos = [onnx.ValueInfoProto(name=name) for name in outs]
        title = self.shared.unique(self.prefix or "graph")
        self.memo["graph"] = helper.make_graph(self.nodes, title, [], infos)

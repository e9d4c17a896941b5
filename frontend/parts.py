"""The parts of a model as graphs of `torch.export`: embedding, each distinct layer, head."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from liquidc.frontend.importer import DTYPES, Importer, Part, count_conditionals, export, traced
from liquidc.frontend.protocol import LayerCache, Step
from liquidc.ir import Dim, Function, Module, TensorType, Value
from liquidc.ir.weights import Stored, WeightExpr
from liquidc.ir.weights import cast as cast_weight

B, T, S, P = "B", "T", "S", "P"
SIZES = {B: 3, T: 5, S: 7, P: 2}
"""Names of the dimensions known at run time, and the sizes with which they are traced."""


@dataclass
class Graph:
    """A traced part: its graph, the names of its parameters, and the names of its symbols."""

    program: torch.export.ExportedProgram
    dims: dict[str, str]

    @property
    def conditionals(self) -> int:
        """How many `torch.cond` stand at its top."""
        return count_conditionals(self.program.graph_module)


class PartTracer:
    """Weights by name, and parts as graphs."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, WeightExpr] | None, name: str
    ) -> None:
        self.model = model
        self.module = Module(name)
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.tensors = tensors
        self.weights = weights

    def export(
        self, part: nn.Module, args: Sequence[tuple[Sequence[Dim], torch.dtype] | None]
    ) -> Graph:
        """Trace `part` on meta tensors of the given shapes; names stand for symbols."""
        named = {dim: torch.export.Dim(dim) for dim in SIZES}
        tensors: list[Tensor | None] = []
        dynamic: list[dict[int, Any] | None] = []
        for spec in args:
            if spec is None:
                tensors.append(None)
                dynamic.append(None)
                continue
            shape, dtype = spec
            known = [SIZES[dim] if isinstance(dim, str) else dim for dim in shape]
            tensors.append(torch.empty(known, dtype=dtype, device="meta"))
            dynamic.append({i: named[dim] for i, dim in enumerate(shape) if isinstance(dim, str)})
        program = export(part, (tuple(tensors),), (tuple(dynamic),))
        dims: dict[str, str] = {}
        specs = [spec for spec in args if spec is not None]
        for node, spec in zip(user_inputs(program), specs, strict=True):
            for size, dim in zip(node.meta["val"].shape, spec[0], strict=True):
                if isinstance(dim, str):
                    dims[str(size)] = dim
        return Graph(program, dims)

    def inline(
        self,
        function: Function,
        graph: Graph,
        inputs: Sequence[Value],
        part: Part,
        prefix: str,
        bind: Mapping[str, Dim],
    ) -> list[Value]:
        """Add the graph's ops to `function`, with its parameters under `prefix`."""
        dims = {symbol: bind.get(name, name) for symbol, name in graph.dims.items()}
        part.conditionals = graph.conditionals
        importer = Importer(self.module, function.body, dims, part)
        signature = graph.program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        given = iter(inputs)
        values: list[Value | None] = []
        for node in graph.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                path = prefix + names[node.name].removeprefix("part.")
                values.append(self.weight(importer, path) if node.users else None)
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                constant = signature.inputs_to_lifted_tensor_constants[node.name]
                tensor = cast(torch.Tensor, graph.program.constants[constant])
                values.append(importer.constant_tensor(tensor))
            else:
                values.append(next(given) if node.meta.get("val") is not None else None)
        return importer.run(graph.program.graph_module, values)

    def weight(self, importer: Importer, name: str) -> Value:
        """A parameter or buffer as a weight, in the model's dtype."""
        if name not in self.module.weights:
            tensor = self.tensors[name]
            dtype = DTYPES[tensor.dtype]
            if self.weights is None:
                expr: WeightExpr = Stored(name, TensorType(dtype, tuple(tensor.shape)))
            else:
                expr = self.weights[name]
            self.module.weights[name] = cast_weight(expr, dtype)
        return importer.weight(name)


class Call(nn.Module):
    """A method of a module as a function of a tuple of tensors."""

    def __init__(self, part: Any, method: str = "__call__") -> None:
        super().__init__()
        self.part, self.method = part, method

    def forward(self, args: tuple[Any, ...]) -> Any:
        """The result, in a tuple."""
        return (traced(getattr(self.part, self.method))(*args),)


@dataclass
class Notes:
    """How many gates a traced layer has, and whether it records experts, keys and values."""

    gates: int = 0
    records: tuple[bool, bool] = (False, False)


class LayerCall(nn.Module):
    """A layer as a function of tensors; notes how many gates it has and what it records."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        # An object, since torch.export takes back what forward assigns to attributes.
        self.noted = Notes()

    def forward(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """State, cache, executed layers, then gates, experts, keys and values as recorded."""
        x, positions, valid, force, bias, min_depth, executed, key, value, length, *below = args
        step = Step(positions, valid, force, bias, min_depth, executed, remaining=1)
        step.below = None if below[0] is None else (below[0], below[1])
        y, cache = self.part(x, step, LayerCache(key, value, length))
        records: list[Tensor] = [t for gate in step.gates for t in gate]
        self.noted.gates = len(step.gates)
        self.noted.records = (step.experts is not None, step.kv is not None)
        records += [] if step.experts is None else [step.experts]
        records += [] if step.kv is None else list(step.kv)
        return (y, *cache, step.executed_after(), *records)


MAX_GATES = 8
"""Gates that one layer may have."""


class Identity:
    """An object as a key: equal to itself alone, and kept alive so that its id stays its own."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def fingerprint(module: nn.Module) -> Hashable:
    """What a module's trace depends on: classes, attributes, shapes, ties; not its weights.

    Two modules with equal fingerprints are traced once. An attribute that is neither plain data nor
    a tensor of the module is compared by identity.
    """
    first: dict[int, int] = {}
    named = (module.named_parameters, module.named_buffers)
    tensors = [t for tensors in named for _, t in tensors(remove_duplicate=False)]
    ties = tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))
    return (_of_module(module), ties)


def _of_module(module: nn.Module) -> Hashable:
    own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    own |= {k: tuple(vars(module)[k].values()) for k in _HOOKS}
    plain = tuple((k, _plain(own[k])) for k in sorted(own))
    tensors = [
        (name, tuple(t.shape), t.dtype)
        for named in (module.named_parameters, module.named_buffers)
        for name, t in named(recurse=False)
    ]
    absent = tuple(name for name, t in module._parameters.items() if t is None)  # pyright: ignore
    children = tuple((name, _of_module(child)) for name, child in module.named_children())
    return (type(module), plain, tuple(tensors), absent, children)


def _plain(value: Any) -> Hashable:
    """A key that is equal for equal plain data; for anything else, the object itself."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return (type(value).__name__, repr(value))
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        return (type(items).__name__, *(_plain(item) for item in items))
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return ("dict", *((_plain(k), _plain(v)) for k, v in items))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return (type(value), *((f.name, _plain(getattr(value, f.name))) for f in fields))
    return Identity(value)


def to_meta(part: nn.Module) -> nn.Module:
    """The module with its tensors on the meta device; the model itself stays as it is."""
    if all(t.device.type == "meta" for t in part.parameters()):
        return part
    import copy

    memo = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=False)
        for t in part.parameters()
    }
    return copy.deepcopy(part, cast("dict[int, Any]", memo)).to("meta")


def user_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    """The placeholders of tensors that the caller gives."""
    names = set(program.graph_signature.user_inputs)
    return [
        node
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in names
        and isinstance(node.meta.get("val"), Tensor)
    ]


def outputs(program: torch.export.ExportedProgram) -> list[Tensor]:
    """The traced tensors that a part returns."""
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return [node.meta["val"] for node in output.args[0]]

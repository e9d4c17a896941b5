"""The parts of a model as graphs of `torch.export`: embedding, each distinct layer, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from liquidc.errors import UnsupportedError
from liquidc.frontend.exporting import Traced, export, traced
from liquidc.frontend.functional import user_inputs
from liquidc.frontend.importer import DTYPES, STORED, Importer, Part, count_conditionals
from liquidc.frontend.prepare import StateCheck, named_tensors, prepared
from liquidc.frontend.protocol import LayerCache, Step
from liquidc.frontend.sizes import SizeLimits
from liquidc.ir import Dim, Function, Module, TensorType, Value, verify
from liquidc.ir.weights import Stored, WeightExpr
from liquidc.ir.weights import cast as cast_weight

B, T, S, P = "B", "T", "S", "P"
SIZES = {B: 3, T: 5, S: 7, P: 2}
"""Names of the dimensions known at run time, and the sizes with which they are traced."""

MAX_GATES = 8
"""Gates that one layer may have."""


@dataclass
class Graph:
    """A traced part: its graph, the names of its symbols, and the largest sizes by those names."""

    program: torch.export.ExportedProgram
    dims: dict[str, str]
    limits: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def conditionals(self) -> int:
        """How many `torch.cond` stand at its top."""
        return count_conditionals(self.program.graph_module)


class PartTracer:
    """Weights by name, and parts as graphs."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, WeightExpr] | None, name: str
    ) -> None:
        self.model = prepared(model)
        self.module = Module(name)
        self.tensors = named_tensors(model)
        self.weights = weights
        device = {t.device for t in self.tensors.values()} or {torch.device("cpu")}
        self.device = device.pop() if len(device) == 1 else torch.device("cpu")
        self.limits: dict[str, int] = {}

    def export(
        self, part: Traced, args: Sequence[tuple[Sequence[Dim], torch.dtype] | None]
    ) -> Graph:
        """Trace `part` on tensors of the given shapes, where names stand for any size.

        Raises:
            UnsupportedError: the model can't be traced.
        """
        specs = [spec for spec in args if spec is not None]
        tensors = tuple(None if spec is None else self._example(*spec) for spec in args)
        try:
            program = export(part, (tensors,), (self._dynamic(args),))
        except SizeLimits as limited:
            if set(limited.most) != {T}:
                raise
            part.limits = limited.most
            program = export(part, (tensors,), (self._dynamic(args, limited.traced),))
        _refuse_changed_inputs(program, part)
        dims: dict[str, str] = {}
        for node, spec in zip(user_inputs(program), specs, strict=True):
            for size, dim in zip(node.meta["val"].shape, spec[0], strict=True):
                if isinstance(dim, str):
                    dims[str(size)] = dim
        return Graph(program, dims, part.limits)

    def _example(self, shape: Sequence[Dim], dtype: torch.dtype) -> Tensor:
        known = [SIZES[dim] if isinstance(dim, str) else dim for dim in shape]
        return torch.zeros(known, dtype=dtype, device=self.device)

    def _dynamic(
        self,
        args: Sequence[tuple[Sequence[Dim], torch.dtype] | None],
        most: Mapping[str, int] | None = None,
    ) -> tuple[dict[int, Any] | None, ...]:
        """`dynamic_shapes` of `torch.export`: names stand for symbols, up to a size."""
        named = {dim: torch.export.Dim(dim, max=(most or {}).get(dim)) for dim in SIZES}
        return tuple(
            None
            if spec is None
            else {i: named[dim] for i, dim in enumerate(spec[0]) if isinstance(dim, str)}
            for spec in args
        )

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
        for dim, most in graph.limits.items():
            self.limits[dim] = min(most, self.limits.get(dim, most))
        part.conditionals = graph.conditionals
        importer = Importer(self.module, function.body, dims, part)

        def weight(name: str) -> Value:
            return self.weight(importer, prefix + name.removeprefix("part."))

        return importer.run_program(graph.program, inputs, weight)

    def weight(self, importer: Importer, name: str) -> Value:
        """A parameter or buffer as a weight; floats become float32."""
        if name not in self.module.weights:
            tensor = self.tensors[name]
            if tensor.dtype not in STORED:
                raise UnsupportedError(f"{name}: tensors of {tensor.dtype} are not supported")
            if self.weights is None:
                type = TensorType(STORED[tensor.dtype], tuple(tensor.shape))
                expr: WeightExpr = Stored(name, type)
            else:
                expr = self.weights[name]
            self.module.weights[name] = cast_weight(expr, DTYPES[tensor.dtype])
        return importer.weight(name)

    def check_result(self, value: Value, method: str, what: str, lead: tuple[Dim, ...]) -> None:
        """Refuse a result that is no float [*lead, D] with a known D.

        Raises:
            UnsupportedError: it is something else.
        """
        *leading, width = value.shape or ("",)
        if not value.dtype.is_float or tuple(leading) != lead or not isinstance(width, int):
            dims = ", ".join(map(str, lead))
            raise UnsupportedError(
                f"{type(self.model).__name__}.{method} gives {value.type}; liquidc needs the "
                f"{what} of every token, f32[{dims}, {'V' if what == 'logits' else 'D'}]"
            )

    def finish(self) -> Module:
        """The module, checked, with the number of tokens that it serves if that has a limit.

        Raises:
            IRError: it is not valid.
        """
        if T in self.limits:
            self.module.attributes["max_positions"] = self.limits[T]
        verify(self.module)
        return self.module


class Call(Traced):
    """A method of a module as a function of a tuple of tensors.

    Args:
        part: the module.
        method: its name.
        wanted: what the tensor among its results is called, "logits" or "states".
    """

    def __init__(self, part: Any, method: str = "__call__", wanted: str = "logits") -> None:
        super().__init__()
        self.part, self.method, self.wanted = part, method, wanted

    def call(self, *args: Any) -> Any:
        """The result, in a tuple."""
        state = StateCheck(self.part)
        result = traced(getattr(self.part, self.method))(*args)
        state.refuse_changes()
        return (one_tensor(result, self.wanted, f"{type(self.part).__name__}.{self._name}"),)

    @property
    def _name(self) -> str:
        return "forward" if self.method == "__call__" else self.method


@dataclass
class Notes:
    """How many gates a traced layer has, and whether it records experts, keys and values."""

    gates: int = 0
    records: tuple[bool, bool] = (False, False)


class LayerCall(Traced):
    """A layer as a function of tensors; notes how many gates it has and what it records."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        # An object, since torch.export takes back what forward assigns to attributes.
        self.noted = Notes()

    def call(self, *args: Any) -> tuple[Tensor, ...]:
        """State, cache, executed layers, then gates, experts, keys and values as recorded."""
        x, positions, valid, force, bias, min_depth, executed, key, value, length, *below = args
        step = Step(positions, valid, force, bias, min_depth, executed, remaining=1)
        step.below = None if below[0] is None else (below[0], below[1])
        before = LayerCache(key, value, length)
        state = StateCheck(self.part)
        result = self.part(x, step, before)
        state.refuse_changes()
        y, cache = _layer_result(result, x, before, type(self.part).__name__)
        records: list[Tensor] = [t for gate in step.gates for t in gate]
        self.noted.gates = len(step.gates)
        self.noted.records = (step.experts is not None, step.kv is not None)
        records += [] if step.experts is None else [step.experts]
        records += [] if step.kv is None else list(step.kv)
        return (y, *cache, step.executed_after(), *records)


def _layer_result(
    result: Any, x: Tensor, before: LayerCache, name: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The state and the cache that a layer returned.

    Raises:
        UnsupportedError: it returned something else.
    """
    pair = cast("Sequence[Any]", result) if isinstance(result, tuple | list) else ()
    if len(pair) != 2 or not isinstance(pair[1], tuple | list) or len(pair[1]) != 3:
        raise UnsupportedError(
            f"{name}.forward returns {_kind(result)} instead of (x, cache), with a LayerCache"
        )
    y = one_tensor(pair[0], "states", f"{name}.forward")
    after = tuple(one_tensor(t, "tensors", f"{name}.forward") for t in pair[1])
    names = ("x", "key", "value", "length")
    for what, new, old in zip(names, (y, *after), (x, *before), strict=True):
        if new.shape != old.shape or DTYPES.get(new.dtype) != DTYPES.get(old.dtype):
            raise UnsupportedError(
                f"{name}.forward takes {what} as {_kind(old)} and returns {_kind(new)}"
            )
    return y, after


def one_tensor(result: Any, wanted: str, where: str) -> Tensor:
    """The tensor that a function returns: alone, by name, as the only one, or first in a tuple.

    Args:
        result: a tensor, tuple, dict or dataclass.
        wanted: the name to look for.
        where: what returned it, for the message.

    Raises:
        UnsupportedError: there is no such tensor.
    """
    named = _fields(result)
    if isinstance(named.get(wanted), Tensor):
        return named[wanted]
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if isinstance(result, tuple | list) and result:
        return one_tensor(result[0], wanted, where)
    raise UnsupportedError(f"{where} returns {_kind(result)}; liquidc needs a tensor, the {wanted}")


def _fields(result: Any) -> dict[str, Any]:
    """The parts of a result by name; those of a tuple are numbered."""
    if isinstance(result, Tensor):
        return {"": result}
    if isinstance(result, Mapping):
        return dict(cast("Mapping[str, Any]", result))
    if is_dataclass(result) and not isinstance(result, type):
        return {f.name: getattr(result, f.name) for f in fields(result)}
    if isinstance(result, tuple | list):
        parts = cast("Sequence[Any]", result)
        names = getattr(result, "_fields", [str(i) for i in range(len(parts))])
        return dict(zip(names, parts, strict=True))
    return {}


def _kind(result: Any) -> str:
    """A result for a message: `float32[…, …, 48]`, `a dict of logits, loss`."""
    if isinstance(result, Tensor):
        sizes = ", ".join(str(n) if type(n) is int else "…" for n in result.shape)
        return f"{str(result.dtype).removeprefix('torch.')}[{sizes}]"
    if result is None:
        return "nothing"
    parts = _fields(result)
    named = isinstance(result, Mapping) or hasattr(result, "_fields") or is_dataclass(result)
    of = ", ".join(parts) if named else len(parts)
    return f"a {type(result).__name__}{f' of {of}' if parts else ''}"


def _refuse_changed_inputs(program: torch.export.ExportedProgram, part: Traced) -> None:
    """Refuse a part that changes in place what other parts are given too."""
    names = list(program.graph_signature.user_inputs)
    for spec in program.graph_signature.output_specs:
        if spec.kind.name == "USER_INPUT_MUTATION" and names.index(spec.target) not in CHANGEABLE:
            raise UnsupportedError(
                f"{type(part.part).__name__} changes an argument in place that other layers read: "
                "clone it first"
            )


CHANGEABLE = (0, 7, 8, 9)
"""Arguments that a part alone is given: ids or states, and of a layer its cache."""

"""From a PyTorch model to the IR: each distinct layer is traced once, on the meta device.

`trace_checkpoint` compiles a checkpoint; `trace` any module that follows `protocol` (see
docs/protocol.md). No weight is read: parameters become lazy expressions by their names.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from liquidc.errors import UnsupportedError
from liquidc.frontend.fingerprint import fingerprint
from liquidc.frontend.functional import results
from liquidc.frontend.importer import DTYPES, Importer, Part
from liquidc.frontend.parts import (
    MAX_GATES,
    B,
    Call,
    Graph,
    LayerCall,
    P,
    PartTracer,
    S,
    T,
)
from liquidc.frontend.prepare import unwrapped
from liquidc.frontend.protocol import LayerCache
from liquidc.ir import Dim, DType, Function, Module, TensorType, Value, ops
from liquidc.ir.weights import WeightExpr

if TYPE_CHECKING:
    from liquidc.frontend.families import Checkpoint

I64, F32, BOOL, I8 = DType.I64, DType.F32, DType.BOOL, DType.I8


@runtime_checkable
class Decoder(Protocol):
    """What a module offers so that prefill and decode over a cache can be compiled."""

    layers: nn.ModuleList
    """Each is called as `layer(x, step, cache) -> (x, cache)`."""

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions i64[B, T] -> states [B, T, D]."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """States [B, P, D] -> logits f32[B, P, V]."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache; its `layers` are one `LayerCache` for each layer."""
        ...


def trace_checkpoint(checkpoint: Checkpoint) -> Module:
    """The IR of an opened checkpoint, with @prefill and @decode.

    Raises:
        UnsupportedError: the model does something that has no translation.
    """
    config = checkpoint.config
    module = trace(checkpoint.skeleton, checkpoint.weights)
    module.attributes |= {
        "max_positions": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "kv_policy": config.depth_gate.kv_policy,
    }
    return module


def trace(
    model: nn.Module, weights: Mapping[str, WeightExpr] | None = None, name: str = "model"
) -> Module:
    """The IR of a module: @prefill and @decode if it is a `Decoder`, else @prefill alone.

    It computes what `model.float()` computes. If the model serves only so many tokens, the
    attribute `max_positions` says how many.

    Args:
        model: in evaluation or training mode; it is traced as in evaluation. Weights are not read.
        weights: what each parameter is made of, by name; by default the tensor of that name.
        name: of the IR module.

    Raises:
        UnsupportedError: the model does something that has no translation.
    """
    model = unwrapped(model)
    if isinstance(model, Decoder):
        return _Tracer(model, weights, name).run()
    logging.getLogger("liquidc").warning(
        "%s has no embed, layers, head and new_cache (docs/protocol.md): "
        "only @prefill is compiled, without a cache",
        type(model).__name__,
    )
    return _PlainTracer(model, weights, name).run()


class _PlainTracer(PartTracer):
    """A module that is only `model(input_ids) -> logits`."""

    def run(self) -> Module:
        self._check_call()
        graph = self.export(Call(self.model), [((B, T), torch.int64)])
        function = self.module.add(Function("prefill", [("input_ids", TensorType(I64, (B, T)))]))
        (logits,) = self.inline(function, graph, function.args, Part("model"), "", {})
        self.check_result(logits, "forward", "logits", (B, T))
        function.body.append(ops.Return([logits]))
        function.result_names = ("logits",)
        self.module.attributes |= {"layers": 0, "gates": 0}
        return self.finish()

    def _check_call(self) -> None:
        """Refuse a forward that can't be called with ids alone.

        Raises:
            UnsupportedError: it needs other arguments, or takes none.
        """
        forward = inspect.signature(self.model.forward)
        try:
            forward.bind(object())
        except TypeError as error:
            raise UnsupportedError(
                f"{type(self.model).__name__}.forward{forward} can't be called with input_ids "
                f"alone ({error}): give the others defaults"
            ) from None


@dataclass
class _LayerShape:
    """What tracing a layer told: its graph and which results it has."""

    graph: Graph
    gates: int
    records: tuple[bool, bool]


@dataclass
class _State:
    """What goes from layer to layer while a function is stitched."""

    x: Value
    executed: Value
    below: list[Value] = field(default_factory=list[Value])
    gates: list[Value] = field(default_factory=list[Value])
    probabilities: list[Value] = field(default_factory=list[Value])
    experts: dict[int, Value] = field(default_factory=dict[int, Value])
    lengths: list[Value] = field(default_factory=list[Value])
    caches: list[Value] = field(default_factory=list[Value])


class _Tracer(PartTracer):
    """A `Decoder`: embed, layers, head, stitched into functions over a cache."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, WeightExpr] | None, name: str
    ) -> None:
        super().__init__(model, weights, name)
        self.decoder = cast(Decoder, self.model)
        caches = self._caches()
        self.cache_types = [
            TensorType(DTYPES[c.key.dtype], (B, c.key.shape[1], S, c.key.shape[3])) for c in caches
        ]
        self.cache_dtypes = [c.key.dtype for c in caches]
        self.distinct: dict[Any, _LayerShape] = {}
        names = {id(child): path for path, child in self.model.named_modules()}
        self.prefixes = [f"{names[id(layer)]}." for layer in self.decoder.layers]

    def _caches(self) -> list[LayerCache]:
        """A tiny cache, for its shapes.

        Raises:
            UnsupportedError: `new_cache` makes something else.
        """
        name = type(self.model).__name__
        with torch.device(self.device):
            made = self.decoder.new_cache(1, 1)
        caches: list[LayerCache] = list(getattr(made, "layers", None) or ())
        count = len(self.decoder.layers)
        if len(caches) != count or not all(_is_cache(cache) for cache in caches):
            raise UnsupportedError(
                f"{name}.new_cache must give an object whose `layers` are {count} LayerCaches, one "
                "a layer, with key and value [batch, heads, capacity, width]"
            )
        if len({(c.key.shape[1:], c.value.shape, c.key.dtype) for c in caches}) > 1:
            raise UnsupportedError(f"{name}.new_cache gives layers caches of different shapes")
        return caches

    def run(self) -> Module:
        self.embedding = self.export(
            Call(self.model, "embed", "states"), [((B, T), torch.int64), ((B, T), torch.int64)]
        )
        state = results(self.embedding.program)[0].meta["val"]
        self.width, self.dtype = state.shape[-1], state.dtype
        self.head = self.export(Call(self.model, "head"), [((B, P, self.width), self.dtype)])
        below = False
        self.layers: list[_LayerShape] = []
        for index, layer in enumerate(self.decoder.layers):
            key = (fingerprint(layer), self.cache_types[index], below)
            if key not in self.distinct:
                self.distinct[key] = self._trace_layer(layer, index, below)
            self.layers.append(self.distinct[key])
            below = self.layers[-1].records[1]
        for name, bind in (("prefill", {}), ("decode", {T: 1})):
            self.module.add(self._stitch(name, bind))
        gates = [i for i, shape in enumerate(self.layers) for _ in range(shape.gates)]
        self.module.attributes |= {
            "layers": len(self.layers),
            "gates": len(gates),
            "gate_layers": tuple(gates),
        }
        return self.finish()

    def _trace_layer(self, layer: nn.Module, index: int, below: bool) -> _LayerShape:
        cache = self.cache_types[index]
        kv, hd = cache.shape[1], cache.shape[3]
        dtype = self.cache_dtypes[index]
        tokens, rows = ((B, T), torch.int64), ((B,), torch.int64)
        part = LayerCall(layer)
        new = ((B, T, kv, hd), dtype) if below else None
        specs = [
            ((B, T, self.width), self.dtype),
            tokens,
            ((B, T), torch.bool),
            ((MAX_GATES,), torch.int8),
            ((B,), torch.float32),
            rows,
            tokens,
            (cache.shape, dtype),
            (cache.shape, dtype),
            rows,
            new,
            new,
        ]
        graph = self.export(part, specs)
        return _LayerShape(graph, part.noted.gates, part.noted.records)

    def _stitch(self, name: str, bind: Mapping[str, Dim]) -> Function:
        time = bind.get(T, T)
        count = len(self.layers)
        gates = sum(shape.gates for shape in self.layers)
        args = [("input_ids", TensorType(I64, (B, time))), ("lengths", TensorType(I64, (B,)))]
        args += [("position_start", TensorType(I64, (B,)))]
        args += [("logit_index", TensorType(I64, (B, P)))]
        if gates:
            args += [("gate_force", TensorType(I8, (gates,)))]
            args += [("gate_bias", TensorType(F32, (B,))), ("min_depth", TensorType(I64, (B,)))]
        args += [("kv_len", TensorType(I64, (count, B)))]
        for index, type in enumerate(self.cache_types):
            args += [(f"past.{index}.key", type), (f"past.{index}.value", type)]
        function = Function(name, args)
        imp = Importer(self.module, function.body, {}, Part(name))
        positions, valid = self._positions(imp, function, time)
        (x,) = self.inline(
            function,
            self.embedding,
            [function.arg("input_ids"), positions],
            Part("embed"),
            "",
            bind,
        )
        self.check_result(x, "embed", "states", (B, time))
        state = _State(x, imp.fill(0, TensorType(I64, (B, time))))
        first = 0
        for index, shape in enumerate(self.layers):
            self._layer(imp, function, index, shape, first, positions, valid, state, bind)
            first += shape.gates
        hidden = imp.emit(ops.TakeTokens(state.x, function.arg("logit_index"))).y
        (logits,) = self.inline(function, self.head, [hidden], Part("head"), "", bind)
        self.check_result(logits, "head", "logits", (B, P))
        self._return(imp, function, logits, state, gates)
        return function

    def _positions(self, imp: Importer, function: Function, time: Dim) -> tuple[Value, Value]:
        """Positions i64[B, T], 0 at padding, and which tokens are no padding, bool[B, T].

        A row of a ragged call may be padded beyond the context: no table has such a position.
        """
        offset = imp.reshape(imp.emit(ops.Iota(dim=time)).y, (1, time))
        start = imp.reshape(function.arg("position_start"), (B, 1))
        lengths = imp.reshape(function.arg("lengths"), (B, 1))
        valid = imp.emit(ops.Lt(offset, lengths)).y
        counted = imp.emit(ops.Add(start, offset)).y
        positions = imp.emit(ops.Where(valid, counted, imp.scalar(0, I64))).y
        positions.name, valid.name = "positions", "valid"
        return positions, valid

    def _layer(
        self,
        imp: Importer,
        function: Function,
        index: int,
        shape: _LayerShape,
        first: int,
        positions: Value,
        valid: Value,
        state: _State,
        bind: Mapping[str, Dim],
    ) -> None:
        """One layer at the end of the function."""
        count = len(self.layers)
        if shape.gates:
            force = function.arg("gate_force")
            force = imp.emit(ops.Slice(force, dim=0, start=first, stop=first + shape.gates)).y
            controls = [force, function.arg("gate_bias"), function.arg("min_depth")]
        else:
            nothing = [TensorType(F32, (B,)), TensorType(I64, (B,))]
            controls = [imp.fill(0, TensorType(I8, (1,))), *(imp.fill(0, t) for t in nothing)]
        lengths = imp.emit(ops.Slice(function.arg("kv_len"), dim=0, start=index, stop=index + 1)).y
        inputs = [
            state.x,
            positions,
            valid,
            *controls,
            state.executed,
            function.arg(f"past.{index}.key"),
            function.arg(f"past.{index}.value"),
            imp.reshape(lengths, (B,)),
            *state.below,
        ]
        part = Part(f"layer{index}", layer=index, gate=first, remaining=count - index)
        out = iter(self.inline(function, shape.graph, inputs, part, self.prefixes[index], bind))
        state.x, key, value, length, state.executed = (next(out) for _ in range(5))
        state.x.name = f"x{index + 1}"
        state.caches += [key, value]
        state.lengths.append(length)
        for _ in range(shape.gates):
            state.gates.append(next(out))
            state.probabilities.append(next(out))
        if shape.records[0]:
            state.experts[index] = next(out)
        state.below = [next(out), next(out)] if shape.records[1] else []

    def _return(
        self, imp: Importer, function: Function, logits: Value, state: _State, gates: int
    ) -> None:
        results = {"logits": logits}

        def stacked(values: Sequence[Value]) -> Value:
            return imp.emit(ops.Concat([imp.reshape(v, (1, *v.shape)) for v in values], dim=0)).y

        if gates:
            results["gates"] = stacked(state.gates)
            results["gate_p"] = stacked(state.probabilities)
        if state.experts:
            type = next(iter(state.experts.values())).type
            none = imp.fill(-1, type)
            chosen = [state.experts.get(i, none) for i in range(len(self.layers))]
            results["experts"] = stacked(chosen)
        results["present.kv_len"] = stacked(state.lengths)
        for index in range(len(self.layers)):
            results[f"present.{index}.key"] = state.caches[2 * index]
            results[f"present.{index}.value"] = state.caches[2 * index + 1]
        function.body.append(ops.Return(list(results.values())))
        function.result_names = tuple(results)


def _is_cache(cache: Any) -> bool:
    """Whether it is a tuple of key and value [B, KV, S, hd] and a length."""
    if not isinstance(cache, LayerCache):
        return False
    return cache.key.dim() == 4 and cache.key.shape == cache.value.shape

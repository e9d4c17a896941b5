"""Runs a null engine by the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from liquidc.backends.artifact import NullArtifact, check_signature, listed, read_artifact
from liquidc.backends.base import Arrays, Cache, Guard, Runner, Trace, path_regions
from liquidc.backends.null.backend import load_module
from liquidc.backends.weights_file import NAME, WeightsFile
from liquidc.errors import InternalError
from liquidc.ir import Module, Op, ops, verify
from liquidc.ir.experts import experts_held, layers_of_experts
from liquidc.ir.interpreter import Frame, Interpreter
from liquidc.ir.regions import Key, is_commit, regions_of
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import torch_dtype
from liquidc.manifest import TensorSpec

if TYPE_CHECKING:
    from liquidc.manifest import Manifest


@dataclass(slots=True)
class NullCache:
    """Tensors by the names `past.*`, and the lengths i64[L, B]."""

    batch: int
    capacity: int
    tensors: dict[str, torch.Tensor]
    length: torch.Tensor

    @property
    def kv_len(self) -> NDArray[np.int64]:
        """Slots taken by layer and row."""
        return self.length.numpy().copy()

    def rewind(self, kv_len: NDArray[np.int64]) -> None:
        """See `Cache`."""
        self.length = torch.from_numpy(kv_len.copy())


class NullRunner(Runner):
    """An engine in the interpreter.

    Args:
        engine: its directory.
        manifest: its manifest.

    Raises:
        EngineError: its files don't fit its manifest.
    """

    def __init__(self, engine: Path, manifest: Manifest) -> None:
        self._engine, self._manifest = engine, manifest
        artifact = read_artifact(NullArtifact, engine, manifest)
        self._module = load_module(listed(engine, manifest, artifact.module))
        verify(self._module)
        for name, function in self._module.functions.items():
            results = zip(function.result_names, function.returned, strict=True)
            check_signature(
                engine,
                manifest,
                [_spec(value.name, value.type) for value in function.args],
                [_spec(result, value.type) for result, value in results],
                name,
            )
        self._weights = WeightsFile(
            listed(engine, manifest, NAME),
            {name: expr.type for name, expr in self._module.weights.items()},
            {name: entry.offset for name, entry in artifact.weights.items()},
        )
        self._interpreter = self._new_interpreter(self._module, self._weights)

    def _new_interpreter(self, module: Module, weights: WeightsFile) -> Interpreter:
        return Interpreter(module, weights)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        info = self._manifest.cache
        if info is None:
            return NullCache(batch, capacity, {}, torch.zeros(0, batch, dtype=torch.int64))
        named = {"B": batch, "S": capacity}
        shape = [dim if isinstance(dim, int) else named[dim] for dim in info.shape]
        dtype = torch_dtype(DType(info.dtype))
        tensors = {name: torch.zeros(shape, dtype=dtype) for name in info.buffers}
        length = torch.zeros(info.layers, batch, dtype=torch.int64)
        return NullCache(batch, capacity, tensors, length)

    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        """See `Runner`."""
        if not isinstance(cache, NullCache):
            raise InternalError("a cache of another runner")
        given = {name: torch.as_tensor(array) for name, array in inputs.items()}
        if cache.tensors:
            given |= {**cache.tensors, "kv_len": cache.length}
        one = given["input_ids"].shape[1] == 1 and "decode" in self._module.functions
        out = self._interpreter.run("decode" if one else "prefill", given)
        if cache.tensors:
            cache.length = out.pop("present.kv_len")
            for name in cache.tensors:
                cache.tensors[name] = out.pop(name.replace("past.", "present.", 1))
        arrays = {name: tensor.numpy() for name, tensor in out.items()}
        if "path_tried" in arrays:
            self.guard = self.guard or Guard()
            self.guard.count(arrays)
        return arrays

    def profile(self, work: Callable[[Runner], None]) -> Trace:
        """See `Runner`: the interpreter counts the rows of the ops that it computes."""
        runner = _CountingRunner(self._engine, self._manifest)
        work(runner)
        trace = runner.trace()
        runner.close()
        return trace

    @property
    def module(self) -> Module:
        """The engine's IR."""
        return self._module

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that calls have read so far."""
        return self._interpreter.weights

    def close(self) -> None:
        """Unmap the weights."""
        self.closed = True
        self._interpreter.weights.clear()
        self._weights.close()


def _spec(name: str, type: TensorType) -> TensorSpec:
    return TensorSpec(name, str(type.dtype), type.shape)


class _CountingRunner(NullRunner):
    def _new_interpreter(self, module: Module, weights: WeightsFile) -> Interpreter:
        regions = {
            region.witness: region.key
            for function in module.functions.values()
            for region in regions_of(function)
            if region.witness is not None
        }
        layer_of = {
            op: layer
            for function in module.functions.values()
            for op, layer in layers_of_experts(function).items()
        }
        path = path_regions(self._manifest)
        return _Counting(module, weights, regions=regions, layer_of=layer_of, path=path)

    def trace(self) -> Trace:
        """What was counted."""
        counting = self._interpreter
        if not isinstance(counting, _Counting):
            raise InternalError("the counting runner does not count")
        return Trace(dict(counting.rows), {n: dict(c) for n, c in counting.experts.items()})


_Experts = (ops.GroupedExperts, ops.MapExperts)


@dataclass(slots=True)
class _Counting(Interpreter):
    """Counts, where it computes, the rows of regions' witnesses and the tokens of experts."""

    regions: dict[Op, Key] = field(default_factory=dict[Op, Key])
    layer_of: dict[Op, int] = field(default_factory=dict[Op, int])
    rows: Counter[Key] = field(default_factory=Counter[Key])
    experts: dict[int, Counter[int]] = field(default_factory=dict[int, Counter[int]])
    path: Sequence[Key] = ()

    def _op(self, op: Op, frame: Frame) -> Sequence[torch.Tensor]:
        path = isinstance(op, ops.If) and op.role == "path" and not is_commit(op)
        if path and bool(frame.values[op.operands[0]]):
            rows, experts = Counter(self.rows), {n: Counter(c) for n, c in self.experts.items()}
            outputs = Interpreter._op(self, op, frame)
            if bool(outputs[0]):  # the path was right
                self.rows.update(self.path)
            else:
                self.rows, self.experts = rows, experts
            return outputs
        if op in self.regions:
            x = frame.values[op.operands[0]]
            self.rows[self.regions[op]] += x.numel() // x.shape[-1]
        if isinstance(op, _Experts) and op in self.layer_of:
            chosen = frame.values[op.index]
            counter = self.experts.setdefault(self.layer_of[op], Counter())
            held = experts_held(op)
            counter.update(int(expert) for expert in chosen.reshape(-1) if 0 <= expert < held)
        return Interpreter._op(self, op, frame)

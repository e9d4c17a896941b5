"""Runs an ONNX engine: one session, caches bound as past and present at once."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from liquidc.backends.artifact import (
    OnnxArtifact,
    check_signature,
    listed,
    read_artifact,
    read_nodes,
)
from liquidc.backends.base import Arrays, Cache, Guard, Runner, RunnerOptions, Trace, path_regions
from liquidc.backends.onnxruntime.backend import NODES
from liquidc.backends.onnxruntime.huge_pages import huge_pages
from liquidc.errors import EngineError, InputError, InternalError
from liquidc.ir import DType
from liquidc.ir.regions import Key
from liquidc.manifest import TensorSpec
from liquidc.text import is_text

if TYPE_CHECKING:
    from liquidc.manifest import Manifest

LOG_SEVERITY = 4
"""ONNX Runtime logs fatal errors alone; its exceptions say the rest. 2 adds warnings, for instance
of a cache that was copied."""


@dataclass(slots=True)
class Bound:
    """A binding of a cache as past and present, which is kept from call to call.

    Attributes:
        binding: ONNX Runtime's.
        inputs: what the other inputs are bound to.
        results: arrays that results are written to; while there are none, they are allocated.
        length: what kv_len is bound to then.
    """

    binding: Any
    inputs: dict[str, NDArray[Any] | None] = field(default_factory=dict[str, "NDArray[Any] | None"])
    results: Arrays = field(default_factory=dict[str, "NDArray[Any]"])
    length: NDArray[np.int64] | None = None


@dataclass(slots=True)
class OrtCache:
    """Buffers by the names `past.*`, and the lengths i64[L, B].

    Attributes:
        slots: of each buffer.
        bindings: what is bound to the buffers, by the runner that did it and whether it is for
            calls of one token a row.
    """

    batch: int
    capacity: int
    buffers: dict[str, Any]
    length: NDArray[np.int64]
    slots: int = 0
    bindings: dict[tuple[OrtRunner, bool], Bound] = field(
        default_factory=dict["tuple[OrtRunner, bool]", "Bound"]
    )

    def __post_init__(self) -> None:
        self.slots = self.capacity

    def reserve(self, tokens: int) -> None:
        """Room for a call of `tokens`: padding is written after the last token of a shorter row."""
        most = int(self.length.max(initial=0)) + tokens
        if most <= self.slots:
            return
        for name, buffer in self.buffers.items():
            old = buffer.numpy()
            rows, heads, _, width = old.shape
            larger = np.zeros((rows, heads, most, width), old.dtype)
            larger[:, :, : self.slots] = old
            self.buffers[name] = ort.OrtValue.ortvalue_from_numpy(larger)
        self.slots = most
        self.bindings.clear()

    @property
    def kv_len(self) -> NDArray[np.int64]:
        """Slots taken by layer and row."""
        return self.length.copy()

    def rewind(self, kv_len: NDArray[np.int64]) -> None:
        """See `Cache`."""
        self.length = kv_len.copy()


class OrtRunner(Runner):
    """An engine in one ONNX Runtime session.

    Args:
        engine: its directory.
        manifest: its manifest.
        options: threads and whether this is a measurement.
        profile: prefix of the profiler's file; None runs without it.
        model: the graph, if it is not the engine's main one.

    Raises:
        EngineError: its files don't fit its manifest, or ONNX Runtime refuses the graph.
        InputError: the path of the engine is not UTF-8.
    """

    bench_note = "session.force_spinning_stop=1"

    def __init__(
        self,
        engine: Path,
        manifest: Manifest,
        options: RunnerOptions,
        profile: str | None = None,
        model: str | None = None,
    ) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = LOG_SEVERITY
        settings.inter_op_num_threads = 1
        if options.threads:
            settings.intra_op_num_threads = options.threads
        if options.bench:
            settings.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile
        self._engine, self._manifest, self._options = engine, manifest, options
        if not is_text(str(engine)):
            raise InputError(
                f"{engine}: ONNX Runtime opens UTF-8 paths alone; rename the directory"
            )
        self._model = model or read_artifact(OnnxArtifact, engine, manifest).model
        path = listed(engine, manifest, self._model)
        try:
            with huge_pages():
                self._session: Any = ort.InferenceSession(
                    str(path), settings, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # those of ONNX Runtime share no class
            raise EngineError(f"{path}: ONNX Runtime refuses it ({error})") from None
        self._inputs = {node.name for node in self._session.get_inputs()}
        check_signature(
            engine,
            manifest,
            [_spec(node) for node in self._session.get_inputs()],
            [_spec(node) for node in self._session.get_outputs()],
        )
        self._takes_length = "kv_len" in self._inputs
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._told = {
            name: place
            for place, name in enumerate(self._outputs)
            if _past(name) not in self._inputs
        }
        self.guard = Guard() if "path_tried" in self._outputs else None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        info = self._manifest.cache
        if info is None:
            return OrtCache(batch, capacity, {}, np.zeros((0, batch), np.int64))
        named = {"B": batch, "S": capacity}
        shape = [dim if isinstance(dim, int) else named[dim] for dim in info.shape]
        dtype = DType(info.dtype).numpy
        buffers = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype)) for name in info.buffers
        }
        return OrtCache(batch, capacity, buffers, np.zeros((info.layers, batch), np.int64))

    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        """See `Runner`."""
        if not isinstance(cache, OrtCache):
            raise InternalError("a cache of another runner")
        tokens = inputs["input_ids"].shape
        cache.reserve(tokens[1])
        one = tokens[1] == 1 and inputs.get("logit_index", inputs["input_ids"]).shape == tokens
        known = cache.bindings.get((self, one))
        if known is None:
            known = cache.bindings[self, one] = Bound(self._bound(cache))
        if known.length is not None:
            np.copyto(known.length, cache.length)
        elif self._takes_length:
            inputs = {**inputs, "kv_len": cache.length}
        for name, array in inputs.items():
            if known.inputs.get(name) is not array and name in self._inputs:
                known.binding.bind_cpu_input(name, np.ascontiguousarray(array))
                known.inputs[name] = array if array.flags.c_contiguous else None
        if known.results:
            self._session.run_with_iobinding(known.binding)
            out = {name: array.copy() for name, array in known.results.items()}
        else:
            for name in self._told:  # bound anew, or the buffers of the last call would be written
                known.binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(known.binding)
            results = known.binding.get_outputs_as_ortvaluevector()
            out = {name: results[place].numpy() for name, place in self._told.items()}
            if one:
                self._settle(known, out, cache)
        if "present.kv_len" in out:
            cache.length = out.pop("present.kv_len")
        if self.guard is not None:
            self.guard.count(out)
        return out

    def _settle(self, known: Bound, out: Arrays, cache: OrtCache) -> None:
        """Let calls like the last one write their results to the same arrays each time."""
        for name, array in out.items():
            kept = known.results[name] = np.empty_like(array)
            place = kept.ctypes.data
            known.binding.bind_output(name, "cpu", 0, kept.dtype.type, kept.shape, place)
        if self._takes_length:
            known.length = cache.length.copy()
            known.binding.bind_cpu_input("kv_len", known.length)

    def _bound(self, cache: OrtCache) -> Any:
        """The buffers as past and as present; results come in the order of the outputs."""
        binding = self._session.io_binding()
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name in self._outputs:
            if name in self._told:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_ortvalue_output(name, cache.buffers[_past(name)])
        return binding

    def profile(self, work: Callable[[Runner], None]) -> Trace:
        """See `Runner`: ONNX Runtime's own profile, read by the engine's table of nodes."""
        with tempfile.TemporaryDirectory() as scratch:
            runner = OrtRunner(
                self._engine, self._manifest, self._options, str(Path(scratch) / "profile")
            )
            work(runner)
            events = runner.events()
            runner.close()
        return read_trace(events, self.nodes(), path_regions(self._manifest))

    def events(self) -> list[dict[str, Any]]:
        """What the profiler of the session saw until now; it ends."""
        return json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))

    def nodes(self) -> dict[str, Any]:
        """What the nodes of the graph count; see `nodes`."""
        path = listed(self._engine, self._manifest, NODES)
        return read_nodes(path, self._manifest, self._model)

    def close(self) -> None:
        """Free the session."""
        self.closed = True
        self._session = None


_TYPES = {
    "double": "f64",
    "float": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}
"""Our names of element types by ONNX Runtime's."""


def _spec(node: Any) -> TensorSpec:
    """What ONNX Runtime says about an input or output."""
    name = str(node.type).removeprefix("tensor(").removesuffix(")")
    return TensorSpec(node.name, _TYPES.get(name, name), tuple(node.shape))


def _past(name: str) -> str:
    """The argument that a result `present.*` is next time."""
    return name.replace("present.", "past.", 1)


def read_trace(
    events: list[dict[str, Any]], nodes: Mapping[str, Any], path: Sequence[Key] = ()
) -> Trace:
    """Tokens of each region and of each expert, from a profile's node events.

    They are the rows that the first input of a node has; `nodes` says which nodes to look at.

    Args:
        events: of the profiler's file.
        nodes: of the engine's table, for the graph that ran.
        path: regions whose work is done for one token whenever the path that is tried is right.
    """
    regions, experts, fused, parts = (
        dict(_by_event(nodes[name])) for name in ("regions", "experts", "fused", "path")
    )
    counts: Counter[tuple[str, int, int]] = Counter()
    pending = counts
    guard, trying, seen = Guard(), False, set[int]()
    for event in events:
        if event.get("cat") != "Node":
            continue
        name = str(event["name"])
        part = parts.get(name)
        if part == "try" and not trying:
            trying, pending = True, Counter()
            guard.tried += 1
        elif trying and part in ("hit", "miss"):
            if part == "hit":
                counts.update(pending)
                counts.update(("gate", *key) for key in path)
            guard.missed += part == "miss"
            trying, pending = False, counts
        if name in regions:
            pending["gate", *regions[name]] += _first_size(event)
        elif name in experts:
            pending["expert", *experts[name]] += _first_size(event)
        if name in fused:
            seen.add(fused[name])
    rows, used = dict[Key, int](), dict[int, dict[int, int]]()
    for (role, first, second), count in counts.items():
        if role == "gate":
            rows[first, second] = count
        else:
            used.setdefault(first, {})[second] = count
    return Trace(rows, used, frozenset(seen), guard)


def _by_event(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A table by the names that ONNX Runtime 1.32 gives events of a node.

    A product that it fused with the activation behind it is named anew.
    """
    for name, value in table.items():
        yield f"{name}_kernel_time", value
        yield f"fused {name}_kernel_time", value


def _first_size(event: dict[str, Any]) -> int:
    """The leading size of the first input of a node, as ONNX Runtime 1.32 writes it."""
    (shape,) = event["args"]["input_type_shape"][0].values()
    return int(shape[0])

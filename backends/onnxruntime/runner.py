"""Runs an ONNX engine: one session, caches bound as past and present at once."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from liquidc.backends.base import Arrays, Cache, Runner, RunnerOptions, Trace
from liquidc.errors import InternalError

if TYPE_CHECKING:
    from liquidc.manifest import Manifest

_WARNING = 3
"""Severity from which ONNX Runtime logs: errors only."""


@dataclass(slots=True)
class OrtCache:
    """Buffers by the names `past.*`, and the lengths i64[L, B]."""

    batch: int
    capacity: int
    buffers: dict[str, Any]
    length: NDArray[np.int64]

    @property
    def kv_len(self) -> NDArray[np.int64]:
        """Slots taken by layer and row."""
        return self.length.copy()


class OrtRunner(Runner):
    """An engine in one ONNX Runtime session.

    Args:
        engine: its directory.
        manifest: its manifest.
        options: threads and whether this is a measurement.
        profile: prefix of the profiler's file; None runs without it.
    """

    bench_note = "session.force_spinning_stop=1"

    def __init__(
        self, engine: Path, manifest: Manifest, options: RunnerOptions, profile: str | None = None
    ) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = _WARNING
        settings.inter_op_num_threads = 1
        if options.threads:
            settings.intra_op_num_threads = options.threads
        if options.bench:
            settings.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile
        self._engine, self._manifest, self._options = engine, manifest, options
        path = engine / str(manifest.artifact["model"])
        self._session: Any = ort.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        info = self._manifest.cache
        if info is None:
            return OrtCache(batch, capacity, {}, np.zeros((0, batch), np.int64))
        named = {"B": batch, "S": capacity}
        shape = [dim if isinstance(dim, int) else named[dim] for dim in info.shape]
        buffers = {
            f"past.{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(info.layers)
            for part in ("key", "value")
        }
        return OrtCache(batch, capacity, buffers, np.zeros((info.layers, batch), np.int64))

    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        """See `Runner`."""
        if not isinstance(cache, OrtCache):
            raise InternalError("a cache of another runner")
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        if "kv_len" in self._inputs:
            binding.bind_cpu_input("kv_len", cache.length)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name in self._outputs:
            buffer = cache.buffers.get(name.replace("present.", "past.", 1))
            if buffer is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_ortvalue_output(name, buffer)
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        out = {
            name: value.numpy()
            for name, value in results.items()
            if name.replace("present.", "past.", 1) not in cache.buffers
        }
        if "present.kv_len" in out:
            cache.length = out.pop("present.kv_len")
        return out

    def profile(self, work: Callable[[Runner], None]) -> Trace:
        """See `Runner`: ONNX Runtime's own profile, read by the nodes' names and shapes."""
        with tempfile.TemporaryDirectory() as scratch:
            runner = OrtRunner(
                self._engine, self._manifest, self._options, str(Path(scratch) / "profile")
            )
            work(runner)
            events = json.loads(Path(runner._session.end_profiling()).read_text(encoding="utf-8"))
            runner.close()
        return read_trace(events, self._gates_by_label())

    def _gates_by_label(self) -> dict[str, int]:
        layers: dict[int, list[int]] = {}
        for index, gate in enumerate(self._manifest.model.gates):
            layers.setdefault(gate.layer, []).append(index)
        return {
            f"layer{layer}{part}": gate
            for layer, gates in layers.items()
            for part, gate in (("", gates[0]), ("/attn", gates[0]), ("/ffn", gates[-1]))
        }

    def close(self) -> None:
        """Free the session."""
        self._session = None


_GEMM = re.compile(r"(?P<label>layer\d+(?:/attn|/ffn)?)/run/Gemm")
_EXPERT = re.compile(r"(?P<prefix>.*?)/?expert(?P<expert>\d+)/Gemm")


def read_trace(events: list[dict[str, Any]], gates: Mapping[str, int]) -> Trace:
    """Rows behind each gate and tokens of each expert, from a profile's node events.

    The rows of a conditional are those of its first matrix product: the tokens that it computes.
    An expert's tokens are the rows of its first product, the one with gate and up together.
    """
    rows: Counter[int] = Counter()
    experts: dict[int, Counter[int]] = {}
    firsts: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        node = name.removesuffix("_kernel_time")
        shapes = event["args"].get("input_type_shape", [])
        count = int(next(iter(shapes[0].values()))[0]) if shapes else 0
        expert = _EXPERT.match(node)
        if expert is not None:
            key = f"{expert['prefix']}/expert{expert['expert']}"
            layer = re.search(r"layer(\d+)", node)
            if layer and firsts.setdefault(key, node) == node:
                experts.setdefault(int(layer[1]), Counter())[int(expert["expert"])] += count
            continue
        gemm = _GEMM.match(node)
        if gemm is not None and gemm["label"] in gates:
            if firsts.setdefault(gemm["label"], node) == node:
                rows[gates[gemm["label"]]] += count
    return Trace(dict(rows), {layer: dict(counter) for layer, counter in experts.items()})

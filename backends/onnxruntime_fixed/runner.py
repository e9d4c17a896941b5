"""Chooses among graphs of fixed depth: the expected path if there is one, else the masked graph.

A path's graph evaluates every gate on its way and says whether all decided as it assumes. Until
then nothing is committed: it writes the cache beyond its length only, so after a miss the masked
graph computes the token again. With `gate_force` that names a path the guess is never wrong.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.artifact import OnnxArtifact, read_artifact
from liquidc.backends.base import Arrays, Cache, Guard, Runner, RunnerOptions, Trace
from liquidc.backends.onnxruntime.runner import OrtCache, OrtRunner
from liquidc.errors import InternalError
from liquidc.ir.regions import Key

if TYPE_CHECKING:
    from liquidc.manifest import Manifest


class FixedRunner(Runner):
    """The sessions of an engine without control flow; each holds the weights that it prepacked.

    Args:
        engine: its directory.
        manifest: its manifest.
        options: threads, whether this is a measurement, whether to speculate.
        profile: directory for the profiler's files; None runs without it.
    """

    bench_note = OrtRunner.bench_note

    def __init__(
        self, engine: Path, manifest: Manifest, options: RunnerOptions, profile: str | None = None
    ) -> None:
        self._engine, self._manifest, self._options = engine, manifest, options
        artifact = read_artifact(OnnxArtifact, engine, manifest)
        guard = artifact.guard or {}
        wanted = options.speculate
        self._speculates = bool(guard.get("speculate")) if wanted is None else wanted
        self._masked = self._session("model.onnx", profile)
        self._paths = {path: self._session(f"path_{path}.onnx", profile) for path in artifact.paths}
        self.guard = Guard()

    def _session(self, model: str, profile: str | None) -> OrtRunner:
        prefix = None if profile is None else str(Path(profile) / model)
        return OrtRunner(self._engine, self._manifest, self._options, prefix, model)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        return self._masked.new_cache(batch, capacity)

    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        """See `Runner`."""
        if not isinstance(cache, OrtCache):
            raise InternalError("a cache of another runner")
        path = self._expected(inputs)
        if path is not None and self.guard is not None:
            before = cache.length
            out = self._paths[path].step(inputs, cache)
            self.guard.tried += 1
            if bool(out.pop("on_path")):
                return out
            cache.length = before
            self.guard.missed += 1
        return self._masked.step(inputs, cache)

    def _expected(self, inputs: Mapping[str, NDArray[Any]]) -> str | None:
        """The path whose graph is tried."""
        if not self._paths or inputs["input_ids"].shape != (1, 1) or inputs["lengths"][0] != 1:
            return None
        force = inputs["gate_force"]
        if np.all(force):
            path = "".join("1" if value > 0 else "0" for value in force)
            return path if path in self._paths else None
        return next(iter(self._paths)) if self._speculates and not np.any(force) else None

    def profile(self, work: Callable[[Runner], None]) -> Trace:
        """See `Runner`: a graph computes all of its layers for every token that it was given."""
        with tempfile.TemporaryDirectory() as scratch:
            runner = FixedRunner(self._engine, self._manifest, self._options, scratch)
            work(runner)
            regions = Counter[Key]()
            everything = "1" * len(self._manifest.model.gates)
            for path, session in [(everything, runner._masked), *runner._paths.items()]:
                looked_up = session.nodes()["tokens"][:1]
                tokens = sum(_tokens(event, looked_up) for event in session.events())
                for gate, digit in enumerate(path):
                    regions[gate, 0] += tokens * int(digit)
            runner.close()
        return Trace(dict(regions))

    def close(self) -> None:
        """Free the sessions."""
        self.closed = True
        for session in (self._masked, *self._paths.values()):
            session.close()


def _tokens(event: Mapping[str, Any], looked_up: Sequence[str]) -> int:
    """Tokens that the embedding looked up, if the event is that of one of its nodes."""
    names = [f"{name}_kernel_time" for name in looked_up]
    if event.get("cat") != "Node" or event["name"] not in names:
        return 0
    (shape,) = event["args"]["input_type_shape"][1].values()
    return int(np.prod(shape))

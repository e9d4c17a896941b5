"""What a target is: the functions it wants, the passes it runs, the stages that build its engine.

A backend *declares* its stages; one loop in `liquidc.pipeline` runs them, dumps them and starts
from any of them. The first stage receives the IR module after the passes; every stage turns one
artefact into the next; the last one has written its files into `context.directory` and returns a
JSON object, which the manifest keeps as `artifact`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from liquidc.errors import InputError
from liquidc.ir.regions import Key
from liquidc.ir.weights import WeightExpr, WeightSource

if TYPE_CHECKING:
    import torch

    from liquidc.ir.core import Module
    from liquidc.manifest import Manifest

Arrays = dict[str, NDArray[Any]]
"""Tensors by the name that they have in the IR function."""


def _ignore(amount: int) -> None:
    del amount


@dataclass(frozen=True, slots=True)
class Choices:
    """Lowerings that a compile may ask for instead of the target's own.

    Args:
        portable_weights: codes are dequantised by an operator of the ONNX standard.
        fused_experts: the experts of a layer are one operator, in which no profile tells them
            apart.
    """

    portable_weights: bool = False
    fused_experts: bool = False


class Journal(Protocol):
    """The complete parts of the files under way, so that a stopped compile can go on."""

    def held(self, path: Path) -> int:
        """How many bytes of a file are complete; what follows them is cut off."""
        ...

    def keep(self, path: Path) -> None:
        """All that is in a file now is complete."""
        ...


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage may use besides its artefact.

    Args:
        directory: the engine directory that is being written (it exists; only the last stage
            writes to it).
        source: where the module's weights are read from.
        advance: called with the number of bytes of weights written, for the progress bar.
        choices: lowerings that were asked for.
        journal: what of the engine's files is complete; None if nothing needs to be continued.
    """

    directory: Path
    source: WeightSource
    advance: Callable[[int], None] = _ignore
    choices: Choices = Choices()
    journal: Journal | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One step from artefact to artefact.

    Args:
        name: as in `--start-from NAME=FILE`.
        suffix: of the dumped file, with the dot; empty if the artefact can't be dumped.
        run: the step.
        dump: writes the artefact that `run` returned to a file.
        load: reads that file back; None if the stage can't be started from.
    """

    name: str
    suffix: str
    run: Callable[[Any, StageContext], Any]
    dump: Callable[[Any, Path], None] | None = None
    load: Callable[[Path], Any] | None = None


THREADS_PER_CORE = 16
"""More threads than that only wait for one another, and each takes memory."""


def max_threads() -> int:
    """The most threads that can be asked for on this machine."""
    return THREADS_PER_CORE * (os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How to run an engine.

    Args:
        threads: threads of one operation; None leaves it to the target.
        bench: use the settings that the target recommends for measuring.
        speculate: whether a target with graphs of fixed depth tries one before the general one;
            None does it where the engine's profile says that it pays.

    Raises:
        InputError: `threads` is not from 1 to `max_threads()`.
    """

    threads: int | None = None
    bench: bool = False
    speculate: bool | None = None

    def __post_init__(self) -> None:
        threads, most = cast(object, self.threads), max_threads()
        if threads is not None and (type(threads) is not int or not 1 <= threads <= most):
            raise InputError(
                f"threads must be from 1 to {most}, which is {THREADS_PER_CORE} for each core of "
                f"this machine, not {threads!r:.40}"
            )


@dataclass(slots=True)
class Guard:
    """How often code for an expected depth path was run, and how often the path was another."""

    tried: int = 0
    missed: int = 0

    def count(self, out: Arrays) -> None:
        """Take what a call says of its path out of its results, and count it."""
        tried, hit = out.pop("path_tried", None), out.pop("path_hit", None)
        if tried is not None and hit is not None and bool(tried):
            self.tried += 1
            self.missed += not bool(hit)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a profiled run executed, by the target's own profiler; nothing is taken from outputs.

    Args:
        regions: by gate and number of a region that it opens, the tokens for which the work there
            was computed: its rows, summed over the calls. A target without control flow computes
            what a gate decides under a mask, for all tokens: that is region 0.
        experts: by layer and expert, the tokens that the expert computed; a layer is absent if the
            profiler can't tell its experts apart.
        fused: layers whose experts ran as one operator, which hides what each of them computed.
        guard: code for an expected depth path that was run, and that was in vain; its work is
            counted above when it was right, and nowhere when it was not.
    """

    regions: dict[Key, int] = field(default_factory=dict[Key, int])
    experts: dict[int, dict[int, int]] = field(default_factory=dict[int, dict[int, int]])
    fused: frozenset[int] = frozenset()
    guard: Guard = field(default_factory=Guard)


def path_regions(manifest: Manifest) -> list[Key]:
    """Regions whose work is done for one token whenever the expected path is right.

    On that path they are straight-line code; regions inside them are not, and count by themselves.
    """
    guard: dict[str, Any] = manifest.artifact.get("guard", {})
    digits = zip(guard.get("gates", ()), guard.get("path", ""), strict=True)
    gates = manifest.model.gates
    return [
        (gate, region.number)
        for gate, digit in digits
        if digit == "1"
        for region in gates[gate].regions
        if region.masks == (gate,) and not region.within and not region.without
    ]


class Cache(Protocol):
    """The key/value cache of one session; what is inside belongs to the runner."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        ...

    @property
    def kv_len(self) -> NDArray[np.int64]:
        """Slots taken by layer and row, [L, B]; a copy."""
        ...

    def rewind(self, kv_len: NDArray[np.int64]) -> None:
        """Forget what was appended after `kv_len` was read; appends write nowhere else."""
        ...


class Runner(ABC):
    """A loaded engine that computes one step at a time. It checks nothing: `liquidc.runtime` does.

    Attributes:
        bench_note: the settings that `RunnerOptions.bench` chose, for reports.
        guard: counts of speculation; None if the engine has no speculative code.
        closed: whether `close` was called.
    """

    bench_note: str = ""
    guard: Guard | None = None
    closed: bool = False

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache, allocated once: `batch` rows of up to `capacity` tokens.

        A runner may allocate more slots than that if its target needs slack.
        """

    @abstractmethod
    def step(self, inputs: Mapping[str, NDArray[Any]], cache: Cache) -> Arrays:
        """Run the tokens of one call and update the cache in place.

        Args:
            inputs: `input_ids` i64[B, T], `lengths` i64[B], `position_start` i64[B],
                `logit_index` i64[B, P] and, if the engine has gates, `gate_force` i8[G],
                `gate_bias` f32[B], `min_depth` i64[B]. Everything but `kv_len` and `past.*`.
            cache: of `new_cache` of this runner.

        Returns:
            `logits` f32[B, P, V] and, as the engine has them, `gates` bool[G, B, T], `gate_p`
            f32[G, B, T], `experts` i64[L, B, T, k].
        """

    @abstractmethod
    def profile(self, work: Callable[[Runner], None]) -> Trace:
        """Call `work` with a runner under the target's profiler, and say what it executed.

        The runner that `work` gets has caches of its own and is closed when this returns.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the runner holds and set `closed`; it can't be used afterwards."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as it lies in an engine.

    Args:
        expr: what it holds, over the tensors of the checkpoint.
        read: rows of it, from the engine's file, of the expression's type.
    """

    expr: WeightExpr
    read: Callable[[int, int], torch.Tensor]


class Backend(ABC):
    """A target.

    Attributes:
        name: as in `--target`.
        functions: the IR functions that it compiles; others are dropped before the passes.
        pipeline: names of the passes that it runs, in order, with options as in `--passes`; None
            for the default of `liquidc.passes.registry`.
        leaves_out: passes, of that default or of those that a profile adds, which don't help it.
        stages: from the module after the passes to the engine's files.
        summary: one line for `liquidc targets`.
        skips: whether a skipped token costs no row of work; else layers are computed under masks.
        choices: names of the `Choices` that it has.
    """

    name: str
    summary: str
    functions: tuple[str, ...]
    pipeline: tuple[str, ...] | None = None
    leaves_out: tuple[str, ...] = ()
    skips: bool = True
    choices: tuple[str, ...] = ()
    stages: tuple[Stage, ...]

    @abstractmethod
    def availability(self) -> str | None:
        """Why engines can't be built or run here, with what to do about it; None if they can."""

    @abstractmethod
    def target(self) -> dict[str, str]:
        """What an engine built now needs in order to run: `name` and the versions it depends on.

        A function of the installed software, not of the machine; the manifest keeps it.
        """

    @abstractmethod
    def refuses(self, target: Mapping[str, str]) -> str | None:
        """Why an engine with this `target` can't run here; None if it can. Reads no engine."""

    @abstractmethod
    def tools(self) -> dict[str, str]:
        """Versions of the tools that shape the engine's bytes, by name."""

    def hint(self, module: Module, choices: Choices) -> str | None:
        """A message for the person waiting: a choice that would serve this module better."""
        del module, choices
        return None

    @abstractmethod
    def stored_weights(self, engine: Path, manifest: Manifest) -> dict[str, StoredWeight]:
        """Every weight that lies in an engine, by name."""

    @abstractmethod
    def runner(self, engine: Path, manifest: Manifest, options: RunnerOptions) -> Runner:
        """Load an engine whose files were checked.

        Args:
            engine: its directory.
            manifest: its manifest.
            options: how to run it.
        """

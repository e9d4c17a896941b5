"""The state of running sequences: a cache, the calls that feed it, and what they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.base import Arrays, Cache, Runner
from liquidc.errors import EngineError, InputError
from liquidc.ir.types import DType
from liquidc.manifest import Manifest
from liquidc.measure import available_memory
from liquidc.values import integer, integers, items, number

CHUNK = 512
"""Tokens that a prompt is fed at a time, so that memory does not grow with its length squared."""

UNCHECKED = 64 * 1024 * 1024
"""Bytes of a cache that are allocated without a look at what memory is free."""

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class DepthControls:
    """How deep to run.

    Attributes:
        gate_bias: added to every gate's score before it decides; above 0 runs more layers.
        min_depth: layers that every token runs at least.
        gate_force: by gate, -1 skip, 0 let the router decide, 1 run; None is all 0.
    """

    gate_bias: float = 0.0
    min_depth: int = 0
    gate_force: tuple[int, ...] | None = None


DEFAULT = DepthControls()
"""The routers decide."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the tokens of one call computed; outputs that the engine lacks are empty.

    Attributes:
        logits: f32[B, P, V], of the last token of each row or of all tokens.
        gates: bool[G, B, T], whether the token ran.
        gate_p: f32[G, B, T], the gate's probability.
        experts: i64[L, B, T, k], -1 where none.
    """

    logits: NDArray[np.float32]
    gates: NDArray[np.bool_]
    gate_p: NDArray[np.float32]
    experts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a session, to come back to.

    Attributes:
        lengths: tokens that each row held, i64[B].
        kv_len: cache slots that were taken, i64[L, B].
    """

    lengths: NDArray[np.int64]
    kv_len: NDArray[np.int64]


class Session:
    """The state of `batch` sequences: their cache and how long they are.

    Attributes:
        capacity: tokens that each row can hold.
        lengths: tokens that each row holds, i64[B].
    """

    def __init__(
        self, manifest: Manifest, runner: Runner, batch: int, capacity: int | None
    ) -> None:
        context = manifest.model.context
        batch = integer(batch, "batch")
        capacity = None if capacity is None else integer(capacity, "capacity")
        if batch < 1:
            raise InputError(f"batch must be 1 or more, not {batch}")
        if capacity is None:
            if context is None:
                raise InputError("the model names no context: give a capacity")
            capacity = context
        if capacity < 1 or (context is not None and capacity > context):
            limit = "" if context is None else f" and at most the context of the model, {context}"
            raise InputError(f"{capacity} tokens asked for; it must be 1 or more{limit}")
        _check_memory(manifest, batch, capacity)
        self._manifest = manifest
        self._runner = runner
        self._check_open()
        self.batch = batch
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self._cache: Cache = runner.new_cache(batch, capacity)
        self._inputs = {spec.name for spec in manifest.functions["prefill"].inputs}
        self._depth: DepthControls | None = None
        self._asked: Arrays = {}
        self._ones = np.ones(batch, np.int64)
        self._one: Arrays = self._known(
            {
                "input_ids": np.zeros((batch, 1), np.int64),
                "lengths": self._ones,
                "position_start": np.zeros(batch, np.int64),
                "logit_index": np.zeros((batch, 1), np.int64),
            }
        )
        self._one_asked = self._one

    @property
    def kv_len(self) -> NDArray[np.int64]:
        """Cache slots taken by layer and row, i64[L, B]."""
        return self._cache.kv_len

    def _check_open(self) -> None:
        """Check that there is an engine to run.

        Raises:
            InputError: it was closed.
        """
        if self._runner.closed:
            raise InputError("the engine was closed; load it again")

    def mark(self) -> Mark:
        """This moment, for `rewind`.

        Raises:
            InputError: the engine was closed.
        """
        self._check_open()
        return Mark(self.lengths.copy(), self._cache.kv_len)

    def rewind(self, mark: Mark) -> None:
        """Forget the tokens that were fed since the mark was made: nothing is computed or copied.

        Raises:
            InputError: the mark is of another session, or of a moment that was itself forgotten, or
                the engine was closed.
        """
        self._check_open()
        now = self._cache.kv_len
        fits = mark.lengths.shape == self.lengths.shape and mark.kv_len.shape == now.shape
        if not fits or (mark.lengths > self.lengths).any() or (mark.kv_len > now).any():
            raise InputError("the mark is not of an earlier moment of this session")
        self.lengths = mark.lengths.copy()
        self._cache.rewind(mark.kv_len)

    def prefill(
        self,
        ids: Ids | Sequence[Ids],
        *,
        every: bool = False,
        depth: DepthControls | None = None,
        chunk: int | None = None,
    ) -> StepResult:
        """Feed tokens to every row; may be called again to go on.

        Args:
            ids: the tokens of the only row, or a list of tokens per row; rows may have different
                lengths, and a row that is empty does not move.
            every: logits of all tokens instead of the last of each row.
            depth: how deep to run.
            chunk: tokens that are fed at a time.

        Returns:
            Everything over all T tokens of the longest row; what lies beyond a row's own length
            is padding (gates false, experts -1, logits unspecified).

        Raises:
            InputError: nothing to feed, an unknown token, too many tokens, an engine without cache
                that would need one, or one that was closed.
        """
        self._check_open()
        chunk = None if chunk is None else integer(chunk, "chunk")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be 1 or more, not {chunk}")
        rows = self._rows(ids)
        self._ask(depth or DEFAULT)
        count = max(map(len, rows))
        step = count if not self._can_continue else min(chunk or CHUNK, count)
        lengths = np.array([len(row) for row in rows], np.int64)
        tokens = np.zeros((self.batch, count), np.int64)
        for row, given in enumerate(rows):
            tokens[row, : len(given)] = given
        parts: list[StepResult] = []
        last: NDArray[np.float32] | None = None
        for start in range(0, count, step):
            part = tokens[:, start : start + step]
            result = self._step(part, np.clip(lengths - start, 0, part.shape[1]), every)
            parts.append(result)
            ends = (lengths > start) & (lengths <= start + step)
            if last is None:
                last = result.logits
            elif not every:
                last = np.where(ends[:, None, None], result.logits, last)
        if len(parts) == 1:
            return parts[0]
        logits = np.concatenate([p.logits for p in parts], 1) if every else last
        return StepResult(
            cast(NDArray[np.float32], logits),
            np.concatenate([p.gates for p in parts], 2),
            np.concatenate([p.gate_p for p in parts], 2),
            np.concatenate([p.experts for p in parts], 2),
        )

    def step(
        self, ids: Ids, *, active: Sequence[bool] | None = None, depth: DepthControls | None = None
    ) -> StepResult:
        """Feed one token to every row.

        Args:
            ids: a token per row.
            active: rows that take part; the others do not move.
            depth: how deep to run.

        Raises:
            InputError: as `prefill`.
        """
        self._check_open()
        if isinstance(ids, str) or not hasattr(ids, "__len__"):
            ids = integers(ids, "tokens")
        if len(ids) != self.batch:
            raise InputError(f"{len(ids)} tokens for {self.batch} rows")
        if active is None and self._can_continue and self.lengths.max() < self.capacity:
            check_ids(self._manifest, ids)
            self._ask(depth or DEFAULT)
            # The same arrays at every step: a runner that binds its inputs need not do so again.
            self._one["input_ids"][:, 0] = ids
            np.copyto(self._one["position_start"], self.lengths)
            return self._run(self._one_asked, self._ones, 1)
        taking = [True] * self.batch if active is None else list(active)
        rows = [[token] if takes else [] for token, takes in zip(ids, taking, strict=True)]
        return self.prefill(rows, depth=depth)

    @property
    def _can_continue(self) -> bool:
        return self._manifest.cache is not None

    def _rows(self, ids: Ids | Sequence[Ids]) -> list[list[int]]:
        given = items(ids, "tokens")
        nested = any(isinstance(row, Sequence) or getattr(row, "ndim", 0) for row in given)
        rows = [integers(row, "a token") for row in (given if nested else [given])]
        if len(rows) != self.batch:
            raise InputError(f"tokens for {len(rows)} rows, the session has {self.batch}")
        if not any(rows):
            raise InputError("there are no tokens to run")
        for row, given in enumerate(rows):
            _check_known(self._manifest, given)
            if self.lengths[row] + len(given) > self.capacity:
                raise InputError(
                    f"row {row} holds {self.lengths[row]} of {self.capacity} tokens; "
                    f"{len(given)} more don't fit"
                )
        if "lengths" not in self._inputs and len({len(row) for row in rows}) > 1:
            raise InputError(
                "rows of different lengths need padding, which this model does not know: "
                "give rows of one length"
            )
        if self.lengths.any() and not self._can_continue:
            raise InputError(
                "the engine has no cache, for its model does not mark cached attention: "
                "it computes logits of whole sequences only"
            )
        return rows

    def _ask(self, depth: DepthControls) -> None:
        """Make `depth` what the next call runs with, once it is checked."""
        if depth == self._depth:
            return
        check_controls(self._manifest, depth)
        gates = len(self._manifest.model.gates)
        asked: Arrays = {
            "gate_force": np.array(depth.gate_force or (0,) * gates, np.int8),
            "gate_bias": np.full(self.batch, depth.gate_bias, np.float32),
            "min_depth": np.full(self.batch, depth.min_depth, np.int64),
        }
        self._asked, self._depth = self._known(asked), depth
        self._one_asked = self._one | self._asked

    def _known(self, inputs: Arrays) -> Arrays:
        """Those that the engine takes."""
        return {name: value for name, value in inputs.items() if name in self._inputs}

    def _step(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], every: bool
    ) -> StepResult:
        batch, count = tokens.shape
        index = (
            np.tile(np.arange(count, dtype=np.int64), (batch, 1))
            if every
            else np.maximum(lengths - 1, 0)[:, None]
        )
        inputs: Arrays = {
            "input_ids": np.ascontiguousarray(tokens),
            "lengths": lengths,
            "position_start": self.lengths.copy(),
            "logit_index": index,
        }
        return self._run(self._known(inputs) | self._asked, lengths, count)

    def _run(self, inputs: Arrays, lengths: NDArray[np.int64], count: int) -> StepResult:
        out = self._runner.step(inputs, self._cache)
        self.lengths += lengths
        shape = (len(self._manifest.model.gates), self.batch, count)
        gates, p, experts = out.get("gates"), out.get("gate_p"), out.get("experts")
        return StepResult(
            out["logits"],
            np.zeros(shape, np.bool_) if gates is None else gates,
            np.zeros(shape, np.float32) if p is None else p,
            np.zeros((0, *shape[1:], 0), np.int64) if experts is None else experts,
        )


def _check_memory(manifest: Manifest, batch: int, capacity: int) -> None:
    """Check that a cache fits into memory, before it is allocated.

    Raises:
        EngineError: its element type is none.
        InputError: it does not fit.
    """
    cache = manifest.cache
    if cache is None:
        return
    if cache.dtype not in set(DType):
        raise EngineError(f"the manifest: a cache of {cache.dtype!r:.40}; compile the engine again")
    named = {"B": batch, "S": capacity}
    sizes = [dim if isinstance(dim, int) else named[dim] for dim in cache.shape]
    size = math.prod(sizes) * DType(cache.dtype).bytes * len(cache.buffers)
    if size > UNCHECKED and size > (free := available_memory()):
        raise InputError(
            f"a cache of {batch} rows of {capacity} tokens takes {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; ask for fewer"
        )


def check_controls(manifest: Manifest, depth: DepthControls) -> None:
    """Check that the engine can do what `depth` asks.

    Raises:
        InputError: it can't, or a value is out of range.
    """
    gates, layers = len(manifest.model.gates), manifest.model.layers
    number(depth.gate_bias, "gate_bias")
    integer(depth.min_depth, "min_depth")
    if depth.gate_force is not None:
        integers(depth.gate_force, "gate_force")
    if depth == DepthControls():
        return
    inputs = {spec.name for spec in manifest.functions["prefill"].inputs}
    for name in ("gate_bias", "min_depth", "gate_force"):
        default = getattr(DepthControls(), name)
        if getattr(depth, name) != default and name not in inputs:
            raise InputError(f"the engine has no depth gates to control: leave out {name}")
    if not np.isfinite(depth.gate_bias):
        raise InputError(f"gate_bias must be finite, not {depth.gate_bias}")
    if not 0 <= depth.min_depth <= layers:
        raise InputError(f"min_depth must be from 0 to {layers}, not {depth.min_depth}")
    force = depth.gate_force
    if force is not None and (len(force) != gates or not set(force) <= {-1, 0, 1}):
        raise InputError(f"gate_force must be {gates} numbers, each -1, 0 or 1")
    for index, (gate, asked) in enumerate(zip(manifest.model.gates, force or (), strict=False)):
        if gate.fixed and asked not in (0, gate.fixed):
            done = "run" if gate.fixed > 0 else "skip"
            raise InputError(
                f"gate_force: gate {index} (layer {gate.layer}) was fixed to {done} by the compile"
            )
    most = layers - len({gate.layer for gate in manifest.model.gates if gate.fixed < 0})
    if depth.min_depth > most:
        raise InputError(f"min_depth is {depth.min_depth}, this engine has {most} layers left")


def check_ids(manifest: Manifest, ids: Ids) -> None:
    """Check that tokens are integers that the engine knows.

    Raises:
        InputError: they are not.
    """
    _check_known(manifest, integers(ids, "a token"))


def _check_known(manifest: Manifest, ids: Ids) -> None:
    """`check_ids`, of what are integers.

    Raises:
        InputError: the engine does not know a token.
    """
    vocabulary = manifest.model.vocabulary
    for token in ids:
        if not 0 <= token < vocabulary:
            raise InputError(f"token {token} is not in the vocabulary of {vocabulary}")

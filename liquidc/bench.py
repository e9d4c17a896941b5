"""Times of one engine at several depths, driven by `gate_force` at run time.

The levels take turns, step by step, so that a change in the machine's speed meets all of them.
Reported are medians with the range and the 95 % interval of the median (order statistics: no
distribution is assumed). Caches are always filled with every layer on, so that all levels attend
over the same number of tokens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquidc.errors import InputError
from liquidc.ir import DType
from liquidc.measure import machine
from liquidc.runtime import Engine
from liquidc.session import DepthControls, StepResult

_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to time.

    Attributes:
        levels: shares of the gates that are on, in percent.
        cached: tokens in the cache before the first decode step.
        steps: decode steps per turn.
        turns: how often each level has its turn.
        prompt: tokens of a prefill; 0 leaves prefill out.
        seed: of the random token ids.
    """

    levels: tuple[int, ...] = (100, 50, 0)
    cached: int = 16
    steps: int = 16
    turns: int = 10
    prompt: int = 128
    seed: int = 0


@dataclass(slots=True)
class _Row:
    name: str
    shape: str
    seconds: list[float]
    bytes: list[int]


def bench(
    engine: Engine,
    options: BenchOptions | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Time an engine; the result has the JSON keys of `liquidc bench`.

    Raises:
        InputError: the options don't fit the engine.
    """
    options = options or BenchOptions()
    report = report or (lambda what, done, total: None)
    levels = {level: controls(engine, level) for level in _levels(engine, options)}
    prompt = _fits(engine, options)
    ids = np.random.Generator(np.random.PCG64(options.seed))
    tokens = ids.integers(0, engine.manifest.model.vocabulary, max(options.cached, prompt, 1))
    rows: dict[tuple[str, int], _Row] = {}
    for level in levels:
        name = _name(level)
        rows["decode", level] = _Row(f"decode, {name}", f"1 token, {options.cached} cached", [], [])
        if prompt:
            rows["prefill", level] = _Row(f"prefill, {name}", f"{prompt} tokens", [], [])
    for turn in range(-1, options.turns):
        report("turns", max(turn, 0), options.turns)
        for level, depth in levels.items():
            timed = _decode(engine, tokens.tolist(), options, depth)
            if turn >= 0:
                rows["decode", level].seconds += [seconds for seconds, _ in timed]
                rows["decode", level].bytes += [size for _, size in timed]
            if prompt:
                seconds = _prefill(engine, tokens[:prompt].tolist(), depth)
                if turn >= 0:
                    rows["prefill", level].seconds.append(seconds)
    report("turns", options.turns, options.turns)
    bandwidth = read_bandwidth()
    return {
        "rows": [_report(row, bandwidth) for row in rows.values()],
        "machine": machine(),
        "read_bandwidth_bytes_per_second": bandwidth,
        "settings": engine.runner.bench_note,
        "turns": options.turns,
    }


def controls(engine: Engine, level: int) -> DepthControls:
    """The free gates forced so that `level` percent of them are on, spread evenly over them."""
    gates = engine.manifest.model.gates
    count, force, free = len(gates), [0] * len(gates), 0
    for index, gate in enumerate(gates):
        if not gate.fixed:
            on = (free + 1) * level // 100 > free * level // 100
            force[index], free = 1 if on else -1, free + 1
    return DepthControls(gate_force=tuple(force)) if count else DepthControls()


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, from order statistics of the sorted samples."""
    ordered = sorted(samples)
    count = len(ordered)
    reach = 1.96 * math.sqrt(count) / 2
    low = max(math.floor(count / 2 - reach), 0)
    high = min(math.ceil(count / 2 + reach), count - 1)
    return ordered[low], ordered[high]


def read_bandwidth(size: int = 1024 * 1024 * 1024) -> float:
    """Bytes per second at which all cores read memory that is in no cache; the best of five.

    The memory is numpy's, which asks for large pages, and the largest element is looked for: sums
    are slower.
    """
    import torch

    data, threads = torch.from_numpy(np.ones(size // 4, np.float32)), torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        data.max()
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return size / best


def _levels(engine: Engine, options: BenchOptions) -> tuple[int, ...]:
    if any(not 0 <= level <= 100 for level in options.levels):
        raise InputError("levels are percentages, from 0 to 100")
    return tuple(dict.fromkeys(options.levels)) if engine.manifest.model.gates else (100,)


def _fits(engine: Engine, options: BenchOptions) -> int:
    """Tokens of a prefill, shortened to the context.

    Raises:
        InputError: decoding does not fit the context.
    """
    if options.cached < 1 or options.steps < 1 or options.turns < 1 or options.prompt < 0:
        raise InputError("cached, steps and turns must be 1 or more, prompt 0 or more")
    context = engine.manifest.model.context
    if context is None:
        return options.prompt
    if options.cached + options.steps + _WARM_UP > context:
        raise InputError(
            f"{options.cached} cached tokens and {options.steps} steps with {_WARM_UP} before them "
            f"don't fit the context of {context}; lower --cached or --steps"
        )
    return min(options.prompt, context)


def _name(level: int) -> str:
    return f"{level} % on"


def _decode(
    engine: Engine, tokens: list[int], options: BenchOptions, depth: DepthControls
) -> list[tuple[float, int]]:
    """Seconds and bytes of each step."""
    session = engine.session(capacity=options.cached + options.steps + _WARM_UP)
    session.prefill(tokens[: options.cached], depth=controls(engine, 100))
    timed: list[tuple[float, int]] = []
    for step in range(_WARM_UP + options.steps):
        start = time.perf_counter()
        result = session.step([tokens[step % len(tokens)]], depth=depth)
        seconds = time.perf_counter() - start
        if step >= _WARM_UP:
            timed.append((seconds, bytes_read(engine, result, session.kv_len[:, 0])))
    return timed


def _prefill(engine: Engine, tokens: list[int], depth: DepthControls) -> float:
    session = engine.session(capacity=len(tokens))
    start = time.perf_counter()
    session.prefill(tokens, depth=depth)
    return time.perf_counter() - start


def bytes_read(engine: Engine, result: StepResult, kv_len: NDArray[np.int64]) -> int:
    """Bytes of weights and cache that one decode step reads, by what its gates decided."""
    cost, cache = engine.manifest.cost, engine.manifest.cache
    ran = result.gates[:, 0, -1]
    total = cost.always
    total += sum(
        run if on else skip for on, run, skip in zip(ran, cost.run, cost.skip, strict=True)
    )
    if cache is not None:
        heads, width = cache.shape[1], cache.shape[3]
        if isinstance(heads, int) and isinstance(width, int):
            layers, _ = engine.ran(result, 0, -1)
            slot = 2 * heads * width * DType(cache.dtype).bytes
            total += sum(int(kv_len[layer]) * slot for layer in layers)
    return total


def _report(row: _Row, bandwidth: float) -> dict[str, Any]:
    ms = [1000 * seconds for seconds in row.seconds]
    median = float(np.median(ms))
    low, high = interval(ms)
    size = int(np.median(row.bytes)) if row.bytes else None
    share = None if size is None else size / (median / 1000) / bandwidth
    return {
        "name": row.name,
        "shape": row.shape,
        "ms_median": median,
        "ms_min": min(ms),
        "ms_max": max(ms),
        "ms_low": low,
        "ms_high": high,
        "samples": len(ms),
        "bytes_per_token": size,
        "bandwidth_share": share,
    }

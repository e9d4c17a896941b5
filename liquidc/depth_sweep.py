"""Quality against time of one engine, as its gates are biased at run time.

A bias is added to every gate's score: above 0 more layers run, below 0 fewer. For each bias the
engine predicts held-out text (bits per byte, teacher-forced) and decodes the same text token by
token, so that the times are those of the depths that real text asks for. The biases take turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from liquidc.bench import interval
from liquidc.errors import InputError
from liquidc.measure import machine
from liquidc.runtime import Engine
from liquidc.session import DepthControls, check_controls
from liquidc.verify import HeldOut


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What to run.

    Attributes:
        biases: added to the gates' scores.
        min_depth: layers that every token runs at least.
        windows: pieces of text, spread evenly over it.
        window: tokens of a piece.
        cached: tokens of a piece that are in the cache before decoding is timed.
        steps: tokens of a piece whose decoding is timed.
    """

    biases: tuple[float, ...]
    min_depth: int = 0
    windows: int = 16
    window: int = 256
    cached: int = 16
    steps: int = 32


@dataclass(slots=True)
class _Row:
    """Sums over what one bias did: nats, tokens predicted, layers run; seconds of each step."""

    depth: DepthControls
    nats: float = 0.0
    layers: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list[float])


def sweep(
    engine: Engine,
    data: HeldOut,
    options: SweepOptions,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run all biases; the result has the JSON keys of `liquidc bench --depth-bias`.

    Raises:
        InputError: the engine has no gates, or there is too little text.
    """
    report = report or (lambda what, done, total: None)
    if not engine.manifest.model.gates:
        raise InputError("the engine has no depth gates to bias: leave out --depth-bias")
    rows = {bias: _Row(DepthControls(bias, options.min_depth)) for bias in options.biases}
    for row in rows.values():
        check_controls(engine.manifest, row.depth)
    windows = _windows(engine, data, options)
    total_bytes = sum(
        data.starts[w.stop] - data.starts[w.start + 1] for w in windows if data.starts
    )
    for number, window in enumerate(windows):
        report("windows", number, len(windows))
        ids = [data.ids[i] for i in window]
        for row in rows.values():
            _predict(engine, ids, row)
        for row in rows.values():
            _decode(engine, ids, row, options)
    report("windows", len(windows), len(windows))
    return {
        "rows": [_told(bias, row, total_bytes) for bias, row in rows.items()],
        "machine": machine(),
        "windows": len(windows),
        "window": len(windows[0]),
        "min_depth": options.min_depth,
        "settings": engine.runner.bench_note,
    }


def _windows(engine: Engine, data: HeldOut, options: SweepOptions) -> list[range]:
    size = min(options.window, engine.manifest.model.context or options.window)
    if options.cached < 1 or options.steps < 1 or size < options.cached + options.steps:
        raise InputError(
            f"windows of {size} tokens can't hold {options.cached} cached ones and "
            f"{options.steps} steps; lower --cached or --steps"
        )
    places = len(data.ids) // size
    if not places:
        raise InputError(
            f"the held-out text has {len(data.ids)} tokens; at least {size} are needed"
        )
    count = min(options.windows, places)
    starts = [i * places // count * size for i in range(count)]
    return [range(start, start + size) for start in starts]


def _predict(engine: Engine, ids: Sequence[int], row: _Row) -> None:
    """Nats of each next token, and how many layers ran."""
    result = engine.evaluate(ids, depth=row.depth)
    logits = result.logits[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), np.array(ids[1:])]
    row.nats += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    row.tokens += len(ids) - 1
    row.layers += sum(len(engine.ran(result, 0, at)[0]) for at in range(len(ids) - 1))


def _decode(engine: Engine, ids: list[int], row: _Row, options: SweepOptions) -> None:
    """Seconds of each step over the text after its first tokens."""
    session = engine.session(capacity=options.cached + options.steps)
    session.prefill(ids[: options.cached], depth=row.depth)
    for token in ids[options.cached : options.cached + options.steps]:
        start = time.perf_counter()
        session.step([token], depth=row.depth)
        row.seconds.append(time.perf_counter() - start)


def _told(bias: float, row: _Row, size: int) -> dict[str, Any]:
    ms = [1000 * seconds for seconds in row.seconds]
    low, high = interval(ms)
    return {
        "depth_bias": bias,
        "bits_per_token": row.nats / math.log(2) / row.tokens,
        "bits_per_byte": row.nats / math.log(2) / size if size else None,
        "layers_run": row.layers / row.tokens,
        "ms_mean": float(np.mean(ms)),
        "ms_median": float(np.median(ms)),
        "ms_low": low,
        "ms_high": high,
        "samples": len(ms),
    }

"""Engine against PyTorch: the same text, compared in the model's own terms, then the trace proof.

Gates that were fixed at compile time are forced in the reference too: an engine must compute what
its own description says. How far that is from the original model is reported as `original`.

Where a gate flips, everything after it is computed on another route. The rest of that window is
therefore compared with a reference whose routes are forced to the engine's, token by token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.registry import get_backend
from liquidc.engine import build_log_path
from liquidc.errors import InputError
from liquidc.fidelity import (
    DepthMetrics,
    ExpertMetrics,
    GateMetrics,
    LogitMetrics,
    decide,
    matching,
)
from liquidc.heldout import held_out_text, parse_ids
from liquidc.manifest import reading_facts
from liquidc.records import read_object
from liquidc.runtime import Engine
from liquidc.trace_proof import Proof, prove
from liquidc.weight_check import Finding, check_weights

if TYPE_CHECKING:
    from liquidc.manifest import Manifest
    from liquidc.reference import Reference

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What passes. Lower bounds for agreements, upper bounds for differences."""

    gate_agreement: float = 1.0
    expert_overlap: float = 0.999
    greedy_match: float = 1.0
    top1_agreement: float = 0.999
    kl_nats: float = 1e-6
    logits_max_rel: float = 1e-4
    bits_per_byte_rel: float = 1e-4

    @classmethod
    @reading_facts()
    def of(cls, manifest: Manifest) -> Thresholds:
        """What an engine must keep: less if its weights or its cache have few bits.

        Raises:
            EngineError: the manifest does not tell their schemes.
        """
        told = next((p.facts for p in manifest.passes if p.name == "quantize" and p.facts), {})
        schemes = {weight["scheme"] for weight in told.get("weights", {}).values()}
        if any(p.name == "quantize-cache" for p in manifest.passes):
            schemes.add("int8")
        return next((BY_SCHEME[name] for name in BY_SCHEME if name in schemes), cls())

    def failures(self, metrics: dict[str, Any]) -> list[str]:
        """What in `metrics` does not pass, one line each."""
        lines: list[str] = []
        for name in ("gate_agreement", "expert_overlap", "greedy_match", "top1_agreement"):
            value, least = metrics[name], getattr(self, name)
            if value is not None and not value >= least:
                lines.append(f"{name} is {value:.6g}, at least {least:g} is needed")
        for name in ("kl_nats", "logits_max_rel"):
            value, most = metrics[name], getattr(self, name)
            if not value <= most:
                lines.append(f"{name} is {value:.3g}, at most {most:g} is allowed")
        ours, theirs = metrics["bits_per_byte"], metrics["bits_per_byte_reference"]
        if ours is not None and theirs and not ours <= theirs * (1 + self.bits_per_byte_rel):
            most = theirs * (1 + self.bits_per_byte_rel)
            lines.append(f"bits_per_byte is {ours:.6g}, at most {most:.6g} is allowed")
        return lines


_ANY = {"greedy_match": 0.0, "logits_max_rel": 1.0}
"""Greedy text and single logits say nothing about rounded weights: one near tie moves them."""
BY_SCHEME = {
    "int4": Thresholds(
        0.98, 0.9, top1_agreement=0.935, kl_nats=0.1, bits_per_byte_rel=0.02, **_ANY
    ),
    "fp8": Thresholds(0.98, 0.9, top1_agreement=0.935, kl_nats=0.1, bits_per_byte_rel=0.02, **_ANY),
    **dict.fromkeys(
        ("int8-dynamic", "int8"),
        Thresholds(
            0.997, 0.98, top1_agreement=0.983, kl_nats=0.01, bits_per_byte_rel=0.002, **_ANY
        ),
    ),
}
"""What passes where weights are quantised, the coarsest scheme first.

The most probable token is to be the same at 95 % and 99 % of positions; demanded is less by three
standard errors of the 2,048 positions that are compared unless more are asked for, 1.4 and 0.7 %.
"""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much to compare.

    Attributes:
        windows: pieces of text whose logits are compared.
        window: tokens of a piece, or fewer if the context is shorter.
        prompts: pieces of text that both continue greedily.
        prompt: tokens of such a piece.
        new_tokens: tokens by which they are continued.
        traced: prompts that are run under the profiler.
        traced_tokens: decoding steps after each of them.
        thresholds: what passes; None for those of the engine's scheme.
    """

    windows: int = 8
    window: int = 256
    prompts: int = 20
    prompt: int = 32
    new_tokens: int = 64
    traced: int = 4
    traced_tokens: int = 16
    thresholds: Thresholds | None = None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text that neither side was fitted to: ids, and the byte where each token starts.

    `starts` has one entry more than `ids`, the size of the text; it is empty for given ids.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...] = ()


def find_reference(engine: Path) -> Path:
    """The model directory that an engine was compiled from, by the build log beside it.

    Raises:
        InputError: there is no log, or the directory is gone.
    """
    log = build_log_path(engine)
    hint = "give the model with --model DIR"
    if not os.path.lexists(log):
        raise InputError(f"{engine}: no reference, for {log.name} is missing; {hint}")
    source = read_object(log, InputError).get("source")
    if not isinstance(source, str):
        raise InputError(f"{log}: names no model directory; {hint}")
    if not Path(source).is_dir():
        raise InputError(f"{engine}: no reference, for {source} is not there any more; {hint}")
    return Path(source)


def read_held_out(path: Path, engine: Engine) -> HeldOut:
    """Held-out data: a text file, or a `.json` list of token ids.

    Raises:
        InputError: it can't be read, is empty, or needs a tokenizer that the engine lacks.
    """
    text = held_out_text(path)
    if path.suffix == ".json":
        return HeldOut(tuple(engine.encode(parse_ids(path, text))))
    if engine.tokenizer is None:
        raise InputError(f"{path}: the engine has no tokenizer; give a .json list of token ids")
    ids, starts = engine.tokenizer.spans(text)
    return HeldOut(tuple(engine.encode(ids)), (*starts, len(text.encode())))


def verify(
    engine: Engine,
    reference: Reference,
    data: HeldOut,
    options: VerifyOptions | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Compare; the result has the JSON keys of `liquidc verify`, `passed` among them.

    Raises:
        InputError: there is too little text.
    """
    options = options or VerifyOptions()
    report = report or _quiet
    windows = _windows(engine, data, options)
    metrics = _compare(engine, reference, data, windows, report)
    prompts = _prompts(engine, data, options)
    metrics |= _greedy(engine, reference, prompts, options, report)
    report("trace", 0, 1)
    proof = prove(engine, prompts[: options.traced], options.traced_tokens)
    report("trace", 1, 1)
    thresholds = options.thresholds or Thresholds.of(engine.manifest)
    failures = thresholds.failures(metrics)
    skips = get_backend(engine.manifest.target["name"]).skips
    if not (proof.holds if skips else proof.covers):
        failures.append(_broken(proof))
    weights = _weights(engine, reference)
    failures += [
        f"weight {w.name} ({w.format}) is {w.error:.3g} from the checkpoint's, at most "
        f"{w.bound:g} is allowed"
        for w in weights
        if not w.fits
    ]
    return {
        "passed": not failures,
        "failures": failures,
        **metrics,
        **proof.report(),
        "weights_checked": len(weights),
        "weights_error": {
            format: max(w.error for w in weights if w.format == format)
            for format in sorted({w.format for w in weights})
        },
        "trace_rule": "equal" if skips else "at least",
        "thresholds": {name: getattr(thresholds, name) for name in Thresholds.__slots__},
        "windows": len(windows),
        "prompts": len(prompts),
    }


def _weights(engine: Engine, reference: Reference) -> list[Finding]:
    """All stored weights against the checkpoint; none if either is not a directory."""
    if engine.path is None or reference.source is None:
        return []
    backend = get_backend(engine.manifest.target["name"])
    return check_weights(backend.stored_weights(engine.path, engine.manifest), reference.source)


def _quiet(what: str, done: int, total: int) -> None:
    del what, done, total


def _windows(engine: Engine, data: HeldOut, options: VerifyOptions) -> list[range]:
    context = engine.manifest.model.context or options.window
    size = min(options.window, context, len(data.ids))
    if size < 2:
        raise InputError("the held-out text has fewer than two tokens; give a longer one")
    count = min(options.windows, len(data.ids) // size)
    return [range(i * size, (i + 1) * size) for i in range(count)]


def _prompts(engine: Engine, data: HeldOut, options: VerifyOptions) -> list[list[int]]:
    """Pieces spread evenly over the text."""
    context = engine.manifest.model.context or options.prompt + options.new_tokens
    size = min(options.prompt, len(data.ids), max(context - options.new_tokens, 1))
    room = len(data.ids) - size
    count = min(options.prompts, room + 1)
    starts = [room * i // max(count - 1, 1) for i in range(count)]
    return [list(data.ids[start : start + size]) for start in starts]


def _compare(
    engine: Engine, reference: Reference, data: HeldOut, windows: list[range], report: Report
) -> dict[str, Any]:
    model = engine.manifest.model
    logits, gates, experts = LogitMetrics(), GateMetrics(model.gates), ExpertMetrics()
    depth = DepthMetrics(model.layers, tuple(gate.layer for gate in model.gates))
    fixed = [gate.fixed for gate in model.gates]
    original = LogitMetrics()
    replayed = 0
    for number, window in enumerate(windows):
        report("windows", number, len(windows))
        ids = [data.ids[i] for i in window]
        ours = engine.evaluate(ids)
        theirs = reference.evaluate(ids, fixed)
        depth.add(ours.gates[:, 0], theirs.gates)
        flipped = (ours.gates[:, 0] != theirs.gates).any(0)
        if flipped.any():
            first = int(flipped.argmax())
            theirs = reference.replay(ids, theirs, first, ours.gates[:, 0], fixed)
            replayed += len(ids) - first
        decided = decide(model.gates, theirs.gate_p)
        gates.add(number, ours.gate_p[:, 0], ours.gates[:, 0], theirs.gate_p, decided)
        logits.add(ours.logits[0], theirs.logits)
        free = reference.evaluate(ids).logits if any(fixed) else None
        if free is not None:
            original.add(ours.logits[0], free)
        if data.starts:
            targets = np.array(ids[1:], np.int64)
            size = data.starts[window.stop] - data.starts[window.start + 1]
            logits.add_text(ours.logits[0, :-1], theirs.logits[:-1], targets, size)
            if free is not None:
                original.add_text(ours.logits[0, :-1], free[:-1], targets, size)
        if theirs.experts is not None:
            experts.add(number, ours.experts[:, 0], theirs.experts)
    report("windows", len(windows), len(windows))
    return {
        **logits.report(),
        **gates.report(),
        **experts.report(),
        **depth.report(),
        "original": original.report() if any(fixed) else None,
        "tokens": sum(map(len, windows)),
        "tokens_with_forced_routes": replayed,
    }


def _greedy(
    engine: Engine,
    reference: Reference,
    prompts: list[list[int]],
    options: VerifyOptions,
    report: Report,
) -> dict[str, Any]:
    context = engine.manifest.model.context
    count = options.new_tokens
    if context is not None:
        count = min(count, context - len(prompts[0]) + 1)
    fixed = [gate.fixed for gate in engine.manifest.model.gates]
    expected = reference.greedy(prompts, count, fixed)
    matched: list[int] = []
    for number, (prompt, theirs) in enumerate(zip(prompts, expected, strict=True)):
        report("greedy", number, len(prompts))
        matched.append(matching(greedy(engine, prompt, count), theirs, count))
    report("greedy", len(prompts), len(prompts))
    return {
        "greedy_match": sum(matched) / (count * len(prompts)),
        "greedy_prompts_identical": sum(n == count for n in matched),
        "greedy_tokens_per_prompt": count,
    }


def greedy(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after `prompt`, the most probable each time; end-of-text does not stop it."""
    session = engine.session(capacity=len(prompt) + count - 1)
    result = session.prefill(prompt)
    tokens: list[int] = []
    while True:
        tokens.append(int(_last(result.logits).argmax()))
        if len(tokens) == count:
            return tokens
        result = session.step(tokens[-1:])


def _last(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits[0, -1]


def _broken(proof: Proof) -> str:
    due, traced = sum(proof.computed), sum(proof.gates_traced)
    if proof.computed != proof.gates_traced:
        return f"the gates let {due} layers run, by the profiler {traced} were computed"
    return "experts computed other tokens than were sent to them, by the profiler"

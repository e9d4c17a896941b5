"""`liquidc profile`: run a corpus through a model or an engine and count what its gates decide.

What was counted is kept in `OUT.partial` from time to time and when the run is interrupted;
`resume` goes on from there and gives the same bytes as a run without interruption.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liquidc.corpus import Corpus
from liquidc.durable import NEW, PARTIAL, cannot_write, check_file, replace_file
from liquidc.errors import InputError
from liquidc.interrupt import Interruptible
from liquidc.observers import Observation, Observer, units
from liquidc.profile import (
    MARGINS,
    ExpertProfile,
    GateProfile,
    Paths,
    Profile,
    ProfiledModel,
    Sample,
    check_counts,
    merge,
)
from liquidc.records import canonical, from_json, to_json
from liquidc.version import __version__

KEEP_EVERY = 10.0
"""Seconds between two writes of what was counted so far."""
SHOWN = 256
"""Tokens of the sample."""


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """How to profile.

    Attributes:
        window: tokens that are run at a time, from an empty cache.
        max_tokens: stop after the block with which so many tokens were counted; None for all.
        sample: keep some text with its decisions, for the report's picture.
        resume: go on where a run stopped; else what it kept is removed.
        force: replace the output.
    """

    window: int = 512
    max_tokens: int | None = None
    sample: bool = True
    resume: bool = False
    force: bool = False


def profile_corpus(
    observer: Observer,
    data: Path,
    output: Path,
    options: ProfileOptions | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Profile, and write the result to `output`.

    Args:
        observer: what is run.
        data: text or `.jsonl`.
        output: the file to write.
        options: how.
        report: called with "bytes", how many were read, and how many there are.

    Raises:
        InputError: the data are empty or unusable, the output exists or can't be written, or what
            `resume` would go on with is damaged or of another run.
    """
    options = options or ProfileOptions()
    check_output(output, options)
    report = report or (lambda what, done, total: None)
    tokenizer = observer.tokenizer
    corpus = Corpus(data, None if tokenizer is None else tokenizer.encode)
    window = _window(observer, options.window)
    key = _Key(corpus.sha256, observer.model.sha256, window)
    partial = output.with_name(output.name + PARTIAL)
    counted, at = _resumed(partial, key, corpus) if options.resume else (None, 0)
    if not options.resume:
        partial.unlink(missing_ok=True)
    kept = time.monotonic()

    def keep() -> None:
        if counted is not None:
            replace_file(partial, _State(key, at, counted).to_bytes())

    with Interruptible() as signals:
        try:
            for block in corpus.blocks(window, at):
                tally = Tally(observer, key.corpus)
                for ids in block.sequences:
                    _check_ids(observer, ids, data)
                    sample = options.sample and counted is None and not tally.tokens
                    tally.add(ids, observer.observe(ids), sample=sample)
                parts = [part for part in (counted, tally.profile()) if part is not None]
                counted, at = merge(parts) if parts else None, block.end
                report("bytes", at, corpus.size)
                if time.monotonic() - kept > KEEP_EVERY:
                    keep()
                    kept = time.monotonic()
                limit = options.max_tokens
                if limit is not None and counted is not None and counted.tokens >= limit:
                    break
            if counted is None or counted.tokens < 2:
                found = "no token" if counted is None else "one token"
                raise InputError(
                    f"{data}: {found}; a profile needs two at least, and thousands to be used"
                )
            signals.hold()
            replace_file(output, counted.to_bytes())
            partial.unlink(missing_ok=True)
        except (KeyboardInterrupt, OSError, MemoryError) as error:
            signals.hold()
            with suppress(OSError):  # what was kept before stays
                keep()
            said = f"what was counted is in {partial}; go on with --resume"
            said = said if partial.exists() else ""
            if isinstance(error, OSError) and (refusal := cannot_write(output, error, said)):
                raise refusal from None
            if said:
                error.add_note(said)
            raise
    return counted


def check_output(output: Path, options: ProfileOptions) -> None:
    """Find out that the profile can't be written, before any work is done.

    Raises:
        InputError: it can't.
    """
    check_file(output, "a profile", force=options.force, beside=(NEW, PARTIAL, PARTIAL + NEW))


def _window(observer: Observer, wanted: int) -> int:
    if wanted < 1:
        raise InputError(f"window must be 1 or more, not {wanted}")
    context = observer.model.context
    return wanted if context is None else min(wanted, context)


def _check_ids(observer: Observer, ids: tuple[int, ...], data: Path) -> None:
    for token in ids:
        if not 0 <= token < observer.model.vocabulary:
            size = observer.model.vocabulary
            raise InputError(f"{data}: token {token} is not in the vocabulary of {size}")


@dataclass(frozen=True, slots=True)
class _Key:
    """What the counts depend on."""

    corpus: str
    model: str
    window: int


@dataclass(frozen=True, slots=True)
class _State:
    """What was counted of a corpus up to the byte `at`."""

    key: _Key
    at: int
    profile: Profile

    def to_bytes(self) -> bytes:
        """The file: the record and the sha256 of its bytes without that."""
        state = to_json(self)
        return canonical({**state, "sha256": hashlib.sha256(canonical(state)).hexdigest()})


def _resumed(partial: Path, key: _Key, corpus: Corpus) -> tuple[Profile | None, int]:
    """What was counted before, and the byte from which to go on.

    Raises:
        InputError: it is damaged, or of another run.
    """
    if not partial.exists():
        return None, 0
    data = partial.read_bytes()
    try:
        entries = json.loads(data)
        state = from_json(_State, {name: entries[name] for name in ("key", "at", "profile")})
        check_counts(state.profile)
        if state.to_bytes() != data or not 0 <= state.at <= corpus.size:
            raise ValueError("not as it was written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{partial}: damaged ({error}); without --resume it starts anew") from None
    for name in ("corpus", "model", "window"):
        if getattr(state.key, name) != getattr(key, name):
            raise InputError(f"{partial}: of another {name}; without --resume it starts anew")
    return state.profile, state.at


class Tally:
    """Counts under way.

    Args:
        observer: what is observed.
        corpus: hash of the data.
    """

    def __init__(self, observer: Observer, corpus: str) -> None:
        self.model, self.corpus, self.tokens = observer.model, corpus, 0
        self._tokenizer = observer.tokenizer
        gates = len(self.model.gates)
        self._tau = torch.tensor([gate.threshold for gate in self.model.gates]).double()[:, None]
        self._run = np.zeros(gates, np.int64)
        self._margins = np.zeros((gates, len(MARGINS) + 1), np.int64)
        self._sums: list[list[int]] = [[0, 0] for _ in range(gates)]
        self._transitions = np.zeros((max(gates - 1, 0), 4), np.int64)
        self._paths = Counter[str]()
        self._length = gates
        self._experts = {
            info.layer: _ExpertTally(info.experts, info.per_token) for info in self.model.experts
        }
        self._sample: Sample | None = None

    def add(self, ids: tuple[int, ...], seen: Observation, *, sample: bool = False) -> None:
        """Count one sequence."""
        self.tokens += len(ids)
        self._run += seen.gates.sum(1)
        p = torch.from_numpy(seen.gate_p).double()
        margin = (p - self._tau).abs()
        edges = torch.tensor(MARGINS, dtype=torch.float64)
        classes = torch.bucketize(margin, edges, right=True).numpy()
        entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / np.log(2)
        for gate in range(len(self._sums)):
            self._margins[gate] += np.bincount(classes[gate], minlength=len(MARGINS) + 1)
            self._sums[gate][0] += units(margin[gate])
            self._sums[gate][1] += units(entropy[gate])
        digits = seen.gates.astype(np.int64)
        for gate in range(len(digits) - 1):
            pairs = 2 * digits[gate] + digits[gate + 1]
            self._transitions[gate] += np.bincount(pairs, minlength=4)
        paths = ["".join(map(str, column)) for column in digits.T.tolist()]
        self._paths.update(path[: self._length] for path in paths)
        fitting = Paths.of(self._length, self._paths)
        if fitting.gates < self._length:
            self._length, self._paths = fitting.gates, Counter(fitting.counts)
        for layer, tally in self._experts.items():
            tally.add(seen.experts[layer], seen.entropy.get(layer), seen.saliency.get(layer))
        if sample:
            pieces = [
                str(i) if self._tokenizer is None else self._tokenizer.decode([i]) for i in ids
            ]
            self._sample = Sample(tuple(pieces[:SHOWN]), tuple(paths[:SHOWN]))

    def profile(self) -> Profile | None:
        """What was counted; None if nothing was."""
        if not self.tokens:
            return None
        return Profile(
            model=ProfiledModel(self.model.sha256, self.model.type, self.model.layers),
            tokens=self.tokens,
            data={self.corpus: self.tokens},
            gates=tuple(
                GateProfile(gate.layer, gate.threshold, run, tuple(margins), *sums)
                for gate, run, margins, sums in zip(
                    self.model.gates,
                    self._run.tolist(),
                    self._margins.tolist(),
                    self._sums,
                    strict=True,
                )
            ),
            transitions=tuple(tuple(row) for row in self._transitions.tolist()),
            paths=Paths.of(self._length, self._paths),
            experts=tuple(tally.profile(layer) for layer, tally in self._experts.items()),
            sample=self._sample,
            liquidc=__version__,
        )


class _ExpertTally:
    """Counts of one layer's experts."""

    def __init__(self, experts: int, per_token: int) -> None:
        self.experts, self.per_token, self.tokens = experts, per_token, 0
        self.load = np.zeros(experts, np.int64)
        self.together = np.zeros((experts, experts), np.int64)
        self.entropy: int | None = 0
        self.saliency: np.ndarray[Any, Any] | None = np.zeros(experts, np.int64)

    def add(
        self, chosen: np.ndarray[Any, Any], entropy: int | None, saliency: tuple[int, ...] | None
    ) -> None:
        """Count the experts i64[T, k] of one sequence."""
        used = np.zeros((len(chosen), self.experts), np.int64)
        token, slot = np.nonzero((chosen >= 0) & (chosen < self.experts))
        used[token, chosen[token, slot]] = 1
        self.load += used.sum(0)
        both = used.T @ used
        self.together += both - np.diag(np.diag(both))
        ran = int((chosen >= 0).any(-1).sum())
        self.tokens += ran
        if ran and (entropy is None or saliency is None):
            self.entropy = self.entropy if entropy is not None else None
            self.saliency = self.saliency if saliency is not None else None
        if self.entropy is not None and entropy is not None:
            self.entropy += entropy
        if self.saliency is not None and saliency is not None:
            self.saliency = self.saliency + np.array(saliency, np.int64)

    def profile(self, layer: int) -> ExpertProfile:
        """What was counted."""
        return ExpertProfile(
            layer,
            self.per_token,
            self.tokens,
            tuple(self.load.tolist()),
            tuple(tuple(row) for row in self.together.tolist()),
            self.entropy,
            None if self.saliency is None else tuple(self.saliency.tolist()),
        )

"""Each peer in a process of its own, told what to run by a pipe and timed there."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from liquidc.measure import resident_memory

WARM_UP = 2
"""Steps of a turn that are not counted."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What one turn took.

    Attributes:
        seconds: of each step, or of the prefill.
        bytes: of weights and cache that each step had to read; empty if that is not known.
        logits: of the last step, f32[B, V].
    """

    seconds: list[float]
    bytes: list[int]
    logits: Any


@dataclass(frozen=True, slots=True)
class Decode:
    """A turn of decoding: fill the cache, then one token of each row at a time.

    Attributes:
        held: tokens in the cache, by row.
        tokens: of each step, by row.
        force: what each gate is forced to, by step.
    """

    held: list[list[int]]
    tokens: list[list[int]]
    force: list[list[int]]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A turn of one prompt into an empty cache."""

    tokens: list[int]
    force: list[int]


class Worker:
    """A process with one peer, which loads at once.

    Args:
        kind: a key of `peers.KINDS`.
        path, threads, capacity: as `Peer` takes them.
    """

    def __init__(self, kind: str, path: Path, threads: int, capacity: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, kind, path, threads, capacity))
        self._process.start()
        theirs.close()
        self.resident = int(self._ask(None))

    def run(self, asked: Decode | Prefill) -> Timed:
        """One turn.

        Raises:
            RuntimeError: it failed; tells how.
        """
        return self._ask(asked)

    def memory(self) -> int:
        """Resident bytes now."""
        return int(self._ask("memory"))

    def _ask(self, asked: Any) -> Any:
        if asked is not None:
            self._pipe.send(asked)
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process ended: {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send("end")
            self._process.join(10)
            self._process.kill()


def _serve(pipe: Connection, kind: str, path: Path, threads: int, capacity: int) -> None:
    from bench.suite.peers import KINDS

    try:
        peer = KINDS[kind](path, threads, capacity)
        pipe.send(resident_memory())
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    while (asked := pipe.recv()) != "end":
        try:
            if asked == "memory":
                pipe.send(resident_memory())
            elif isinstance(asked, Prefill):
                start = time.perf_counter()
                logits = peer.prefill(asked.tokens, asked.force)
                pipe.send(Timed([time.perf_counter() - start], [], logits))
            else:
                pipe.send(_decode(peer, asked))
        except Exception:
            pipe.send(traceback.format_exc(limit=-3))


def _decode(peer: Any, asked: Decode) -> Timed:
    peer.fill(asked.held)
    seconds: list[float] = []
    notes: list[Any] = []
    logits = None
    for tokens, force in zip(asked.tokens, asked.force, strict=True):
        start = time.perf_counter()
        logits = peer.step(tokens, force)
        seconds.append(time.perf_counter() - start)
        notes.append(peer.note())
    sizes = map(peer.touched, notes[WARM_UP:])  # afterwards: it would disturb the steps
    known = [size for size in sizes if size is not None]
    return Timed(seconds[WARM_UP:], known, np.array(logits))

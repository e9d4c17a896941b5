"""What a compile will take, before it runs: an estimate of bytes, memory and time.

It counts what does not depend on a machine (ops, bytes, multiplications) and multiplies the counts
by rates that were measured once: on two shared cores of an AMD EPYC, torch 2.13, with compiles of
samples/tiny-liquid and of random checkpoints of up to 8 billion weights. Another machine may take
a few times more or less.
"""

from __future__ import annotations

from dataclasses import dataclass

from liquidc import facts
from liquidc.backends.weights_file import ALIGNMENT
from liquidc.ir import Module, ops
from liquidc.ir.weights import byte_size
from liquidc.passlog import weights_in_use

MEASURED_ON = "2 cores of an AMD EPYC, torch 2.13"
"""The machine of the rates below."""
START_SECONDS = 1.5
"""Imports, config and headers."""
SECONDS_PER_OP = 2.5e-3
"""Trace, passes and lowering, by op of the traced module."""
HASHED_BYTES_PER_SECOND = 1.2e9
"""The checkpoint is hashed once."""
WRITTEN_BYTES_PER_SECOND = 0.18e9
"""Floats that are read, cast or rounded, and written, by byte of the checkpoint."""
FLOPS_PER_SECOND = 30e9
"""The interpreter on one thread."""
SECONDS_PER_INTERPRETED_OP = 30e-6
"""What the interpreter spends on an op besides its products."""
BASE_BYTES = 400 * 10**6
"""Resident memory of a compile of next to nothing: Python, torch, ONNX."""
BYTES_PER_OP = 10_000
"""Memory of an op in the traced module, its copies in the passes and in the graph."""
BLOCK_BYTES = 100 * 10**6
"""Memory in which weights are evaluated while they are written, at most."""
REPORT_BYTES = 40_000
"""Bytes of a report and a manifest that have little to tell."""
GRAPH_BYTES_PER_OP = 300
"""Bytes of an op in the engine's graph or IR text, and in report and manifest."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a compile does with held-out or calibration text, in the interpreter.

    Attributes:
        tokens: run through the model, each run counted.
        calls: of the model, each with one window of text.
        copies: of all weights as floats of 32 bits that are in memory at a time.
        held: bytes besides them.
    """

    tokens: int = 0
    calls: int = 0
    copies: int = 0
    held: int = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.tokens + other.tokens,
            self.calls + other.calls,
            max(self.copies, other.copies),
            max(self.held, other.held),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a compile will take.

    Attributes:
        weights_bytes: of the engine's weights, exact unless `at_most`.
        engine_bytes: of all files of the engine.
        peak_memory_bytes: resident memory.
        seconds: on the machine that the rates are from.
        at_most: some choice is made by measuring: the weights may take fewer bytes.
        measured_on: that machine.
    """

    weights_bytes: int
    engine_bytes: int
    peak_memory_bytes: int
    seconds: float
    at_most: bool
    measured_on: str = MEASURED_ON


def estimate(
    traced: Module,
    compiled: Module,
    work: Work,
    *,
    checkpoint: int,
    copied: int,
    most: int | None = None,
    at_most: bool = False,
) -> Estimate:
    """Estimate a compile.

    Args:
        traced: the model before the passes.
        compiled: after them, as far as they compute nothing.
        work: what is run on text.
        checkpoint: bytes of the checkpoint.
        copied: bytes of files that are copied into the engine.
        most: bytes that the weights may take because that is asked for.
        at_most: whether measuring may leave fewer bytes of weights.
    """
    count = sum(1 for _ in traced.walk())
    floats = facts.total_bytes(expr.type for expr in traced.weights.values())
    weights = weights_in_use(compiled)
    weights = weights if most is None else min(weights, most)
    graph = REPORT_BYTES + GRAPH_BYTES_PER_OP * sum(1 for _ in compiled.walk())
    flops = work.tokens * floats / 2  # a multiplication and an addition for each weight of 4 bytes
    return Estimate(
        weights_bytes=weights,
        engine_bytes=weights + _padding(compiled) + graph + copied,
        peak_memory_bytes=BASE_BYTES
        + BYTES_PER_OP * count
        + max(min(BLOCK_BYTES, floats), work.copies * floats + work.held),
        seconds=round(
            START_SECONDS
            + SECONDS_PER_OP * count
            + checkpoint / HASHED_BYTES_PER_SECOND
            + checkpoint / WRITTEN_BYTES_PER_SECOND
            + flops / FLOPS_PER_SECOND
            + work.calls * count * SECONDS_PER_INTERPRETED_OP,
            1,
        ),
        at_most=at_most,
    )


def _padding(module: Module) -> int:
    """Bytes between the weights, each of which starts at a page of its own."""
    used = {op.weight for op in module.walk() if isinstance(op, ops.Weight) and op.y.uses}
    return sum(-byte_size(module.weights[name].type) % ALIGNMENT for name in used)

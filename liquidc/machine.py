"""What one machine takes for the parts of a gated layer: a measured table and a cost model.

The table is a file that `bench/machine_table.py` writes; a compile reads one and never measures
itself, so the same inputs give the same engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from liquidc.errors import InputError
from liquidc.records import from_json, read_json

DEFAULT = Path(__file__).with_name("machines") / "onnxruntime-cpu.json"


@dataclass(frozen=True, slots=True)
class MachineTable:
    """Medians measured on one machine; times in nanoseconds.

    Attributes:
        name: of the machine, for reports.
        tools: versions that were measured.
        threads: that one operation could use.
        rows: numbers of rows of a product, rising from 1.
        product: by entry of `rows`, the time for each KiB of the weight.
        conditional: of an `if`, its arms' work apart.
        op: of an op with next to nothing to compute.
        find_rows: of finding a mask's rows, taking them and putting them back, when there are few.
        move_row: of taking and putting back one KiB more.
    """

    name: str
    tools: dict[str, str]
    threads: int
    rows: tuple[int, ...]
    product: tuple[float, ...]
    conditional: float
    op: float
    find_rows: float
    move_row: float

    def product_time(self, rows: float, weight_bytes: float) -> float:
        """Of products of `rows` rows with weights; between two entries, linear in the rows."""
        kib, known = weight_bytes / 1024, list(zip(self.rows, self.product, strict=True))
        rows = max(rows, self.rows[0])
        for (low, a), (high, b) in pairwise(known):
            if rows <= high:
                return kib * (a + (b - a) * (rows - low) / (high - low))
        last, time = known[-1]
        return kib * time * rows / last


@dataclass(frozen=True, slots=True)
class Work:
    """A gated part of the model.

    Attributes:
        weights: bytes of weights that every token reads there.
        experts: bytes of all experts' weights.
        share: of the experts that one token uses, k of E.
        ops: number of ops.
        conditionals: that the gate decides.
        width: bytes of one token's state.
    """

    weights: int
    experts: int
    share: float
    ops: int
    conditionals: int
    width: int


@dataclass(frozen=True, slots=True)
class Times:
    """Expected time of one call, in nanoseconds."""

    branch: float
    compact: float
    mask: float


def expected(table: MachineTable, work: Work, tokens: int, rate: float) -> Times:
    """What the three lowerings of a gate cost in a call of `tokens` tokens of which `rate` run.

    Decisions of a call's tokens are taken as independent, so that some token runs with probability
    a = 1 - (1 - rate)^tokens:

    - branch: the `if`s, and with probability a the dense work for all tokens;
    - compact: the `if`s, and with probability a the dense work for the rate · tokens / a that run,
      and the taking and putting back of their rows;
    - mask: the dense work for all tokens.

    Experts compute only tokens that run, however the layer is lowered: of E experts, each gets
    k / E of them, or few experts one each. Attention over the cache is left out.
    """
    some = 1.0 if rate >= 1 else -math.expm1(tokens * math.log1p(-rate))
    running = rate * tokens / some if some else 0.0
    each = running * work.share
    routed = min(1.0, each) * table.product_time(each, work.experts)
    dense = table.product_time(tokens, work.weights) + work.ops * table.op
    few = table.product_time(running, work.weights) + work.ops * table.op
    moved = table.find_rows + table.move_row * running * work.width / 1024
    asked = work.conditionals * table.conditional
    return Times(
        asked + some * (dense + routed),
        asked + some * (few + routed + work.conditionals * moved),
        dense + some * routed,
    )


def read_table(path: Path) -> MachineTable:
    """A table from its file.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        table = from_json(MachineTable, read_json(path, InputError))
    except ValueError as error:
        raise InputError(f"{path}: not a machine table: {error}") from None
    numbers = (*table.product, table.conditional, table.op, table.find_rows, table.move_row)
    rising = all(a < b for a, b in pairwise(table.rows))
    if len(table.rows) != len(table.product) or table.rows[:1] != (1,) or not rising:
        raise InputError(f"{path}: rows must rise from 1, with a product time for each")
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise InputError(f"{path}: times must be 0 or more")
    return table

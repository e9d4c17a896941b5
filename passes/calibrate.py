"""Rounds weights with regard to their inputs, layer by layer, on calibration text.

Where a product has a weight to quantise, its inputs from all windows of text are at hand: the
weight is rounded, and what follows sees the rounded one. Only tokens that run a layer, and that use
an expert, count for it. What was made is written to the store at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from liquidc.ir import Module, Op, Value, ops, semantics
from liquidc.ir.quantised import (
    BITS,
    Blocks,
    Grid,
    Quantised,
    dequantise,
    pack,
)
from liquidc.passes.gptq import gptq, inverse_factor
from liquidc.passes.stream import Calibration, Lane, Stream, affordable, reads

LEAST = 32
"""A weight that fewer tokens reach is rounded to the nearest: they say little of its inputs."""
WIDEST = 6144
"""So is a weight with longer rows: H and its factors would take over 0.9 GB."""
ROWS = 4096
"""Rows of a weight that are rounded at a time."""


@dataclass(frozen=True, slots=True)
class Reached:
    """How many tokens had a say in a weight: one number, or one for each expert.

    Attributes:
        tokens: of the text.
        nearest: experts, 0 for a weight that is none, that were rounded to the nearest.
        reason: why they were.
    """

    tokens: tuple[int, ...]
    nearest: tuple[int, ...]
    reason: str


def calibrate(
    module: Module, grids: Mapping[str, Grid], calibration: Calibration
) -> tuple[dict[str, Reached], int]:
    """Round the weights that `grids` names; codes, scales and zero points go to the store.

    Returns:
        By name of the weight, without those that the main function does not use; and how many
        tokens were run.

    Raises:
        InputError: too little text fits into the memory that a compile may take.
    """
    main = next(iter(module.functions.values()))
    fitting = affordable(calibration, main)
    run = _Run(module, grids, fitting)
    run.run(main, fitting.windows)
    return run.reached, sum(map(len, fitting.windows))


class _Run(Stream):
    """Rounds what it meets.

    Attributes:
        reached: by name of the weight.
    """

    def __init__(self, module: Module, grids: Mapping[str, Grid], calibration: Calibration) -> None:
        super().__init__(module, calibration.source)
        self._grids, self._calibration = grids, calibration
        self.reached: dict[str, Reached] = {}

    def wants(self, op: Op) -> bool:
        """See `Stream`."""
        return any(self._name(value) for value in reads(op))

    def finish(self, op: Op, lanes: list[Lane]) -> None:
        """See `Stream`."""
        if isinstance(op, ops.Linear):  # a head's logits are of no use
            self._round_linear(op, lanes)
        else:
            self.op(op, lanes)

    def op(self, op: Op, lanes: list[Lane]) -> list[Sequence[torch.Tensor]]:
        """See `Stream`."""
        if isinstance(op, ops.GroupedExperts) and self._name(op.gate_up) and self._name(op.down):
            return self._experts(op, lanes)
        if isinstance(op, ops.Linear) and self._name(op.weight):
            self._round_linear(op, lanes)
        return super().op(op, lanes)

    def load(self, name: str) -> torch.Tensor:
        """See `Stream`."""
        return self._rounded(name) if name in self.reached else super().load(name)

    def _name(self, value: Value) -> str:
        """The weight that a value is, if it is to be rounded."""
        name = value.op.weight if isinstance(value.op, ops.Weight) else ""
        return name if name in self._grids else ""

    def _experts(self, op: ops.GroupedExperts, lanes: list[Lane]) -> list[Sequence[torch.Tensor]]:
        """First what an expert reads, then what lies between its two products."""
        first, second = self._name(op.gate_up), self._name(op.down)
        count = self.module.weights[first].sizes[0]
        if first not in self.reached:
            told: dict[str, list[tuple[int, str]]] = {first: [], second: []}
            for expert in range(count):
                given = [_tokens(op, lane, expert) for lane in lanes]
                told[first].append(self._round_one(first, given, expert))
                gate_up = self._rounded(first, expert)
                between = [_between(x, gate_up) for x in given]
                told[second].append(self._round_one(second, between, expert))
            for name, each in told.items():
                self._tell(name, each)

        def swiglu(tokens: torch.Tensor, expert: int) -> torch.Tensor:
            between = _between(tokens, self._rounded(first, expert))
            return F.linear(between, self._rounded(second, expert))

        results: list[Sequence[torch.Tensor]] = []
        for lane in lanes:
            x, index, weight = (lane.frame.values[v] for v in (op.x, op.index, op.weight))
            results.append([semantics.map_experts(x, index, weight, count, swiglu, op.apply)])
        return results

    def _round_linear(self, op: ops.Linear, lanes: list[Lane]) -> None:
        name = self._name(op.weight)
        if name not in self.reached:
            inputs = [lane.executed(lane.frame.values[op.x]) for lane in lanes]
            self._tell(name, [self._round_one(name, inputs, None)])

    def _tell(self, name: str, each: Sequence[tuple[int, str]]) -> None:
        nearest = tuple(number for number, (_, reason) in enumerate(each) if reason)
        reason = next((reason for _, reason in each if reason), "")
        self.reached[name] = Reached(tuple(tokens for tokens, _ in each), nearest, reason)
        self._calibration.report("weights calibrated", len(self.reached), len(self._grids))

    def _round_one(
        self, name: str, inputs: Sequence[torch.Tensor], expert: int | None
    ) -> tuple[int, str]:
        """Round a weight, or that of an expert, and store it; the tokens, and why it is nearest.

        Rows that are stored already, by a compile that this one continues, are not rounded again.
        """
        grid, expr = self._grids[name], self.module.weights[name]
        lead = () if expert is None else ((expert, expert + 1),)
        count, columns = expr.sizes[-2:]
        tokens = sum(len(x) for x in inputs)
        reason = _reason(grid, tokens, columns)
        first = count * (expert or 0)
        if not self._missing(name, first + count):
            return tokens, reason
        factor = None
        if not reason:
            hessian = torch.zeros(columns, columns, dtype=torch.float64)
            for x in inputs:
                wide = x.double()
                hessian += wide.T @ wide
            factor = inverse_factor(hessian)
        for start in range(0, count, ROWS):
            rows = (start, min(start + ROWS, count))
            missing = self._missing(name, first + rows[1])
            if not missing:
                continue
            weight = expr.read(self.source, (*lead, rows, (0, columns))).float()
            weight = weight[0] if lead else weight
            made = grid.nearest(weight) if factor is None else gptq(weight, factor, grid)
            self._keep(name, made, missing)
        return tokens, reason

    def _missing(self, name: str, rows: int) -> dict[str, Quantised]:
        """The parts of a weight of which the store has fewer than so many rows."""
        store, all_rows = self._calibration.store, math.prod(self.module.weights[name].sizes[:-1])
        return {
            kind: part
            for kind, part in self._parts(name).items()
            if store.stored(part.stored, part.type) < math.prod(part.sizes) // all_rows * rows
        }

    def _keep(self, name: str, made: Blocks, missing: Mapping[str, Quantised]) -> None:
        narrow = BITS[self._grids[name].format] == 4
        zeros = made.zeros
        tensors = {"codes": pack(made.codes) if narrow else made.codes, "scales": made.scales}
        if zeros is not None:
            tensors["zeros"] = pack(zeros) if narrow else zeros
        for kind, part in missing.items():
            self._calibration.store.append(part.stored, part.type, tensors[kind])

    def _parts(self, name: str) -> dict[str, Quantised]:
        return self._grids[name].parts(self.module.weights[name], "gptq")

    def _rounded(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The floats of what was stored."""
        read: dict[str, torch.Tensor] = {}
        for kind, part in self._parts(name).items():
            first, *rest = part.sizes
            rows = (0, first) if expert is None else (expert, expert + 1)
            tensor = part.read(self.source, (rows, *((0, size) for size in rest)))
            read[kind] = tensor if expert is None else tensor[0]
        format = self._grids[name].format
        return dequantise(read["codes"], read["scales"], read.get("zeros"), format)


def _reason(grid: Grid, tokens: int, columns: int) -> str:
    """Why a weight is rounded to the nearest; empty if it is not."""
    if grid.format == "e4m3":
        return "the steps of e4m3 are not even"
    if columns > WIDEST:
        return f"rows of {columns} elements, more than {WIDEST}"
    if tokens < LEAST:
        return f"fewer than {LEAST} tokens"
    return ""


def _between(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """What lies between the two products of an expert."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up


def _tokens(op: ops.GroupedExperts, lane: Lane, expert: int) -> torch.Tensor:
    """What an expert reads, [n, K]."""
    x, index, weight = (lane.frame.values[v] for v in (op.x, op.index, op.weight))
    if lane.mask is not None and index.shape[:-1] == lane.mask.shape:
        index = torch.where(lane.mask[..., None], index, -1)
    where, slot = (index.flatten(0, -2) == expert).nonzero(as_tuple=True)
    inputs = x.flatten(0, -2)[where]
    if op.apply == "input":
        return inputs * weight.flatten(0, -2)[where, slot][:, None]
    return inputs

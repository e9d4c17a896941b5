"""Rounds weights with regard to their inputs, layer by layer, on calibration text.

All windows of text go through the main function together, op by op. Where a product has a weight
to quantise, its inputs from all windows are at hand: the weight is rounded, and what follows sees
the rounded one. Only tokens that run a layer, and that use an expert, count for it. Weights are in
memory while one op needs them; what was made is written to the store at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Op, Value, ops, semantics
from liquidc.ir.interpreter import Frame, Interpreter, first_call
from liquidc.ir.quantised import (
    BITS,
    Blocks,
    Grid,
    Quantised,
    dequantise,
    pack,
)
from liquidc.ir.types import TensorType
from liquidc.ir.weights import WeightExpr, WeightSource
from liquidc.passes.gptq import gptq, inverse_factor

LEAST = 32
"""A weight that fewer tokens reach is rounded to the nearest: they say little of its inputs."""
WIDEST = 6144
"""So is a weight with longer rows: H and its factors would take over 0.9 GB."""
ACTIVATIONS = 10**9
"""Bytes that what all windows computed may take; fewer are run if it would be more."""
FEWEST = 4
"""Windows below which nothing is calibrated."""
LIVE = 2
"""Values as wide as the widest that are alive at a time, about."""
TOGETHER = 8
"""Windows that are run at a time."""
ROWS = 4096
"""Rows of a weight that are rounded at a time."""


class Store(Protocol):
    """Where calibrated tensors go."""

    def append(self, name: str, type: TensorType, rows: torch.Tensor) -> None:
        """Add elements to the tensor `name` of the type `type`, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a pass calibrates with.

    Attributes:
        windows: token ids, all of one length; each window starts with an empty cache.
        data: sha256 of the text that they are from.
        source: reads the model's weights, and what was stored.
        store: keeps the codes.
        report: told what is under way, how much is done and how much there is.
    """

    windows: Sequence[Sequence[int]]
    data: str
    source: WeightSource
    store: Store
    report: Callable[[str, int, int], None]


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

    Computes on one thread, so that its sums do not depend on how many there are.

    Returns:
        By name of the weight, without those that the main function does not use; and how many
        tokens were run.

    Raises:
        InputError: too little text fits into the memory that a compile may take.
    """
    main = next(iter(module.functions.values()))
    tokens = len(calibration.windows[0])
    each = LIVE * 4 * tokens * _widest(main)
    count = min(len(calibration.windows), ACTIVATIONS // each)
    if count < min(FEWEST, len(calibration.windows)):
        raise InputError(
            f"to calibrate on {FEWEST} windows of {tokens} tokens takes {FEWEST * each / 1e9:.1f} "
            f"GB of memory, more than the {ACTIVATIONS / 1e9:.1f} GB that it may: use "
            "method=nearest, or mixed"
        )
    with _one_thread():
        run = _Run(module, grids, replace(calibration, windows=calibration.windows[:count]))
        run.main(main)
    return run.reached, count * tokens


def _widest(function: Function) -> int:
    """Elements that one token has in the largest value, the logits apart."""
    sizes = [
        math.prod(dim for dim in value.shape if isinstance(dim, int))
        for op in function.body.walk()
        for value in op.results
        if value.shape[:2] == ("B", "T")
    ]
    return max(sizes, default=1)


@contextmanager
def _one_thread() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _OneOp(Interpreter):
    """Keeps no weight."""

    def weight(self, name: str) -> torch.Tensor:
        """A weight of the module, read every time."""
        read = super().weight(name)
        self.weights.clear()
        return read

    def one(self, op: Op, frame: Frame) -> Sequence[torch.Tensor]:
        """Run one op."""
        return self._op(op, frame)


@dataclass
class _Lane:
    """Some windows on their way through the function.

    Attributes:
        frame: their values.
        mask: bool[B, T], the tokens that run the arm they are in; None outside of arms.
    """

    frame: Frame
    mask: torch.Tensor | None = None

    def executed(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [..., K] that belong to tokens which run."""
        if self.mask is not None and x.dim() == 3 and x.shape[:2] == self.mask.shape:
            return x[self.mask]
        return x.flatten(0, -2)


@dataclass
class _Run:
    """All lanes on their way through the function."""

    module: Module
    grids: Mapping[str, Grid]
    calibration: Calibration
    reached: dict[str, Reached] = field(default_factory=dict[str, Reached])

    def __post_init__(self) -> None:
        self._source = self.calibration.source
        self._interpreter = _OneOp(self.module, self._source)

    def main(self, function: Function) -> None:
        """Run all windows as far as there are weights to round."""
        wanted = [
            number
            for number, op in enumerate(function.body.ops)
            if any(self._name(value) for value in _read(op))
        ]
        if not wanted:
            return
        windows = self.calibration.windows
        lanes: list[_Lane] = []
        for start in range(0, len(windows), TOGETHER):
            frame = Frame()
            given = first_call(function.args, *windows[start : start + TOGETHER])
            if "logit_index" in given:  # the head sees every token
                rows, length = given["input_ids"].shape
                given["logit_index"] = torch.arange(length).expand(rows, -1)
            for arg in function.args:
                frame.fits(arg.type, given[arg.name])
                frame.values[arg] = given[arg.name]
            lanes.append(_Lane(frame))
        with torch.no_grad():
            self._ops(function.body, wanted[-1], lanes)
            last = function.body.ops[wanted[-1]]
            if isinstance(last, ops.Linear):  # a head's logits are of no use
                self._round_linear(last, lanes)
            else:
                self._op(last, lanes)

    def _name(self, value: Value) -> str:
        """The weight that a value is, if it is to be rounded."""
        name = value.op.weight if isinstance(value.op, ops.Weight) else ""
        return name if name in self.grids else ""

    def _block(self, block: Block, lanes: list[_Lane]) -> list[list[torch.Tensor]]:
        self._ops(block, len(block.ops) - 1, lanes)
        returned = block.terminator.operands
        return [[lane.frame.values[value] for value in returned] for lane in lanes]

    def _ops(self, block: Block, stop: int, lanes: list[_Lane]) -> None:
        """The first ops of a block; values are dropped after their last use."""
        last: dict[Value, int] = {}
        for number, op in enumerate(block.ops):
            last |= {value: number for value in (*op.results, *_read(op))}
        own = {value for op in block.ops for value in op.results}
        for number, op in enumerate(block.ops[:stop]):
            if isinstance(op, ops.Weight):
                continue
            for lane, outputs in zip(lanes, self._op(op, lanes), strict=True):
                for value, output in zip(op.results, outputs, strict=True):
                    lane.frame.fits(value.type, output)
                    lane.frame.values[value] = output
            for value in [v for v in (*op.results, *_read(op)) if last[v] == number and v in own]:
                for lane in lanes:
                    lane.frame.values.pop(value, None)

    def _op(self, op: Op, lanes: list[_Lane]) -> list[Sequence[torch.Tensor]]:
        if isinstance(op, ops.If):
            return self._conditional(op, lanes)
        if isinstance(op, ops.Embed) and isinstance(op.table.op, ops.Weight):
            expr = self.module.weights[op.table.op.weight]
            return [[self._embedded(expr, lane.frame.values[op.ids])] for lane in lanes]
        if isinstance(op, ops.GroupedExperts) and self._name(op.gate_up) and self._name(op.down):
            return self._experts(op, lanes)
        if isinstance(op, ops.Linear) and self._name(op.weight):
            self._round_linear(op, lanes)
        loaded = {
            value: self._load(value.op.weight)
            for value in _read(op)
            if isinstance(value.op, ops.Weight)
        }
        results: list[Sequence[torch.Tensor]] = []
        for lane in lanes:
            lane.frame.values |= loaded
            results.append(self._interpreter.one(op, lane.frame))
            for value in loaded:
                del lane.frame.values[value]
        return results

    def _load(self, name: str) -> torch.Tensor:
        return self._rounded(name) if name in self.reached else self._interpreter.weight(name)

    def _conditional(self, op: ops.If, lanes: list[_Lane]) -> list[Sequence[torch.Tensor]]:
        """Both arms, each with the lanes that take it."""
        by = _mask(op)
        taken = [bool(lane.frame.values[op.cond]) for lane in lanes]
        results: dict[int, Sequence[torch.Tensor]] = {}
        for arm, side in ((op.then, True), (op.otherwise, False)):
            inside = [number for number, took in enumerate(taken) if took == side]
            some: list[_Lane] = []
            for number in inside:
                lane = lanes[number]
                mask = lane.mask
                if side and by is not None:
                    mask = lane.frame.values[by]
                some.append(_Lane(lane.frame, mask))
            if some:
                results |= dict(zip(inside, self._block(arm, some), strict=True))
        return [results[number] for number in range(len(lanes))]

    def _embedded(self, expr: WeightExpr, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table of which the rest is not read."""
        columns = (0, expr.sizes[1])
        rows, places = ids.unique(return_inverse=True)
        read = [expr.read(self._source, ((row, row + 1), columns)) for row in rows.tolist()]
        return F.embedding(places, torch.cat(read))

    def _experts(self, op: ops.GroupedExperts, lanes: list[_Lane]) -> list[Sequence[torch.Tensor]]:
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

    def _round_linear(self, op: ops.Linear, lanes: list[_Lane]) -> None:
        name = self._name(op.weight)
        if name not in self.reached:
            inputs = [lane.executed(lane.frame.values[op.x]) for lane in lanes]
            self._tell(name, [self._round_one(name, inputs, None)])

    def _tell(self, name: str, each: Sequence[tuple[int, str]]) -> None:
        nearest = tuple(number for number, (_, reason) in enumerate(each) if reason)
        reason = next((reason for _, reason in each if reason), "")
        self.reached[name] = Reached(tuple(tokens for tokens, _ in each), nearest, reason)
        self.calibration.report("weights calibrated", len(self.reached), len(self.grids))

    def _round_one(
        self, name: str, inputs: Sequence[torch.Tensor], expert: int | None
    ) -> tuple[int, str]:
        """Round a weight, or that of an expert, and store it; the tokens, and why it is nearest."""
        grid, expr = self.grids[name], self.module.weights[name]
        lead = () if expert is None else ((expert, expert + 1),)
        count, columns = expr.sizes[-2:]
        tokens = sum(len(x) for x in inputs)
        reason = _reason(grid, tokens, columns)
        factor = None
        if not reason:
            hessian = torch.zeros(columns, columns, dtype=torch.float64)
            for x in inputs:
                wide = x.double()
                hessian += wide.T @ wide
            factor = inverse_factor(hessian)
        for start in range(0, count, ROWS):
            rows = (start, min(start + ROWS, count))
            weight = expr.read(self._source, (*lead, rows, (0, columns))).float()
            weight = weight[0] if lead else weight
            made = grid.nearest(weight) if factor is None else gptq(weight, factor, grid)
            self._keep(name, made)
        return tokens, reason

    def _keep(self, name: str, made: Blocks) -> None:
        narrow = BITS[self.grids[name].format] == 4
        zeros = made.zeros
        tensors = {"codes": pack(made.codes) if narrow else made.codes, "scales": made.scales}
        if zeros is not None:
            tensors["zeros"] = pack(zeros) if narrow else zeros
        for kind, part in self._parts(name).items():
            self.calibration.store.append(part.stored, part.type, tensors[kind])

    def _parts(self, name: str) -> dict[str, Quantised]:
        return self.grids[name].parts(self.module.weights[name], "gptq")

    def _rounded(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The floats of what was stored."""
        read: dict[str, torch.Tensor] = {}
        for kind, part in self._parts(name).items():
            first, *rest = part.sizes
            rows = (0, first) if expert is None else (expert, expert + 1)
            tensor = part.read(self._source, (rows, *((0, size) for size in rest)))
            read[kind] = tensor if expert is None else tensor[0]
        format = self.grids[name].format
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


def _read(op: Op) -> list[Value]:
    """What an op and those in its regions read, and what a conditional's tokens are told by."""
    nested = [inner for region in op.regions.values() for inner in region.ops]
    by = _mask(op)
    own = op.operands if by is None else [*op.operands, by]
    return [*own, *(value for inner in nested for value in _read(inner))]


def _mask(op: Op) -> Value | None:
    """bool[B, T], the tokens that run the first arm of a conditional; None where unknown."""
    asked = op.cond.op if isinstance(op, ops.If) else None
    return asked.x if isinstance(asked, ops.Any) and asked.x.type.rank == 2 else None


def _between(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """What lies between the two products of an expert."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up


def _tokens(op: ops.GroupedExperts, lane: _Lane, expert: int) -> torch.Tensor:
    """What an expert reads, [n, K]."""
    x, index, weight = (lane.frame.values[v] for v in (op.x, op.index, op.weight))
    if lane.mask is not None and index.shape[:-1] == lane.mask.shape:
        index = torch.where(lane.mask[..., None], index, -1)
    where, slot = (index.flatten(0, -2) == expert).nonzero(as_tuple=True)
    inputs = x.flatten(0, -2)[where]
    if op.apply == "input":
        return inputs * weight.flatten(0, -2)[where, slot][:, None]
    return inputs

"""Runs windows of text through a function together, op by op, for passes that calibrate.

What one op computes for all windows is at hand before the next op runs, and weights are in memory
while one op needs them: memory holds one weight and what the windows computed, not the model.
Computes on one thread, so that sums do not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Op, Value, ops
from liquidc.ir.interpreter import Frame, Interpreter, first_call
from liquidc.ir.types import TensorType
from liquidc.ir.weights import WeightExpr, WeightSource

ACTIVATIONS = 10**9
"""Bytes that what all windows computed may take; fewer are run if it would be more."""
FEWEST = 4
"""Windows below which nothing is calibrated."""
LIVE = 2
"""Values as wide as the widest that are alive at a time, about."""
TOGETHER = 8
"""Windows that are run at a time."""


class Store(Protocol):
    """Where calibrated tensors go; after a compile that was killed, some are there already."""

    def stored(self, name: str, type: TensorType) -> int:
        """How many elements of the tensor `name` of the type `type` there are already."""
        ...

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


def affordable(calibration: Calibration, function: Function) -> Calibration:
    """As many of the windows as memory allows.

    Raises:
        InputError: too little text fits into the memory that a compile may take.
    """
    windows = calibration.windows
    tokens = len(windows[0])
    each = LIVE * 4 * tokens * widest(function)
    count = min(len(windows), ACTIVATIONS // each)
    if count < min(FEWEST, len(windows)):
        raise InputError(
            f"to calibrate on {FEWEST} windows of {tokens} tokens takes {FEWEST * each / 1e9:.1f} "
            f"GB of memory, more than the {ACTIVATIONS / 1e9:.1f} GB that it may: use "
            "method=nearest, or mixed"
        )
    return replace(calibration, windows=windows[:count])


def widest(function: Function) -> int:
    """Elements that one token has in the largest value, the logits apart."""
    sizes = [
        math.prod(dim for dim in value.shape if isinstance(dim, int))
        for op in function.body.walk()
        for value in op.results
        if value.shape[:2] == ("B", "T")
    ]
    return max(sizes, default=1)


@contextmanager
def one_thread() -> Generator[None]:
    """Let torch compute on one thread, so that sums do not depend on how many there are."""
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
class Lane:
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


class Stream:
    """All windows on their way through a function; a subclass looks at ops, or takes them over.

    Args:
        module: what is run.
        source: reads its weights.
    """

    def __init__(self, module: Module, source: WeightSource) -> None:
        self.module, self.source = module, source
        self._interpreter = _OneOp(module, source)

    def wants(self, op: Op) -> bool:
        """Whether the run is for this op; nothing is run after the last one."""
        raise NotImplementedError

    def run(
        self,
        function: Function,
        windows: Sequence[Sequence[int]],
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Run all windows, each from an empty cache, with some arguments as `given`."""
        body = function.body
        wanted = [n for n, op in enumerate(body.ops) if any(self.wants(o) for o in op.walk())]
        if not wanted:
            return
        lanes: list[Lane] = []
        for start in range(0, len(windows), TOGETHER):
            frame = Frame()
            inputs = first_call(function.args, *windows[start : start + TOGETHER])
            if "logit_index" in inputs:  # the head sees every token
                rows, length = inputs["input_ids"].shape
                inputs["logit_index"] = torch.arange(length).expand(rows, -1)
            inputs |= given or {}
            for arg in function.args:
                frame.fits(arg.type, inputs[arg.name])
                frame.values[arg] = inputs[arg.name]
            lanes.append(Lane(frame))
        with torch.no_grad(), one_thread():
            self._ops(body, wanted[-1], lanes)
            self.finish(body.ops[wanted[-1]], lanes)

    def finish(self, op: Op, lanes: list[Lane]) -> None:
        """The last op that is wanted; its results are of no use."""
        self.op(op, lanes)

    def _block(self, block: Block, lanes: list[Lane]) -> list[list[torch.Tensor]]:
        self._ops(block, len(block.ops) - 1, lanes)
        returned = block.terminator.operands
        return [[lane.frame.values[value] for value in returned] for lane in lanes]

    def _ops(self, block: Block, stop: int, lanes: list[Lane]) -> None:
        """The first ops of a block; values are dropped after their last use."""
        last: dict[Value, int] = {}
        for number, op in enumerate(block.ops):
            last |= {value: number for value in (*op.results, *reads(op))}
        own = {value for op in block.ops for value in op.results}
        for number, op in enumerate(block.ops[:stop]):
            if isinstance(op, ops.Weight):
                continue
            for lane, outputs in zip(lanes, self.op(op, lanes), strict=True):
                for value, output in zip(op.results, outputs, strict=True):
                    lane.frame.fits(value.type, output)
                    lane.frame.values[value] = output
            for value in [v for v in (*op.results, *reads(op)) if last[v] == number and v in own]:
                for lane in lanes:
                    lane.frame.values.pop(value, None)

    def op(self, op: Op, lanes: list[Lane]) -> list[Sequence[torch.Tensor]]:
        """The results of an op in each lane."""
        if isinstance(op, ops.If):
            return self._conditional(op, lanes)
        if isinstance(op, ops.Embed) and isinstance(op.table.op, ops.Weight):
            expr = self.module.weights[op.table.op.weight]
            return [[self._embedded(expr, lane.frame.values[op.ids])] for lane in lanes]
        loaded = {
            value: self.load(value.op.weight)
            for value in reads(op)
            if isinstance(value.op, ops.Weight)
        }
        results: list[Sequence[torch.Tensor]] = []
        for lane in lanes:
            lane.frame.values |= loaded
            results.append(self._interpreter.one(op, lane.frame))
            for value in loaded:
                del lane.frame.values[value]
        return results

    def load(self, name: str) -> torch.Tensor:
        """A weight."""
        return self._interpreter.weight(name)

    def _conditional(self, op: ops.If, lanes: list[Lane]) -> list[Sequence[torch.Tensor]]:
        """Both arms, each with the lanes that take it."""
        by = _mask(op)
        taken = [bool(lane.frame.values[op.cond]) for lane in lanes]
        results: dict[int, Sequence[torch.Tensor]] = {}
        for arm, side in ((op.then, True), (op.otherwise, False)):
            inside = [number for number, took in enumerate(taken) if took == side]
            some: list[Lane] = []
            for number in inside:
                lane = lanes[number]
                mask = lane.mask
                if side and by is not None:
                    mask = lane.frame.values[by]
                some.append(Lane(lane.frame, mask))
            if some:
                results |= dict(zip(inside, self._block(arm, some), strict=True))
        return [results[number] for number in range(len(lanes))]

    def _embedded(self, expr: WeightExpr, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table of which the rest is not read."""
        columns = (0, expr.sizes[1])
        rows, places = ids.unique(return_inverse=True)
        read = [expr.read(self.source, ((row, row + 1), columns)) for row in rows.tolist()]
        return F.embedding(places, torch.cat(read))


def reads(op: Op) -> list[Value]:
    """What an op and those in its regions read, and what a conditional's tokens are told by."""
    nested = [inner for region in op.regions.values() for inner in region.ops]
    by = _mask(op)
    own = op.operands if by is None else [*op.operands, by]
    return [*own, *(value for inner in nested for value in reads(inner))]


def _mask(op: Op) -> Value | None:
    """bool[B, T], the tokens that run the first arm of a conditional; None where unknown."""
    asked = op.cond.op if isinstance(op, ops.If) else None
    return asked.x if isinstance(asked, ops.Any) and asked.x.type.rank == 2 else None

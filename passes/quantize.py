"""The pass `quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir.quantised import BITS, METHODS, Grid
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.ir.types import DType, TensorType
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare
from liquidc.passes.routers import router_linears

if TYPE_CHECKING:
    from liquidc.passes.calibrate import Reached

FORMATS = {"int8": "int8", "int8-dynamic": "int8", "int4": "int4", "fp8": "e4m3"}
"""Formats of codes by scheme."""
BLOCKS = {"int8": 32, "int8-dynamic": 32, "int4": 32, "fp8": 128}
"""Elements of a block by scheme, unless `block` says another."""
DYNAMIC = "int8-dynamic"
"""The scheme that rounds inputs too."""
MIXED = "mixed"
"""The scheme that takes each weight's own from a recipe."""
LEAST = 16
"""The smallest block: ONNX Runtime's MatMulNBits takes no smaller one."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights of matrix products become codes of few bits with a scale for every block.

    Before::

        %w = weight "w" : f32[64, 128]
        %y = linear %x, %w

    After::

        %c = weight "w.codes" : u8[64, 4, 16]        (codes(w, "int4", 32, true))
        %s = weight "w.scales" : f32[64, 4]          (scales(w, "int4", 32, true))
        %w = dequantize %c, %s, format="int4" : f32[64, 128]
        %y = linear %x, %w

    Schemes are `int8`, `int4` and `fp8` (float8 e4m3); `int8-dynamic` also rounds what meets a
    weight, block by block as it comes; with `mixed` a recipe says each weight's. A `block` of -1 is
    a whole row, one scale for each output channel.
    Weights inside branches and of experts are quantised like all others. Routers of depth gates
    and experts, norms and embeddings stay as they are, so decisions move only with the states that
    they look at; the head, whose errors nothing averages out, has `head` bits. A `block` that does
    not divide a row is halved until it does. `method=gptq` rounds with regard to what products
    read on calibration text. What stays in float is told, with the reason.
    """

    scheme: str = "int8"
    block: int = 0
    symmetric: bool = True
    head: str = "int8"
    method: str = "nearest"

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"

    def __post_init__(self) -> None:
        if self.scheme not in (*FORMATS, MIXED):
            raise InputError(f"scheme is {', '.join(FORMATS)} or mixed, not {self.scheme!r}")
        if self.head not in (*FORMATS, "float", "same"):
            raise InputError(f"head is {', '.join(FORMATS)}, same or float, not {self.head!r}")
        if self.block not in (0, -1) and (self.block < LEAST or self.block & (self.block - 1)):
            raise InputError(
                f"block is a power of two from {LEAST} on, or -1 for rows, not {self.block}"
            )
        if not self.symmetric and self.scheme == "fp8":
            raise InputError("fp8 is symmetric: it has no zero points")
        if self.method not in METHODS:
            raise InputError(f"method is {', '.join(METHODS)}, not {self.method!r}")
        if self.method == "gptq" and self.scheme == "fp8":
            raise InputError("fp8 is rounded to the nearest: the steps of e4m3 are not even")
        if self.head != Quantize.head:
            if self.scheme == MIXED:
                raise InputError("a mixed scheme chooses for the head too: leave head= out")
            if self.head not in ("same", self.scheme, self._scheme(head=True)):
                raise InputError(
                    f"head={self.head} has no more bits than {self.scheme}: write head=same"
                )

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Quantise in every function.

        Raises:
            InputError: a method needs text to calibrate on, or a recipe is missing.
        """
        told = _Told()
        places = self._places(module, context, told)
        grids = {place.weight: place.grid for place in places}
        reached: dict[str, Reached] = {}
        if self.method == "gptq":
            if context.calibration is None:
                raise InputError("gptq calibrates on text: give it with --calibration FILE")
            from liquidc.passes.calibrate import calibrate

            reached, tokens = calibrate(module, grids, context.calibration)
            told.calibration = {"data": context.calibration.data, "tokens": tokens}
        for place in places:
            method = self.method if place.weight in reached else "nearest"
            types = _quantise(module, place, method)
            told.add(place, types, reached.get(place.weight), asked=self.method)
            statistics.fired[self.name] += 1
        statistics.facts[self.name] = told.facts()

    def grids(self, module: Module, context: PassContext) -> dict[str, Grid]:
        """The weights that it would quantise, and how."""
        return {place.weight: place.grid for place in self._places(module, context, _Told())}

    def _places(self, module: Module, context: PassContext, told: _Told) -> list[_Place]:
        """Where a weight is to be read as codes."""
        if self.scheme == MIXED and context.recipe is None:
            raise InputError("a mixed scheme needs a recipe: give --target-size or --max-kl")
        if unknown := sorted((context.recipe or {}).keys() - module.weights.keys()):
            raise InputError(f"the recipe names {unknown[0]}, which is no weight after the passes")
        routed, heads = router_linears(module), _heads(module)
        found: list[_Place] = []
        chosen: dict[str, str] = {}
        for function in module.functions.values():
            for block in _blocks(function.body):
                for op in list(block.ops):
                    for value in _factors(op):
                        if isinstance(value.op, ops.Dequantize):
                            continue
                        reason = "a router: it decides" if op in routed else _refusal(op, value)
                        if reason or not isinstance(value.op, ops.Weight):
                            told.keep(value, reason)
                            continue
                        name = value.op.weight
                        scheme = self._scheme(op in heads)
                        if context.recipe is not None and self.scheme == MIXED:
                            scheme = context.recipe.get(name, "float")
                        scheme = chosen.setdefault(name, scheme)
                        if scheme == "float":
                            told.keep(value, "as asked for")
                        else:
                            grid = self._grid(scheme, int(value.shape[-1]))
                            found.append(_Place(block, op, value, name, scheme, grid))
        return found

    def _scheme(self, head: bool) -> str:
        if not head or self.head == "same" or self.scheme == MIXED:
            return self.scheme
        wider = self.head == "float" or BITS[FORMATS[self.head]] > BITS[FORMATS[self.scheme]]
        return self.head if wider else self.scheme

    def _grid(self, scheme: str, columns: int) -> Grid:
        size = columns if self.block == -1 else self.block or BLOCKS[scheme]
        while columns % size:
            size //= 2
        return Grid(FORMATS[scheme], size, self.symmetric or scheme == "fp8")


@dataclass(frozen=True, slots=True)
class _Place:
    """An op that reads a weight, and how the weight is to be quantised."""

    block: Block
    op: Op
    value: Value
    weight: str
    scheme: str
    grid: Grid


def _quantise(module: Module, place: _Place, method: str) -> list[TensorType]:
    """Let an op read a dequantised weight; gives the types of its parts."""
    rw = Rewriter(place.block, [])
    grid = place.grid
    parts = grid.parts(module.weights[place.weight], method)
    values = [declare(module, rw, f"{place.weight}.{name}", part) for name, part in parts.items()]
    new = rw.emit(ops.Dequantize(*values, format=grid.format, loc=place.op.loc)).y
    new.name = place.value.name
    for emitted in rw.emitted:
        place.block.insert_before(place.op, emitted)
    place.op.set_operands([new if v is place.value else v for v in place.op.operands])
    if place.scheme == DYNAMIC:
        _round_inputs(place.op, new, grid.block)
    return [value.type for value in values]


def _round_inputs(op: Op, weight: Value, block: int) -> None:
    """Let what meets a weight be rounded too."""
    if isinstance(op, ops.GroupedExperts) and weight is op.down:
        op.attributes["inner_block"] = block
    elif isinstance(op, ops.Linear | ops.GroupedExperts):
        op.attributes["input_block"] = block


class _Told:
    """What the user is told: weights by name, and what was kept."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, str] = {}
        self.calibration: dict[str, Any] = {}

    def add(
        self, place: _Place, types: Sequence[TensorType], reached: Reached | None, *, asked: str
    ) -> None:
        sizes = [math.prod(map(int, type.shape)) * type.dtype.bytes for type in types]
        whole = math.prod(map(int, place.value.shape)) * place.value.dtype.bytes
        entry: dict[str, Any] = {
            "scheme": place.scheme,
            "block": place.grid.block,
            "symmetric": place.grid.symmetric,
            "bytes": sum(sizes),
            "bytes_float": whole,
        }
        if asked != "nearest":
            entry["method"] = "nearest" if reached is None else asked
            entry["tokens"] = [] if reached is None else list(reached.tokens)
            if reached is None:
                entry["nearest"], entry["reason"] = [0], "no text reaches it"
            elif reached.nearest:
                entry["nearest"], entry["reason"] = list(reached.nearest), reached.reason
        self.weights[place.weight] = entry

    def keep(self, value: Value, reason: str) -> None:
        name = value.op.weight if isinstance(value.op, ops.Weight) else f"%{value.name}"
        self.kept.setdefault(name, reason)

    def facts(self) -> dict[str, Any]:
        told: dict[str, Any] = {"weights": self.weights, "kept": self.kept}
        return {**told, "calibration": self.calibration} if self.calibration else told


def _blocks(block: Block) -> list[Block]:
    """A block and those nested in it, of experts' bodies too."""
    inner = [b for op in block.ops for region in op.regions.values() for b in _blocks(region)]
    return [block, *inner]


def _factors(op: Op) -> list[Value]:
    """The weights of a product."""
    if isinstance(op, ops.Linear):
        return [op.weight]
    if isinstance(op, ops.GroupedExperts):
        return [op.gate_up, op.down]
    others = op.params if isinstance(op, ops.MapExperts) else op.operands[1:]
    if isinstance(op, ops.MatMul | ops.MapExperts):
        return [value for value in others if isinstance(value.op, ops.Weight)]
    return []


def _refusal(op: Op, value: Value) -> str:
    """Why a factor of a product can't be quantised; empty if it can."""
    if isinstance(op, ops.MatMul):
        return "a factor of a matmul, not of a linear"
    if isinstance(op, ops.MapExperts):
        return "of experts that are no SwiGLU"
    if not isinstance(value.op, ops.Weight):
        return "no weight of the model"
    if value.dtype != DType.F32:
        return f"{value.dtype}, not f32"
    columns = value.shape[-1]
    if not isinstance(columns, int) or columns % LEAST:
        return f"rows of {columns} elements, no multiple of {LEAST}"
    return ""


def _heads(module: Module) -> set[Op]:
    """Linears whose result goes nowhere but to a function's result."""
    found: set[Op] = set()
    for op in module.walk():
        if isinstance(op, ops.Linear) and op.y.uses and _only_returned(op.y):
            found.add(op)
    return found


def _only_returned(value: Value) -> bool:
    moves = (ops.Reshape, ops.Cast)
    return all(
        isinstance(user, ops.Return)
        or (isinstance(user, moves) and all(_only_returned(v) for v in user.results))
        for user in value.uses
    )

"""The pass `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir.quantised import BITS, Codes, Scales, Zeros
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.ir.types import DType
from liquidc.ir.weights import WeightExpr
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare
from liquidc.passes.routers import router_linears

FORMATS = {"int8": "int8", "int4": "int4", "fp8": "e4m3"}
"""Formats of codes by scheme."""
BLOCKS = {"int8": 128, "int4": 32, "fp8": 128}
"""Elements of a block by scheme, unless `block` says another."""
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

    Schemes are `int8`, `int4` and `fp8` (float8 e4m3). Weights inside branches and of experts are
    quantised like all others. Routers of depth gates and experts, norms and embeddings stay as
    they are, so decisions move only with the states that they look at; the head, whose errors
    nothing averages out, has `head` bits. A `block` that does not divide a row is halved until it
    does. What stays in float is told, with the reason.
    """

    scheme: str = "int8"
    block: int = 0
    symmetric: bool = True
    head: str = "int8"

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"

    def __post_init__(self) -> None:
        if self.scheme not in FORMATS:
            raise InputError(f"scheme is {', '.join(FORMATS)}, not {self.scheme!r}")
        if self.head not in (*FORMATS, "float", "same"):
            raise InputError(f"head is {', '.join(FORMATS)}, same or float, not {self.head!r}")
        if self.block and (self.block < LEAST or self.block & (self.block - 1)):
            raise InputError(f"block is a power of two from {LEAST} on, not {self.block}")
        if not self.symmetric and self.scheme == "fp8":
            raise InputError("fp8 is symmetric: it has no zero points")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Quantise in every function."""
        del context
        routed, heads = router_linears(module), _heads(module)
        told = _Told()
        for function in module.functions.values():
            for block in _blocks(function.body):
                for op in list(block.ops):
                    for value in _factors(op):
                        if isinstance(value.op, ops.Dequantize):
                            continue
                        reason = "a router: it decides" if op in routed else _refusal(op, value)
                        scheme = self._scheme(op in heads)
                        if reason or scheme == "float":
                            told.keep(value, reason or "the head, as asked for")
                            continue
                        self._quantise(module, block, op, value, scheme, told)
                        statistics.fired[self.name] += 1
        statistics.facts[self.name] = told.facts()

    def _scheme(self, head: bool) -> str:
        if not head or self.head == "same":
            return self.scheme
        wider = self.head == "float" or BITS[FORMATS[self.head]] > BITS[FORMATS[self.scheme]]
        return self.head if wider else self.scheme

    def _quantise(
        self, module: Module, block: Block, op: Op, value: Value, scheme: str, told: _Told
    ) -> None:
        """Let `op` read a dequantised weight."""
        rw = Rewriter(block, [])
        weight = rw.need(value.op, ops.Weight, "no weight")
        expr, columns = module.weights[weight.weight], int(value.shape[-1])
        size = self.block or BLOCKS[scheme]
        while columns % size:
            size //= 2
        format, symmetric = FORMATS[scheme], self.symmetric or scheme == "fp8"
        given = (expr, format, size, symmetric)
        parts: dict[str, WeightExpr] = {"codes": Codes(*given), "scales": Scales(*given)}
        if not symmetric:
            parts["zeros"] = Zeros(*given)
        values = [
            declare(module, rw, f"{weight.weight}.{name}", part) for name, part in parts.items()
        ]
        new = rw.emit(ops.Dequantize(*values, format=format, loc=op.loc)).y
        new.name = value.name
        for emitted in rw.emitted:
            block.insert_before(op, emitted)
        op.set_operands([new if v is value else v for v in op.operands])
        told.add(weight.weight, scheme, size, symmetric, [value.type, *(v.type for v in values)])


class _Told:
    """What the user is told: weights by name, and what was kept."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, str] = {}

    def add(
        self, name: str, scheme: str, block: int, symmetric: bool, types: Sequence[Any]
    ) -> None:
        from math import prod

        whole, *parts = (prod(type.shape) * type.dtype.bytes for type in types)
        self.weights[name] = {
            "scheme": scheme,
            "block": block,
            "symmetric": symmetric,
            "bytes": sum(parts),
            "bytes_float": whole,
        }

    def keep(self, value: Value, reason: str) -> None:
        name = value.op.weight if isinstance(value.op, ops.Weight) else f"%{value.name}"
        self.kept.setdefault(name, reason)

    def facts(self) -> dict[str, Any]:
        return {"weights": self.weights, "kept": self.kept}


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

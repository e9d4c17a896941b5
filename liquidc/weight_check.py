"""Every stored weight of an engine against the checkpoint, by value, some rows at a time.

Floats must be the checkpoint's, bit by bit. Codes are made floats again, with the scales and zero
points that lie in the file beside them, and must be near: a tensor of zeros, of another tensor's
codes or in another order is farther away than any rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from liquidc.backends.base import StoredWeight
from liquidc.ir.quantised import CALIBRATED, Codes, Quantised, Scales, Zeros, dequantise
from liquidc.ir.rotary import Rotation
from liquidc.ir.weight_maths import Take, Xor
from liquidc.ir.weights import Select, Stored, WeightExpr, WeightSource, evaluate

FARTHEST = {"int8": 0.03, "e4m3": 0.06, "int4": 0.25}
"""Bounds of ‖w' − w‖ / ‖w‖ by format.

Rounding to steps of size s errs by s/√12. The largest of 128 normal elements is about 3 σ, so that
int8 errs by 0.7 % of σ, and int4 in blocks of 32 by 8 %; e4m3 keeps three bits, 2.6 %. Three times
that is left for longer tails.
"""

ROTATION = 2**-22
"""Bound of a cosine or sine, which is computed here again: some last bits of another processor."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One weight: how far it is from the checkpoint's, relative to its norm, and the bound."""

    name: str
    format: str
    error: float
    bound: float

    @property
    def fits(self) -> bool:
        """Whether it is the checkpoint's weight."""
        return self.error <= self.bound


def check_weights(stored: Mapping[str, StoredWeight], source: WeightSource) -> list[Finding]:
    """Compare all weights of an engine.

    Args:
        stored: by name, what each holds and how its rows are read.
        source: the checkpoint.
    """
    parts = {str(weight.expr): weight for weight in stored.values()}
    found: list[Finding] = []
    for name, weight in stored.items():
        kind, flipped = _peeled(weight.expr)
        if isinstance(kind, Codes):
            error = _far(weight, kind, flipped, parts, source)
            found.append(Finding(name, kind.format, error, FARTHEST[kind.format]))
        elif isinstance(kind, Rotation):
            found.append(Finding(name, "f32", _apart(weight, source), ROTATION))
        elif isinstance(kind, Stored) and kind.name.startswith(CALIBRATED):
            found.append(Finding(name, "scale", _no_scale(weight), 0.0))
        elif not isinstance(kind, Quantised):
            found.append(Finding(name, str(weight.expr.type.dtype), _differs(weight, source), 0.0))
    return found


def _peeled(expr: WeightExpr) -> tuple[WeightExpr, int]:
    """What rows are taken of, and which bits of them are flipped."""
    flipped = 0
    while isinstance(expr, Select | Take | Xor):
        flipped ^= expr.mask if isinstance(expr, Xor) else 0
        expr = expr.x
    return expr, flipped


def _same_rows(expr: WeightExpr, of: WeightExpr) -> WeightExpr:
    """The rows of another tensor that `expr` takes of codes."""
    if isinstance(expr, Xor):
        return _same_rows(expr.x, of)
    return replace(expr, x=_same_rows(expr.x, of)) if isinstance(expr, Select | Take) else of


def _far(
    weight: StoredWeight,
    codes: Codes,
    flipped: int,
    parts: Mapping[str, StoredWeight],
    source: WeightSource,
) -> float:
    """‖w' − w‖ / ‖w‖ of codes with the scales and zeros that are stored for them."""
    options = {field.name: getattr(codes, field.name) for field in fields(codes)}
    scales = parts.get(str(_same_rows(weight.expr, Scales(**options))))
    zeros = parts.get(str(_same_rows(weight.expr, Zeros(**options))))
    if scales is None or (zeros is None and not codes.symmetric):
        return float("inf")
    wanted = _same_rows(weight.expr, codes.x)
    apart = size = 0.0
    for start, block in _rows(wanted, source):
        rows = (start, start + len(block))
        got = dequantise(
            weight.read(*rows) ^ flipped,
            scales.read(*rows),
            None if zeros is None else zeros.read(*rows),
            codes.format,
        )
        apart += float((got.double() - block.double()).square().sum())
        size += float(block.double().square().sum())
    return (apart / size) ** 0.5 if size else float(apart > 0)


def _no_scale(weight: StoredWeight) -> float:
    """0 if all elements could be a cache's scales, which no checkpoint holds, else 1."""
    read = weight.read(0, weight.expr.sizes[0])
    return float(not bool(((read > 0) & read.isfinite()).all()))


def _apart(weight: StoredWeight, source: WeightSource) -> float:
    """The largest difference of an element."""
    return max(
        float((weight.read(start, start + len(block)) - block).abs().max())
        for start, block in _rows(weight.expr, source)
    )


def _differs(weight: StoredWeight, source: WeightSource) -> float:
    """0 if every bit is the same, else 1."""
    for start, block in _rows(weight.expr, source):
        read = weight.read(start, start + len(block))
        if read.reshape(-1).view(torch.uint8).ne(block.reshape(-1).view(torch.uint8)).any():
            return 1.0
    return 0.0


def _rows(expr: WeightExpr, source: WeightSource) -> Iterator[tuple[int, torch.Tensor]]:
    start = 0
    for block in evaluate(expr, source, 64 * 2**20):
        block = block.reshape(1) if not block.dim() else block
        yield start, block
        start += len(block)

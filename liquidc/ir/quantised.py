"""Quantised weights as lazy expressions: the codes, scales and zero points of another weight.

A weight [..., N, K] is cut into blocks of `block` elements along K. In each block

    w ≈ (code - zero) · scale        int4: codes 0 to 15; int8: codes 0 to 255
    w ≈ e4m3(code) · scale           fp8: the bits of a float8 e4m3

Symmetric blocks have the zero 8 or 128 and no tensor of zero points. Elements are rounded to the
nearest code, halves to the even one. Codes of four bits lie two in a byte, the first one low, as
ONNX (MatMulNBits, UINT4) and llama.cpp's Q4_0 have them.

Codes that were made with calibration data (`gptq`) are no function of the weight alone: they are
read from the source, which must hold them under the name that `Quantised.stored` gives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from liquidc.errors import InputError
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Box, Select, WeightExpr, WeightSource

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

BITS = {"int4": 4, "int8": 8, "e4m3": 8}
"""Bits of a code by format."""
ZERO = {"int4": 8, "int8": 128, "e4m3": 0}
"""The zero point of a symmetric block."""
CALIBRATED = "calibrated/"
"""How names of tensors begin that calibration made."""
METHODS = ("nearest", "gptq")
"""How codes are found: rounded, or with regard to inputs (`liquidc.passes.gptq`)."""
LARGEST = 448.0
"""The largest float8 e4m3 (Micikevicius et al. 2022, table 1)."""


class Blocks(NamedTuple):
    """Quantised blocks.

    Attributes:
        codes: u8[..., blocks, block], one code in each.
        scales: f32[..., blocks].
        zeros: u8[..., blocks]; None where they are those of a symmetric block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


class Steps(NamedTuple):
    """Quantised blocks without their codes: `scales` and `zeros` of `Blocks`."""

    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Grid:
    """How a weight is quantised: format, elements of a block, zero points or not."""

    format: str
    block: int
    symmetric: bool

    def parts(self, x: WeightExpr, method: str = "nearest") -> dict[str, Quantised]:
        """The tensors that a weight becomes, by kind."""
        given = (x, self.format, self.block, self.symmetric, method)
        parts: dict[str, Quantised] = {"codes": Codes(*given), "scales": Scales(*given)}
        return parts if self.symmetric else {**parts, "zeros": Zeros(*given)}

    def nearest(self, weight: torch.Tensor) -> Blocks:
        """The weight rounded to the nearest codes."""
        return round_to_nearest(weight, self.format, self.block, symmetric=self.symmetric)


def round_to_nearest(x: torch.Tensor, format: str, block: int, *, symmetric: bool) -> Blocks:
    """Quantise f32[..., K] block by block.

    A symmetric int4 block maps its element of largest size to -8 times the scale, as Q4_0 does: of
    the sixteen codes none is lost, and the largest element is exact.

    Raises:
        InputError: an element is inf or NaN.
    """
    import torch

    x = x.float()
    steps = find_steps(x, format, block, symmetric=symmetric)
    x = x.unflatten(-1, (-1, block)) / steps.scales[..., None]
    if format == "e4m3":
        codes = x.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return Blocks(codes, *steps)
    x.round_().add_(ZERO[format] if steps.zeros is None else steps.zeros[..., None])
    return Blocks(x.clamp_(0, 2 ** BITS[format] - 1).to(torch.uint8), *steps)


def find_steps(x: torch.Tensor, format: str, block: int, *, symmetric: bool) -> Steps:
    """The scales and zero points of `round_to_nearest`.

    Raises:
        InputError: an element is inf or NaN.
    """
    import torch

    x = x.float().unflatten(-1, (-1, block))
    low, high = x.amin(-1), x.amax(-1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise InputError("a weight to quantise holds inf or NaN")
    if not symmetric:
        levels = 2 ** BITS[format] - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _positive((high - low) / levels)
        return Steps(scales, torch.round(-low / scales).clamp(0, levels).to(torch.uint8))
    top = torch.maximum(high, -low)
    if format == "int4":
        extreme = torch.where(high == top, high, low)
        tied = high == -low  # the first of the two: to look for it takes five times as long
        both = x[tied]
        extreme[tied] = torch.gather(both, -1, both.abs().argmax(-1, keepdim=True))[..., 0]
        return Steps(torch.where(extreme == 0, 1.0, extreme / -ZERO[format]), None)
    return Steps(_positive(top / (LARGEST if format == "e4m3" else ZERO[format] - 1)), None)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 where a block is all zeros: its codes are the zero point whatever the scale."""
    import torch

    return torch.where(scale == 0, 1.0, scale)


def round_inputs(x: torch.Tensor, block: int) -> torch.Tensor:
    """f[..., K] with each block rounded to 255 steps: 127 of them are its largest element.

    MatMulNBits at accuracy level 4 and llama.cpp's Q8_0 do this to what meets codes.
    """
    import torch

    blocks = x.unflatten(-1, (-1, block))
    scale = _positive(blocks.abs().amax(-1, keepdim=True) / 127)
    return (torch.round(blocks / scale) * scale).flatten(-2)


def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    """f32[..., K] of stored codes u8[..., blocks, bytes], scales and stored zero points."""
    import torch

    count = scales.shape[-1]
    if format == "e4m3":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = (unpack(codes) if format == "int4" else codes).float()
        if zeros is None:
            values -= ZERO[format]
        else:
            values -= (unpack(zeros)[..., :count] if format == "int4" else zeros)[..., None]
    return (values * scales[..., None].float()).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits two in a byte, the first one low; an odd number is filled up with 0."""
    import torch

    if codes.shape[-1] % 2:
        codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], -1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: torch.Tensor) -> torch.Tensor:
    """The codes of four bits in u8[..., n]: u8[..., 2 n]."""
    import torch

    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


@dataclass(frozen=True, slots=True)
class Quantised(WeightExpr):
    """What `codes`, `scales` and `zeros` have in common: the weight and how it is quantised.

    Codes that calibration made for a whole stack lie under the stack's name: `kept` and `place` are
    that name and the entry of the stack.
    """

    x: WeightExpr
    format: str
    block: int
    symmetric: bool
    method: str = "nearest"
    kept: str = ""
    place: int = 0

    def __post_init__(self) -> None:
        if self.format not in BITS:
            raise ValueError(f"format is {', '.join(BITS)}, not {self.format!r}")
        if self.method not in METHODS:
            raise ValueError(f"method is {', '.join(METHODS)}, not {self.method!r}")
        if self.block < 1 or (self.format == "int4" and self.block % 2):
            raise ValueError(f"a block of {self.block} elements")
        if not self.symmetric and self.format == "e4m3":
            raise ValueError("e4m3 has no zero points")
        if self.x.type.rank < 2 or self.x.sizes[-1] % self.block:
            raise ValueError(f"blocks of {self.block} don't fill {self.x.type}")

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.x.sizes[-1] // self.block

    @property
    def work(self) -> int:
        """See `WeightExpr`: rounding holds an element in about eight tensors of four bytes."""
        elements = math.prod(self.x.sizes) / math.prod(self.sizes)
        return math.ceil(32 * elements / self.type.dtype.bytes) * self.x.work

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.x.sources()

    def _of_blocks(
        self, make: Callable[..., T], source: WeightSource, rows: Box, blocks: tuple[int, int]
    ) -> T:
        """What `round_to_nearest` or `find_steps` makes of whole blocks of some rows."""
        low, high = blocks
        box = (*rows, (low * self.block, high * self.block))
        x = self.x.read(source, box)
        try:
            return make(x, self.format, self.block, symmetric=self.symmetric)
        except InputError as error:
            raise InputError(f"{', '.join(self.sources())}: {error}") from None

    def entry(self, index: int) -> WeightExpr:
        """See `WeightExpr`: blocks lie within an entry, unless it has too few dimensions."""
        if self.x.type.rank < 3 or self.kept:
            return Select(self, index)
        x = self.x.entry(index)
        if self.method == "nearest":
            return replace(self, x=x)
        return replace(self, x=x, kept=self._digest, place=index)

    @property
    def _digest(self) -> str:
        """What names the codes that calibration makes of a weight."""
        what = f"{self.x} {self.format} {self.block} {self.symmetric} {self.method}"
        return hashlib.sha256(what.encode()).hexdigest()[:32]

    @property
    def stored(self) -> str:
        """The name under which a source holds what calibration made."""
        return f"{CALIBRATED}{self.kept or self._digest}.{type(self).__name__.lower()}"

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        if self.method == "nearest":
            return self._rounded(source, box)
        if self.kept:
            (entry,) = source.read_rows(self.stored, self.place, self.place + 1)
            return entry[tuple(slice(*bounds) for bounds in box)]
        rows = source.read_rows(self.stored, *box[0])
        return rows[(slice(None), *(slice(*bounds) for bounds in box[1:]))]

    def _rounded(self, source: WeightSource, box: Box) -> torch.Tensor:
        """What is in `box`, rounded to the nearest."""
        raise NotImplementedError

    def _text(self, name: str) -> str:
        symmetric = "true" if self.symmetric else "false"
        method = "" if self.method == "nearest" else f', "{self.method}"'
        place = f', "{self.kept}", {self.place}' if self.kept else ""
        return f'{name}({self.x}, "{self.format}", {self.block}, {symmetric}{method}{place})'


@dataclass(frozen=True, slots=True)
class Codes(Quantised):
    """`codes(x, "int4", 64, true)`: u8[..., blocks, bytes of a block]."""

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        size = self.block * BITS[self.format] // 8
        return TensorType(DType.U8, (*self.x.type.shape[:-1], self.blocks, size))

    def __str__(self) -> str:
        return self._text("codes")

    def _rounded(self, source: WeightSource, box: Box) -> torch.Tensor:
        codes = self._of_blocks(round_to_nearest, source, box[:-2], box[-2]).codes
        codes = pack(codes) if BITS[self.format] == 4 else codes
        return codes[..., slice(*box[-1])]


@dataclass(frozen=True, slots=True)
class Scales(Quantised):
    """`scales(x, "int4", 64, true)`: f32[..., blocks]."""

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return TensorType(DType.F32, (*self.x.type.shape[:-1], self.blocks))

    def __str__(self) -> str:
        return self._text("scales")

    def _rounded(self, source: WeightSource, box: Box) -> torch.Tensor:
        return self._of_blocks(find_steps, source, box[:-1], box[-1]).scales


@dataclass(frozen=True, slots=True)
class Zeros(Quantised):
    """`zeros(x, "int4", 64, false)`: u8[..., bytes], zero points of four bits two in a byte."""

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        size = -(-self.blocks * BITS[self.format] // 8)
        return TensorType(DType.U8, (*self.x.type.shape[:-1], size))

    def __str__(self) -> str:
        return self._text("zeros")

    def _rounded(self, source: WeightSource, box: Box) -> torch.Tensor:
        import torch

        per = 8 // BITS[self.format]
        low, high = box[-1]
        blocks = (low * per, min(high * per, self.blocks))
        zeros = self._of_blocks(find_steps, source, box[:-1], blocks).zeros
        if zeros is None:
            shape = [stop - start for start, stop in (*box[:-1], blocks)]
            zeros = torch.full(shape, ZERO[self.format], dtype=torch.uint8)
        return pack(zeros) if per == 2 else zeros

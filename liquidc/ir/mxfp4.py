"""MXFP4 weights as they are released: a lazy expression that decodes them.

OCP Microscaling Formats 1.0: 32 elements of E2M1 share an exponent E8M0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Box, WeightExpr, WeightSource

if TYPE_CHECKING:
    import torch

BLOCK = 32
BIAS = 127
"""Of the shared exponent."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of E2M1 mean."""


@dataclass(frozen=True, slots=True)
class Mxfp4(WeightExpr):
    """`mxfp4(blocks, scales)`: blocks u8[..., G, 16] and exponents u8[..., G] as bf16[..., 32 · G].

    A byte holds two codes, the first one in its low half. Every value is exact in bf16.
    """

    blocks: WeightExpr
    scales: WeightExpr

    def __post_init__(self) -> None:
        blocks, scales = self.blocks.type, self.scales.type
        fits = blocks.shape == (*scales.shape, BLOCK // 2)
        if not fits or {blocks.dtype, scales.dtype} != {DType.U8}:
            raise ValueError(f"mxfp4 of blocks {blocks} and scales {scales}")

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        *lead, groups = self.scales.sizes
        return TensorType(DType.BF16, (*lead, groups * BLOCK))

    @property
    def work(self) -> int:
        """See `WeightExpr`: floats while it is decoded."""
        return 4

    def __str__(self) -> str:
        return f"mxfp4({self.blocks}, {self.scales})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return self.blocks.sources() + self.scales.sources()

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        *lead, (low, high) = box
        groups = (low // BLOCK, -(-high // BLOCK))
        codes = self.blocks.read(source, (*lead, groups, (0, BLOCK // 2)))
        exponents = self.scales.read(source, (*lead, groups)).to(torch.int32) - BIAS
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
        values = torch.ldexp(torch.tensor(VALUES)[pairs], exponents.unsqueeze(-1))
        first = groups[0] * BLOCK
        return values.flatten(-2)[..., low - first : high - first].to(torch.bfloat16)

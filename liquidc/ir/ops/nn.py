"""The layers of a transformer. `...` stands for any leading dimensions, usually the tokens'."""

from __future__ import annotations

from liquidc.ir.core import Op, Value, attribute, operand, optional, result
from liquidc.ir.ops.tensor import check_dim, same_dtype
from liquidc.ir.quantised import BITS
from liquidc.ir.rotary import Scaling
from liquidc.ir.types import DType, TensorType, broadcast
from liquidc.ir.weights import sizes


class Embed(Op, name="embed", tokenwise=True):
    """Rows of `table` [V, D] by `ids` [...]: [..., D]."""

    ids: Value = operand()
    table: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """[..., D]."""
        if self.table.type.rank != 2 or self.ids.dtype != DType.I64:
            raise ValueError(f"needs i64 ids and a table [V, D], not {self.table.type}")
        return (self.table.type.with_shape(*self.ids.shape, self.table.shape[1]),)


class Dequantize(Op, name="dequantize"):
    """f32[..., N, K] of a quantised weight: `(code - zero) · scale`, or `e4m3(code) · scale`.

    `codes` u8[..., N, blocks, bytes of a block], `scales` f32[..., N, blocks] and, for blocks that
    are not symmetric, `zeros` u8[..., N, bytes], laid out as in `liquidc.ir.quantised`.
    """

    codes: Value = operand()
    scales: Value = operand()
    zeros: Value | None = optional()
    format: str = attribute()
    y: Value = result()

    @property
    def block(self) -> int:
        """Elements of a block."""
        return sizes(self.codes.shape[-1:])[0] * 8 // BITS[self.format]

    def infer(self) -> tuple[TensorType, ...]:
        """[..., N, K]."""
        if self.format not in BITS:
            raise ValueError(f"format is {', '.join(BITS)}, not {self.format!r}")
        if self.codes.dtype != DType.U8 or self.codes.type.rank < 3:
            raise ValueError(f"the codes must be u8[..., N, blocks, bytes], not {self.codes.type}")
        *lead, blocks = sizes(self.codes.shape[:-1])
        wanted = TensorType(DType.F32, (*lead, blocks))
        if self.scales.type != wanted:
            raise ValueError(f"the scales must be {wanted}, not {self.scales.type}")
        if self.zeros is not None:
            size = -(-blocks * BITS[self.format] // 8)
            wanted = TensorType(DType.U8, (*lead, size))
            if self.zeros.type != wanted or self.format == "e4m3":
                raise ValueError(f"the zeros must be {wanted}, not {self.zeros.type}")
        return (TensorType(DType.F32, (*lead, blocks * self.block)),)


def expect_blocks(weight: Value, block: int) -> None:
    """Check in which blocks what meets `weight` [..., K] is rounded: 0 for none.

    Raises:
        ValueError: they don't fill a row, or the weight is none of few bits.
    """
    if block < 0 or (block and sizes(weight.shape[-1:])[0] % block):
        raise ValueError(f"blocks of {block} don't fill the rows of {weight.type}")
    if block and not isinstance(weight.op, Dequantize):
        raise ValueError("inputs are rounded where they meet codes; this weight has none")


class Linear(Op, name="linear", tokenwise=True):
    """`x · weightᵀ + bias`: x [..., K], weight [N, K], bias [N]: [..., N].

    With `input_block`, each block of so many elements of x is first rounded to 8 bits.
    """

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional()
    input_block: int = attribute(default=0)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """[..., N]."""
        same_dtype(self.x, self.weight)
        if self.weight.type.rank != 2 or self.x.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(f"{self.x.type} does not meet a weight {self.weight.type}")
        expect_blocks(self.weight, self.input_block)
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"the bias {self.bias.type} does not meet {self.weight.type}")
        return (self.x.type.with_shape(*self.x.shape[:-1], self.weight.shape[0]),)


class MatMul(Op, name="matmul"):
    """a [..., M, K] · b [..., K, N]: [..., M, N]."""

    a: Value = operand()
    b: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """[..., M, N]."""
        a, b = self.a.shape, self.b.shape
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise ValueError(f"can't multiply {self.a.type} and {self.b.type}")
        lead = broadcast([a[:-2], b[:-2]])
        return (TensorType(same_dtype(self.a, self.b), (*lead, a[-2], b[-1])),)


class RMSNorm(Op, name="rms_norm", tokenwise=True):
    """`x / √(mean x² + eps) · weight` over the last dimension (Zhang & Sennrich 2019)."""

    x: Value = operand()
    weight: Value | None = optional()
    eps: float = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As x."""
        if self.weight is not None and self.weight.shape != self.x.shape[-1:]:
            raise ValueError(f"the weight {self.weight.type} does not meet {self.x.type}")
        return (self.x.type,)


class LayerNorm(Op, name="layer_norm", tokenwise=True):
    """`(x - mean) / √(var + eps) · weight + bias` over the last dimension (Ba et al. 2016)."""

    x: Value = operand()
    weight: Value | None = optional()
    bias: Value | None = optional()
    eps: float = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As x."""
        for value in (self.weight, self.bias):
            if value is not None and value.shape != self.x.shape[-1:]:
                raise ValueError(f"{value.type} does not meet {self.x.type}")
        return (self.x.type,)


class Softmax(Op, name="softmax"):
    """Over one dimension."""

    x: Value = operand()
    dim: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As x."""
        check_dim(self.x, self.dim)
        return (self.x.type,)


class Rope(Op, name="rope", tokenwise=True):
    """Rotary embedding of x [..., H, hd] at `positions` [...], half rotation (Su et al. 2021).

    Angles are `position · theta^(-2i/hd)`, changed as `scaling` says (`liquidc.ir.rotary`); angle,
    sine and cosine are computed in float32.
    """

    x: Value = operand()
    positions: Value = operand()
    theta: float = attribute()
    scaling: str = attribute(default="")
    y: Value = result()

    def verify(self) -> None:
        """The scaling."""
        Scaling.read(self.scaling)

    def infer(self) -> tuple[TensorType, ...]:
        """As x."""
        if self.positions.shape != self.x.shape[:-2] or self.positions.dtype != DType.I64:
            raise ValueError(f"the positions {self.positions.type} don't meet {self.x.type}")
        return (self.x.type,)

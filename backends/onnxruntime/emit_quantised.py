"""Products with weights, which may be codes: the kernels for few bits, or floats made of codes.

A weight that is dequantised has one of three forms:

- `_few_bits`: MatMulNBits reads the codes;
- `_standard`: DequantizeLinear of ai.onnx makes floats, which a Gemm reads, for what MatMulNBits
  does not take, such as e4m3, and for everything with `--portable-weights`;
- `_floats`: plain maths make floats, of what DequantizeLinear does not take.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import Op, Value, ops
from liquidc.ir.quantised import BITS, ZERO
from liquidc.ir.weight_maths import Take, Xor
from liquidc.ir.weights import sizes

LEAST, MOST = 16, 128
"""MatMulNBits takes blocks of a power of two from 16 to 256; wider ones are split into these."""
STANDARD = {
    ("int4", False): (TensorProto.INT4, 0x88),
    ("int4", True): (TensorProto.UINT4, 0),
    ("int8", False): (TensorProto.INT8, 0x80),
    ("int8", True): (TensorProto.UINT8, 0),
    ("e4m3", False): (TensorProto.FLOAT8E4M3FN, 0),
}
"""Types of codes for DequantizeLinear, and the bits that are flipped; by format and zero points."""


def product(
    g: Graph, x: str, weight: Value, bias: str = "", expert: int | None = None, rounded: int = 0
) -> str:
    """`x · weightᵀ + bias` of rows x [n, K]; `weight` may be that of one expert of a stack.

    Blocks of `rounded` elements of x are rounded to 8 bits first; 0 for none.

    Gemm, whose weight keeps its layout [N, K], so that a tied embedding is stored once; or
    MatMulNBits on codes. A profile finds the first product of an arm by its name, which ends in
    Gemm in both cases.
    """
    op = weight.op
    if not isinstance(op, ops.Dequantize):
        w = g.expert(weight, expert)
    elif (split := _split(op)) and not g.shared.choices.portable_weights:
        # The kernel rounds x by itself, in its own blocks.
        x = _rounded(g, x, rounded) if rounded not in (0, split) else x
        return _few_bits(g, x, op, bias, expert, split)
    else:
        w = _values(g, op, expert)
        x = _rounded(g, x, rounded) if rounded else x
    return g.op("Gemm", [x, w, bias] if bias else [x, w], transB=1)


def is_direct(g: Graph, weight: Value) -> bool:
    """Whether a product reads a weight, or one expert's part of it, as it is stored."""
    op = weight.op
    if isinstance(op, ops.Dequantize):
        return bool(_split(op)) and not g.shared.choices.portable_weights
    return isinstance(op, ops.Weight)


def multiplies(op: ops.Dequantize) -> bool:
    """Whether a weight is only ever a factor of `product`, which reads its codes."""
    return all(
        (isinstance(user, ops.Linear) and user.weight is op.y and user.x is not op.y)
        or (isinstance(user, ops.GroupedExperts) and op.y in (user.gate_up, user.down))
        for user in op.y.uses
    )


def _split(op: ops.Dequantize) -> int:
    """The blocks in which MatMulNBits can have the codes: theirs, or parts of them; 0 for none."""
    if op.format == "e4m3":
        return 0
    block = op.block & -op.block  # the largest power of two that divides it
    parts = block if block == op.block <= 2 * MOST else min(block, MOST)
    if parts < LEAST or (parts != op.block and op.zeros is not None):
        return 0
    return parts


def _rounded(g: Graph, x: str, block: int) -> str:
    """Rows x [n, K] with their blocks rounded to 8 bits, as `round_inputs` does."""
    blocks = g.op("Reshape", [x, g.const([0, -1, block])])
    largest = g.op("ReduceMax", [g.op("Abs", [blocks]), g.const([-1])], keepdims=1)
    scale = g.op("Div", [largest, g.const(127, np.float32)])
    none = g.op("Equal", [scale, g.const(0, np.float32)])
    scale = g.op("Where", [none, g.const(1, np.float32), scale])
    steps = g.op("Round", [g.op("Div", [blocks, scale])])
    return g.op("Reshape", [g.op("Mul", [steps, scale]), g.op("Shape", [x])])


def _values(g: Graph, op: ops.Dequantize, expert: int | None) -> str:
    """The floats of codes."""
    return _standard(g, op, expert) if _fits_standard(op) else _floats(g, op, expert)


def _fits_standard(op: ops.Dequantize) -> bool:
    """Whether DequantizeLinear takes the tensors as the engine stores them.

    Zero points of four bits are packed without regard to rows there, ours row by row: the same
    where rows have an even number of them.
    """
    parts = [part for part in (op.codes, op.scales, op.zeros) if part is not None]
    odd = op.zeros is not None and op.format == "int4" and sizes(op.scales.shape)[-1] % 2
    return all(isinstance(part.op, ops.Weight) for part in parts) and not odd


def _standard(g: Graph, op: ops.Dequantize, expert: int | None) -> str:
    """The floats of codes, by DequantizeLinear.

    Codes without zero points become signed ones, whose zero is 0: TensorRT takes no others. The
    weight keeps its layout [N, K], blocks along the last dimension: ONNX Runtime 1.32 fails to
    load the form that it would fuse, [K, N] and MatMul, inside an If (docs/facts.md).
    """
    shape = sizes(op.y.shape if expert is None else op.y.shape[1:])
    element, flip = STANDARD[op.format, op.zeros is not None]
    inputs = [_stored(g, op.codes, expert, element, shape, flip), g.expert(op.scales, expert)]
    if op.zeros is not None:
        blocks = (*shape[:-1], shape[-1] // op.block)
        inputs.append(_stored(g, op.zeros, expert, element, blocks))
    return g.op("DequantizeLinear", inputs, axis=len(shape) - 1, block_size=op.block)


def _stored(
    g: Graph, value: Value, expert: int | None, element: int, shape: tuple[int, ...], flip: int = 0
) -> str:
    """The bytes of a weight, some bits flipped, as a tensor of another type."""
    name, expr = g.weight_expr(stored_name(value), expert)
    expr = Xor(expr, flip) if flip else expr
    return g.view(f"{name}.standard", expr, element, shape)


def stored_name(value: Value) -> str:
    """The name of a value that is a weight."""
    if not isinstance(value.op, ops.Weight):
        raise UnsupportedError(f"onnxruntime: %{value.name} is no weight of the model")
    return value.op.weight


def _few_bits(
    g: Graph, x: str, op: ops.Dequantize, bias: str, expert: int | None, block: int
) -> str:
    """MatMulNBits at accuracy level 4: the rows of x are rounded to 8 bits block by block.

    The other levels compute in float32 and are up to 250 times slower (docs/facts.md).
    """
    count, columns = sizes(op.y.shape[-2:])
    if block == op.block:
        codes, scales = g.expert(op.codes, expert), g.expert(op.scales, expert)
    else:
        codes, scales = _in_parts(g, op, expert, block)
    zeros = "" if op.zeros is None else g.expert(op.zeros, expert)
    inputs = [x, codes, scales, zeros, "", bias]
    while not inputs[-1]:
        inputs.pop()
    name = f"{g.prefix}/Gemm" if g.prefix else "Gemm"
    bits = {"bits": BITS[op.format], "block_size": block, "accuracy_level": 4}
    return g.contrib("MatMulNBits", inputs, name=name, K=columns, N=count, **bits)


def _in_parts(g: Graph, op: ops.Dequantize, expert: int | None, block: int) -> tuple[str, str]:
    """Codes and scales with smaller blocks: the same bytes of codes, every scale repeated."""
    count, columns = sizes(op.y.shape[-2:])
    bytes = block * BITS[op.format] // 8
    name, expr = g.weight_expr(stored_name(op.codes), expert)
    shape = (count, columns // block, bytes)
    codes = g.view(f"{name}.parts", expr, TensorProto.UINT8, shape)
    name, expr = g.weight_expr(stored_name(op.scales), expert)
    index = tuple(i // (op.block // block) for i in range(columns // block))
    expr = Take(expr, expr.type.rank - 1, index)
    return codes, g.view(f"{name}.parts", expr, TensorProto.FLOAT, shape[:2])


def _floats(g: Graph, op: ops.Dequantize, expert: int | None) -> str:
    """The floats of codes, by plain maths."""
    if op.format == "e4m3":
        raise UnsupportedError(f"onnxruntime: e4m3 codes at {op.loc} are no weight")
    codes, scales = g.expert(op.codes, expert), g.expert(op.scales, expert)
    whole = op.codes.shape if expert is None else op.codes.shape[1:]
    *lead, blocks, _ = sizes(whole)
    if op.format == "int4":
        codes = _unpacked(g, codes, [*lead, blocks, op.block])
    values = g.op("Cast", [codes], to=TensorProto.FLOAT)
    if op.zeros is not None:
        zeros = g.expert(op.zeros, expert)
        if op.format == "int4":
            zeros = _unpacked(g, zeros, [*lead, 2 * sizes(op.zeros.shape[-1:])[0]])
            zeros = g.op("Slice", [zeros, g.const([0]), g.const([blocks]), g.const([len(lead)])])
        zeros = g.op("Cast", [zeros], to=TensorProto.FLOAT)
        values = g.op("Sub", [values, g.op("Unsqueeze", [zeros, g.const([-1])])])
    else:
        values = g.op("Sub", [values, g.const(ZERO[op.format], np.float32)])
    values = g.op("Mul", [values, g.op("Unsqueeze", [scales, g.const([-1])])])
    return g.op("Reshape", [values, g.const([*lead, blocks * op.block])])


def _unpacked(g: Graph, data: str, shape: list[int]) -> str:
    """Codes of four bits, one in a byte."""
    low = g.op("BitwiseAnd", [data, g.const(15, np.uint8)])
    high = g.op("BitShift", [data, g.const(4, np.uint8)], direction="RIGHT")
    pair = [g.op("Unsqueeze", [part, g.const([-1])]) for part in (low, high)]
    return g.op("Reshape", [g.op("Concat", pair, axis=-1), g.const(shape)])


def _dequantize(g: Graph, op: ops.Dequantize) -> list[str]:
    """Nothing where products read the codes."""
    return [] if multiplies(op) else [_values(g, op, None)]


EMIT: dict[type[Op], Emit] = {ops.Dequantize: _dequantize}
"""Lowerings by op class."""

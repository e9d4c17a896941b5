"""Products with weights, which may be codes: the kernels for few bits, or floats made of codes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from liquidc.backends.onnxruntime.emit_tensor import Emit
from liquidc.backends.onnxruntime.graph import Graph
from liquidc.errors import UnsupportedError
from liquidc.ir import Op, Value, ops
from liquidc.ir.quantised import BITS, ZERO
from liquidc.ir.weights import sizes

LEAST = 16
"""MatMulNBits takes blocks of a power of two from here on."""


def product(g: Graph, x: str, weight: Value, bias: str = "", expert: int | None = None) -> str:
    """`x · weightᵀ + bias` of rows x [n, K]; `weight` may be that of one expert of a stack.

    Gemm, whose weight keeps its layout [N, K], so that a tied embedding is stored once; or
    MatMulNBits on codes. A profile finds the first product of an arm by its name, which ends in
    Gemm in both cases.
    """
    op = weight.op
    if not isinstance(op, ops.Dequantize):
        w = g.expert(weight, expert)
    elif op.format == "e4m3" or op.block < LEAST or op.block & (op.block - 1):
        w = _floats(g, op, expert)
    else:
        return _few_bits(g, x, op, bias, expert)
    return g.op("Gemm", [x, w, bias] if bias else [x, w], transB=1)


def multiplies(op: ops.Dequantize) -> bool:
    """Whether a weight is only ever a factor of `product`, which reads its codes."""
    return all(
        (isinstance(user, ops.Linear) and user.weight is op.y and user.x is not op.y)
        or (isinstance(user, ops.GroupedExperts) and op.y in (user.gate_up, user.down))
        for user in op.y.uses
    )


def _few_bits(g: Graph, x: str, op: ops.Dequantize, bias: str, expert: int | None) -> str:
    """MatMulNBits at accuracy level 4: the rows of x are rounded to 8 bits block by block.

    The other levels compute in float32 and are up to 250 times slower (docs/facts.md).
    """
    count, columns = sizes(op.y.shape[-2:])
    codes, scales = g.expert(op.codes, expert), g.expert(op.scales, expert)
    zeros = "" if op.zeros is None else g.expert(op.zeros, expert)
    inputs = [x, codes, scales, zeros, "", bias]
    while not inputs[-1]:
        inputs.pop()
    name = f"{g.prefix}/Gemm" if g.prefix else "Gemm"
    bits = {"bits": BITS[op.format], "block_size": op.block, "accuracy_level": 4}
    return g.contrib("MatMulNBits", inputs, name=name, K=columns, N=count, **bits)


def _floats(g: Graph, op: ops.Dequantize, expert: int | None) -> str:
    """The floats of codes, by plain maths."""
    codes, scales = g.expert(op.codes, expert), g.expert(op.scales, expert)
    if op.format == "e4m3":
        if codes not in g.shared.weights:
            raise UnsupportedError(f"onnxruntime: e4m3 codes at {op.loc} are no weight")
        g.shared.elements[codes] = TensorProto.FLOAT8E4M3FN
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
    elif ZERO[op.format]:
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
    return [] if multiplies(op) else [_floats(g, op, None)]


EMIT: dict[type[Op], Emit] = {ops.Dequantize: _dequantize}
"""Lowerings by op class."""

"""What each ATen operator becomes in the IR; docs/ops.md is generated from `TABLE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from liquidc.frontend.aten_table import TABLE, dim_of, out_type, translates
from liquidc.frontend.importer import DTYPES, Import, Importer
from liquidc.ir import Dim, DType, Op, Value, ops
from liquidc.ir.types import product


def _unary(cls: Callable[[Value], Op]) -> Import:
    def translate(imp: Importer, node: fx.Node) -> Value:
        x = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype)
        return imp.emit(cls(x), node).result

    return translate


def _binary(cls: type[ops.Binary]) -> Import:
    def translate(imp: Importer, node: fx.Node) -> Value:
        dtype = _operand_dtype(node) if issubclass(cls, ops.Compare) else out_type(imp, node).dtype
        a, b = (imp.operand(imp.arg(node, i), dtype) for i in range(2))
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            b = imp.emit(ops.Mul(b, imp.scalar(float(str(alpha)), dtype)), node).y
        return imp.emit(cls(a, b), node).result

    return translate


def _operand_dtype(node: fx.Node) -> DType:
    """The element type in which a comparison of the node's arguments happens."""
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
    return DTYPES[cast(Any, torch.result_type)(*values)]


for _name, _cls in {
    "exp": ops.Exp,
    "log": ops.Log,
    "floor": ops.Floor,
    "sqrt": ops.Sqrt,
    "rsqrt": ops.Rsqrt,
    "sin": ops.Sin,
    "cos": ops.Cos,
    "tanh": ops.Tanh,
    "sigmoid": ops.Sigmoid,
    "relu": ops.ReLU,
    "silu": ops.SiLU,
    "logical_not": ops.Not,
    "bitwise_not": ops.Not,
}.items():
    TABLE[f"aten.{_name}.default"] = _unary(_cls)

for _name, _cls in {
    "add": ops.Add,
    "sub": ops.Sub,
    "mul": ops.Mul,
    "div": ops.Div,
    "eq": ops.Eq,
    "ne": ops.Ne,
    "lt": ops.Lt,
    "le": ops.Le,
    "gt": ops.Gt,
    "ge": ops.Ge,
    "bitwise_and": ops.And,
    "bitwise_or": ops.Or,
    "__and__": ops.And,
    "__or__": ops.Or,
}.items():
    TABLE[f"aten.{_name}.Tensor"] = TABLE[f"aten.{_name}.Scalar"] = _binary(_cls)

for _name, _cls in {
    "maximum": ops.Maximum,
    "minimum": ops.Minimum,
    "clamp_min": ops.Maximum,
    "clamp_max": ops.Minimum,
    "logical_and": ops.And,
    "logical_or": ops.Or,
}.items():
    TABLE[f"aten.{_name}.default"] = _binary(_cls)


@translates("aten.rsub.Scalar")
def _rsub(imp: Importer, node: fx.Node) -> Value:
    dtype = out_type(imp, node).dtype
    a, b = (imp.operand(imp.arg(node, i), dtype) for i in range(2))
    return imp.emit(ops.Sub(b, a), node).y


@translates("aten.log1p.default")
def _log1p(imp: Importer, node: fx.Node) -> Value:
    x = imp.operand(imp.arg(node, 0), out_type(imp, node).dtype)
    one = imp.operand(1.0, out_type(imp, node).dtype)
    return imp.emit(ops.Log(imp.emit(ops.Add(x, one), node).y), node).result


@translates("aten.abs.default")
def _abs(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    return imp.emit(ops.Maximum(x, _negative(imp, x)), node).y


@translates("aten.neg.default")
def _neg(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    return imp.emit(ops.Neg(x), node).y if x.dtype.is_float else _negative(imp, x)


def _negative(imp: Importer, x: Value) -> Value:
    """-x, of integers too."""
    return imp.emit(ops.Sub(imp.scalar(0, x.dtype), x)).y


@translates("aten.square.default")
def _square(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    return imp.emit(ops.Mul(x, x), node).y


@translates("aten.sign.default", "aten.sgn.default")
def _sign(imp: Importer, node: fx.Node) -> Value:
    x, dtype = imp.arg(node, 0), out_type(imp, node).dtype
    zero = imp.scalar(0, x.dtype)
    above, below = (imp.emit(compare(x, zero), node).y for compare in (ops.Gt, ops.Lt))
    return imp.emit(ops.Sub(imp.cast(above, dtype), imp.cast(below, dtype)), node).y


@translates("aten.reciprocal.default")
def _reciprocal(imp: Importer, node: fx.Node) -> Value:
    dtype = out_type(imp, node).dtype
    one = imp.scalar(1.0, dtype)
    return imp.emit(ops.Div(one, imp.cast(imp.arg(node, 0), dtype)), node).y


MAX_POWER = 8
"""The largest exponent that becomes products."""


@translates("aten.expm1.default", "prims.expm1.default")
def _expm1(imp: Importer, node: fx.Node) -> Value:
    x = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype)
    return imp.emit(ops.Sub(imp.emit(ops.Exp(x), node).y, imp.scalar(1.0, x.dtype)), node).y


@translates("aten.pow.Tensor_Scalar")
def _pow(imp: Importer, node: fx.Node) -> Value:
    x, exponent = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype), imp.arg(node, 1)
    if exponent == 0.5:
        return imp.emit(ops.Sqrt(x), node).y
    if exponent == -0.5:
        return imp.emit(ops.Rsqrt(x), node).y
    if exponent not in range(-MAX_POWER, MAX_POWER + 1) or exponent == 0:
        raise ValueError(f"the power {exponent} is not supported: use exp and log")
    y = x
    for _ in range(abs(int(exponent)) - 1):
        y = imp.emit(ops.Mul(y, x), node).y
    return y if exponent > 0 else imp.emit(ops.Div(imp.scalar(1.0, x.dtype), y), node).y


@translates("aten.pow.Scalar")
def _power_of(imp: Importer, node: fx.Node) -> Value:
    base, x = imp.arg(node, 0), imp.cast(imp.arg(node, 1), out_type(imp, node).dtype)
    if base <= 0:
        raise ValueError(f"powers of {base} are not supported")
    return imp.emit(ops.Exp(imp.emit(ops.Mul(x, imp.scalar(math.log(base), x.dtype))).y), node).y


@translates(
    "aten.remainder.Scalar",
    "aten.remainder.Tensor",
    "aten.floor_divide.default",
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
)
def _floor_division(imp: Importer, node: fx.Node) -> Value:
    """The quotient rounded down, or what remains; float64 holds integers exactly to 2^53."""
    mode, dtype = node.kwargs.get("rounding_mode", "floor"), out_type(imp, node).dtype
    if mode != "floor":
        raise ValueError(f'rounding_mode is "floor", not "{mode}"')
    a, b = (imp.operand(imp.arg(node, i), dtype) for i in range(2))
    wide = dtype if dtype.is_float else DType.F64
    quotient = imp.emit(ops.Div(imp.cast(a, wide), imp.cast(b, wide)), node).y
    whole = imp.cast(imp.emit(ops.Floor(quotient), node).y, dtype)
    if "remainder" not in str(node.target):
        return whole
    return imp.emit(ops.Sub(a, imp.emit(ops.Mul(whole, b), node).y), node).y


@translates("aten.clamp.default", "aten.clamp.Tensor")
def _clamp(imp: Importer, node: fx.Node) -> Value:
    out = out_type(imp, node)
    x = imp.cast(imp.arg(node, 0), out.dtype)
    for cls, index, name in ((ops.Maximum, 1, "min"), (ops.Minimum, 2, "max")):
        if (bound := imp.arg(node, index, name)) is not None:
            x = imp.emit(cls(x, imp.operand(bound, out.dtype)), node).result
    return x


@translates("aten.gelu.default")
def _gelu(imp: Importer, node: fx.Node) -> Value:
    how = str(node.kwargs.get("approximate", "none"))
    return imp.emit(ops.GELU(imp.arg(node, 0), approximate=how), node).result


@translates(
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.to.other",
    "aten._to_copy.default",
    "aten.type_as.default",
)
def _cast(imp: Importer, node: fx.Node) -> Value:
    return imp.cast(imp.arg(node, 0), out_type(imp, node).dtype)


@translates(
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
)
def _same(imp: Importer, node: fx.Node) -> Value:
    return imp.arg(node, 0)


@translates("aten.dropout.default")
def _dropout(imp: Importer, node: fx.Node) -> Value:
    if imp.arg(node, 2, "train"):
        raise ValueError("its numbers are random: pass training=self.training")
    return imp.arg(node, 0)


@translates("aten.embedding.default")
def _embedding(imp: Importer, node: fx.Node) -> Value:
    ids = imp.cast(imp.arg(node, 1), DType.I64)
    return imp.emit(ops.Embed(ids, imp.arg(node, 0)), node).y


@translates(
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    "aten.ones.default",
    "aten.ones_like.default",
    "aten.new_ones.default",
    "aten.full.default",
    "aten.full_like.default",
    "aten.new_full.default",
    "aten.scalar_tensor.default",
)
def _full(imp: Importer, node: fx.Node) -> Value:
    name = str(node.target)
    if "scalar" in name:
        number = imp.arg(node, 0)
    elif "full" in name:
        number = imp.arg(node, 2 if "new" in name else 1)
    else:
        number = 1 if "ones" in name else 0
    return imp.fill(number, out_type(imp, node))


@translates("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(imp: Importer, node: fx.Node) -> Value:
    out = out_type(imp, node)
    plain = str(node.target).endswith("default")
    start, step = (0, 1) if plain else (imp.arg(node, 0), imp.arg(node, 2, "step", 1))
    y = imp.cast(imp.emit(ops.Iota(dim=out.shape[0]), node).y, out.dtype)
    if step != 1:
        y = imp.emit(ops.Mul(y, imp.operand(step, out.dtype)), node).y
    return y if start == 0 else imp.emit(ops.Add(y, imp.operand(start, out.dtype)), node).y


@translates("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _where(imp: Importer, node: fx.Node) -> Value:
    dtype = out_type(imp, node).dtype
    a, b = (imp.operand(imp.arg(node, i), dtype) for i in (1, 2))
    return imp.emit(ops.Where(imp.arg(node, 0), a, b), node).y


@translates("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    filled = imp.operand(imp.arg(node, 2), x.dtype)
    return imp.emit(ops.Where(imp.arg(node, 1), filled, x), node).y


def _reduce(cls: Callable[..., ops.Reduce], negated: bool = False) -> Import:
    """Over the given dimensions, or all; `negated` turns the largest into the smallest."""

    def translate(imp: Importer, node: fx.Node) -> Value:
        x, out = imp.arg(node, 0), out_type(imp, node)
        given = imp.arg(node, 1, "dim")
        dims: Sequence[int] = given if isinstance(given, list) else [given]
        if given is None or given == []:
            dims = range(x.type.rank)
        x = imp.cast(x, out.dtype)
        keep = bool(imp.arg(node, 2, "keepdim", False))
        kept = tuple(sorted(dim_of(x, dim) for dim in dims))
        x = _negative(imp, x) if negated else x
        y = imp.emit(cls(x, dims=kept, keep=keep), node).result
        return _negative(imp, y) if negated else y

    return translate


for _names, _cls in {
    ("aten.sum.default", "aten.sum.dim_IntList"): ops.Sum,
    ("aten.mean.default", "aten.mean.dim"): ops.Mean,
    ("aten.amax.default", "aten.max.default"): ops.Max,
    ("aten.any.default", "aten.any.dim", "aten.any.dims"): ops.Any,
}.items():
    translates(*_names)(_reduce(_cls))
translates("aten.amin.default", "aten.min.default")(_reduce(ops.Max, negated=True))


@translates("aten.var.correction")
def _variance(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype), out_type(imp, node)
    given, correction = imp.arg(node, 1, "dim"), imp.arg(node, 2, "correction", 1)
    dims = tuple(sorted(dim_of(x, dim) for dim in given or range(x.type.rank)))
    count = product(x.shape[dim] for dim in dims)
    if not isinstance(count, int):
        raise ValueError("only a variance of a known number of elements is supported")
    off = imp.emit(ops.Sub(x, imp.emit(ops.Mean(x, dims=dims, keep=True)).y), node).y
    total = imp.emit(ops.Sum(imp.emit(ops.Mul(off, off), node).y, dims=dims), node).y
    number = imp.scalar(float(max(count - float(correction), 0)), x.dtype)
    return imp.reshape(imp.emit(ops.Div(total, number), node).y, out.shape)


@translates("aten.linalg_vector_norm.default")
def _vector_norm(imp: Importer, node: fx.Node) -> Value:
    """√ of the sum of squares."""
    x, out = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype), out_type(imp, node)
    if imp.arg(node, 1, "ord", 2) != 2:
        raise ValueError("only the norm of order 2 is supported")
    given = imp.arg(node, 2, "dim")
    dims = range(x.type.rank) if given is None else given
    squares = imp.emit(ops.Mul(x, x), node).y
    total = imp.emit(ops.Sum(squares, dims=tuple(sorted(dim_of(x, dim) for dim in dims))), node).y
    return imp.reshape(imp.emit(ops.Sqrt(total), node).y, out.shape)


@translates("aten.max.dim", "aten.min.dim")
def _extreme(imp: Importer, node: fx.Node) -> list[Value | None]:
    """The values alone."""
    x, (fake, _) = imp.arg(node, 0), node.meta["val"]
    dim = dim_of(x, imp.arg(node, 1))
    smallest = "min" in str(node.target)
    y = imp.emit(ops.Max(_negative(imp, x) if smallest else x, dims=(dim,)), node).y
    y = imp.reshape(_negative(imp, y) if smallest else y, imp.shape(fake.shape))
    return [y, None]


@translates("aten.cumsum.default")
def _cumsum(imp: Importer, node: fx.Node) -> Value:
    x = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype)
    return imp.emit(ops.CumSum(x, dim=dim_of(x, imp.arg(node, 1))), node).y


@translates("aten.softmax.int", "aten._softmax.default")
def _softmax(imp: Importer, node: fx.Node) -> Value:
    x = imp.cast(imp.arg(node, 0), out_type(imp, node).dtype)
    return imp.emit(ops.Softmax(x, dim=dim_of(x, imp.arg(node, 1))), node).y


@translates("aten.linear.default")
def _linear(imp: Importer, node: fx.Node) -> Value:
    x, weight, bias = imp.arg(node, 0), imp.arg(node, 1), imp.arg(node, 2, "bias")
    return imp.emit(ops.Linear(x, weight, bias), node).y


@translates("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def _matmul(imp: Importer, node: fx.Node) -> Value:
    a, b = imp.arg(node, 0), imp.arg(node, 1)
    a = imp.reshape(a, (1, *a.shape)) if a.type.rank == 1 else a
    b = imp.reshape(b, (*b.shape, 1)) if b.type.rank == 1 else b
    return imp.reshape(imp.emit(ops.MatMul(a, b), node).y, out_type(imp, node).shape)


@translates("aten.rms_norm.default")
def _rms_norm(imp: Importer, node: fx.Node) -> Value:
    x, shape = imp.arg(node, 0), imp.arg(node, 1)
    weight, eps = imp.arg(node, 2, "weight"), imp.arg(node, 3, "eps")
    if len(shape) != 1:
        raise ValueError("only norms over the last dimension are supported")
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    return imp.emit(ops.RMSNorm(x, weight, eps=float(eps)), node).y


@translates("aten.layer_norm.default")
def _layer_norm(imp: Importer, node: fx.Node) -> Value:
    x, shape = imp.arg(node, 0), imp.arg(node, 1)
    if len(shape) != 1:
        raise ValueError("only norms over the last dimension are supported")
    weight, bias = imp.arg(node, 2, "weight"), imp.arg(node, 3, "bias")
    eps = float(imp.arg(node, 4, "eps", 1e-5))
    return imp.emit(ops.LayerNorm(x, weight, bias, eps=eps), node).y


@translates("aten.scaled_dot_product_attention.default")
def _attention(imp: Importer, node: fx.Node) -> Value:
    """Attention without a cache, over the tokens at hand."""
    q, k, v = (imp.arg(node, i) for i in range(3))
    mask, causal = imp.arg(node, 3, "attn_mask"), bool(imp.arg(node, 5, "is_causal", False))
    scale = node.kwargs.get("scale") or 1 / math.sqrt(float(str(q.shape[-1])))
    if imp.arg(node, 4, "dropout_p", 0.0):
        raise ValueError("dropout_p is random: give 0.0 in evaluation")
    if node.kwargs.get("enable_gqa"):
        k, v = (_shared_heads(imp, x, q.shape[-3]) for x in (k, v))
    swap = (*range(q.type.rank - 2), q.type.rank - 1, q.type.rank - 2)
    scores = imp.emit(ops.MatMul(q, imp.emit(ops.Transpose(k, perm=swap)).y), node).y
    scores = imp.emit(ops.Mul(scores, imp.scalar(float(str(scale)), q.dtype)), node).y
    if causal:
        row, column = (imp.emit(ops.Iota(dim=x.shape[-2])).y for x in (q, k))
        row = imp.reshape(row, (*row.shape, 1))
        mask = imp.emit(ops.Le(column, row), node).y
    if mask is not None and mask.dtype == DType.BOOL:
        lowest = imp.scalar(-math.inf, q.dtype)
        scores = imp.emit(ops.Where(mask, scores, lowest), node).y
    elif mask is not None:
        scores = imp.emit(ops.Add(scores, mask), node).y
    share = imp.emit(ops.Softmax(scores, dim=q.type.rank - 1), node).y
    return imp.emit(ops.MatMul(share, v), node).y


def _shared_heads(imp: Importer, x: Value, heads: Dim) -> Value:
    """Keys or values [..., KV, S, hd] for `heads` query heads."""
    *lead, count, slots, width = x.shape
    if not isinstance(heads, int) or not isinstance(count, int):
        raise ValueError("the number of heads must be known")
    apart = imp.reshape(x, (*lead, count, 1, slots, width))
    shape = (*lead, count, heads // count, slots, width)
    return imp.reshape(imp.emit(ops.Broadcast(apart, shape=shape)).y, (*lead, heads, slots, width))

"""What each ATen operator becomes in the IR; docs/ops.md is generated from `TABLE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from liquidc.frontend.importer import DTYPES, Import, Importer
from liquidc.ir import DType, Op, TensorType, Value, ops

TABLE: dict[str, Import] = {}


def translates(*names: str) -> Callable[[Import], Import]:
    """Register a translation for operators, named as `torch.ops` prints them."""

    def register(function: Import) -> Import:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


def _out(imp: Importer, node: fx.Node) -> TensorType:
    return imp.type_of(node.meta["val"])


def _unary(cls: Callable[[Value], Op]) -> Import:
    def translate(imp: Importer, node: fx.Node) -> Value:
        x = imp.cast(imp.arg(node, 0), _out(imp, node).dtype)
        return imp.emit(cls(x), node).result

    return translate


def _binary(cls: type[ops.Binary]) -> Import:
    def translate(imp: Importer, node: fx.Node) -> Value:
        dtype = _operand_dtype(node) if issubclass(cls, ops.Compare) else _out(imp, node).dtype
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
    "neg": ops.Neg,
    "exp": ops.Exp,
    "log": ops.Log,
    "floor": ops.Floor,
    "sqrt": ops.Sqrt,
    "rsqrt": ops.Rsqrt,
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
    "logical_and": ops.And,
    "logical_or": ops.Or,
}.items():
    TABLE[f"aten.{_name}.default"] = _binary(_cls)


@translates("aten.rsub.Scalar")
def _rsub(imp: Importer, node: fx.Node) -> Value:
    dtype = _out(imp, node).dtype
    a, b = (imp.operand(imp.arg(node, i), dtype) for i in range(2))
    return imp.emit(ops.Sub(b, a), node).y


@translates("aten.log1p.default")
def _log1p(imp: Importer, node: fx.Node) -> Value:
    x = imp.operand(imp.arg(node, 0), _out(imp, node).dtype)
    one = imp.operand(1.0, _out(imp, node).dtype)
    return imp.emit(ops.Log(imp.emit(ops.Add(x, one), node).y), node).result


@translates("aten.pow.Tensor_Scalar")
def _pow(imp: Importer, node: fx.Node) -> Value:
    x, exponent = imp.arg(node, 0), imp.arg(node, 1)
    if exponent != 2:
        raise ValueError(f"only squares are supported, not the power {exponent}")
    return imp.emit(ops.Mul(x, x), node).y


@translates("aten.clamp.default", "aten.clamp.Tensor")
def _clamp(imp: Importer, node: fx.Node) -> Value:
    out = _out(imp, node)
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
    "aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default", "aten.type_as.default"
)
def _cast(imp: Importer, node: fx.Node) -> Value:
    return imp.cast(imp.arg(node, 0), _out(imp, node).dtype)


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
        raise ValueError("the model is in training mode: call eval() first")
    return imp.arg(node, 0)


@translates("<built-in function getitem>")
def _getitem(imp: Importer, node: fx.Node) -> Any:
    return imp.arg(node, 0)[imp.arg(node, 1)]


@translates(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
)
def _reshape(imp: Importer, node: fx.Node) -> Value:
    return imp.reshape(imp.arg(node, 0), _out(imp, node).shape)


@translates("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), _out(imp, node)
    return x if x.shape == out.shape else imp.emit(ops.Broadcast(x, shape=out.shape), node).y


def _dim(value: Value, dim: int) -> int:
    return dim % max(value.type.rank, 1)


@translates("aten.transpose.int")
def _transpose(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    a, b = (_dim(x, imp.arg(node, i)) for i in (1, 2))
    perm = list(range(x.type.rank))
    perm[a], perm[b] = perm[b], perm[a]
    return imp.emit(ops.Transpose(x, perm=tuple(perm)), node).y


@translates("aten.t.default")
def _t(imp: Importer, node: fx.Node) -> Value:
    return imp.emit(ops.Transpose(imp.arg(node, 0), perm=(1, 0)), node).y


@translates("aten.permute.default")
def _permute(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    perm = tuple(_dim(x, dim) for dim in imp.arg(node, 1))
    return imp.emit(ops.Transpose(x, perm=perm), node).y


def _slice_to(imp: Importer, node: fx.Node, x: Value, dim: int, start: int, stop: int) -> Value:
    size = x.shape[dim]
    if (start, stop) == (0, size):
        return x
    return imp.emit(ops.Slice(x, dim=dim, start=start, stop=stop), node).y


@translates("aten.slice.Tensor")
def _slice(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), _out(imp, node)
    dim, start = _dim(x, imp.arg(node, 1, "dim", 0)), imp.arg(node, 2, "start") or 0
    if imp.arg(node, 4, "step", 1) != 1:
        raise ValueError("only slices of step 1 are supported")
    if x.type == out:
        return x
    size, width = x.shape[dim], out.shape[dim]
    if not isinstance(size, int) or not isinstance(width, int) or not isinstance(start, int):
        raise ValueError(f"can't slice the dimension {size} of unknown size")
    start = start + size if start < 0 else start
    return _slice_to(imp, node, x, dim, start, start + width)


@translates("aten.select.int")
def _select(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), _out(imp, node)
    dim, index = _dim(x, imp.arg(node, 1)), imp.arg(node, 2)
    if not isinstance(x.shape[dim], int):
        raise ValueError(f"can't select from the dimension {x.shape[dim]} of unknown size")
    index = index % x.shape[dim]
    return imp.reshape(_slice_to(imp, node, x, dim, index, index + 1), out.shape)


@translates("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
def _split(imp: Importer, node: fx.Node) -> list[Value]:
    x = imp.arg(node, 0)
    dim = _dim(x, imp.arg(node, 2, "dim", 0))
    parts: list[Value] = []
    start = 0
    for fake in node.meta["val"]:
        width = imp.dim(fake.shape[dim])
        if not isinstance(width, int):
            raise ValueError(f"can't split the dimension {width} of unknown size")
        parts.append(_slice_to(imp, node, x, dim, start, start + width))
        start += width
    return parts


@translates("aten.unbind.int")
def _unbind(imp: Importer, node: fx.Node) -> list[Value]:
    x, dim = imp.arg(node, 0), _dim(imp.arg(node, 0), imp.arg(node, 1, "dim", 0))
    parts: list[Value] = []
    for i, fake in enumerate(node.meta["val"]):
        parts.append(imp.reshape(_slice_to(imp, node, x, dim, i, i + 1), imp.shape(fake.shape)))
    return parts


@translates("aten.cat.default")
def _cat(imp: Importer, node: fx.Node) -> Value:
    xs = imp.arg(node, 0)
    dtype = _out(imp, node).dtype
    dim = _dim(xs[0], imp.arg(node, 1, "dim", 0))
    return imp.emit(ops.Concat([imp.cast(x, dtype) for x in xs], dim=dim), node).y


@translates("aten.stack.default")
def _stack(imp: Importer, node: fx.Node) -> Value:
    xs, out = imp.arg(node, 0), _out(imp, node)
    dim = imp.arg(node, 1, "dim", 0) % out.rank
    shape = (*xs[0].shape[:dim], 1, *xs[0].shape[dim:])
    parts = [imp.reshape(imp.cast(x, out.dtype), shape) for x in xs]
    return imp.emit(ops.Concat(parts, dim=dim), node).y


@translates("aten.index_select.default")
def _index_select(imp: Importer, node: fx.Node) -> Value:
    x, index = imp.arg(node, 0), imp.arg(node, 2)
    return imp.emit(ops.Gather(x, index, dim=_dim(x, imp.arg(node, 1))), node).y


@translates("aten.embedding.default")
def _embedding(imp: Importer, node: fx.Node) -> Value:
    return imp.emit(ops.Embed(imp.arg(node, 1), imp.arg(node, 0)), node).y


@translates(
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
    return imp.fill(number, _out(imp, node))


@translates("aten.arange.default")
def _arange(imp: Importer, node: fx.Node) -> Value:
    out = _out(imp, node)
    return imp.cast(imp.emit(ops.Iota(dim=out.shape[0]), node).y, out.dtype)


@translates("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _where(imp: Importer, node: fx.Node) -> Value:
    dtype = _out(imp, node).dtype
    a, b = (imp.operand(imp.arg(node, i), dtype) for i in (1, 2))
    return imp.emit(ops.Where(imp.arg(node, 0), a, b), node).y


@translates("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    filled = imp.operand(imp.arg(node, 2), x.dtype)
    return imp.emit(ops.Where(imp.arg(node, 1), filled, x), node).y


def _reduce(cls: Callable[..., ops.Reduce]) -> Import:
    def translate(imp: Importer, node: fx.Node) -> Value:
        x, out = imp.arg(node, 0), _out(imp, node)
        given = imp.arg(node, 1, "dim")
        dims: Sequence[int] = given if isinstance(given, list) else [given]
        if given is None or given == []:
            dims = range(x.type.rank)
        x = imp.cast(x, out.dtype)
        keep = bool(imp.arg(node, 2, "keepdim", False))
        kept = tuple(sorted(_dim(x, dim) for dim in dims))
        return imp.emit(cls(x, dims=kept, keep=keep), node).result

    return translate


for _names, _cls in {
    ("aten.sum.default", "aten.sum.dim_IntList"): ops.Sum,
    ("aten.mean.default", "aten.mean.dim"): ops.Mean,
    ("aten.amax.default",): ops.Max,
    ("aten.any.default", "aten.any.dim", "aten.any.dims"): ops.Any,
}.items():
    translates(*_names)(_reduce(_cls))


@translates("aten.cumsum.default")
def _cumsum(imp: Importer, node: fx.Node) -> Value:
    x = imp.cast(imp.arg(node, 0), _out(imp, node).dtype)
    return imp.emit(ops.CumSum(x, dim=_dim(x, imp.arg(node, 1))), node).y


@translates("aten.softmax.int", "aten._softmax.default")
def _softmax(imp: Importer, node: fx.Node) -> Value:
    x = imp.cast(imp.arg(node, 0), _out(imp, node).dtype)
    return imp.emit(ops.Softmax(x, dim=_dim(x, imp.arg(node, 1))), node).y


@translates("aten.linear.default")
def _linear(imp: Importer, node: fx.Node) -> Value:
    x, weight, bias = imp.arg(node, 0), imp.arg(node, 1), imp.arg(node, 2, "bias")
    return imp.emit(ops.Linear(x, weight, bias), node).y


@translates("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def _matmul(imp: Importer, node: fx.Node) -> Value:
    return imp.emit(ops.MatMul(imp.arg(node, 0), imp.arg(node, 1)), node).y


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
    if node.kwargs.get("enable_gqa") or imp.arg(node, 4, "dropout_p", 0.0):
        raise ValueError("grouped heads and dropout are not supported here: use protocol.attend")
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

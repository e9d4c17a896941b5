"""What ATen operators become that rearrange, cut, join, pick, and replace parts of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from liquidc.frontend.aten_table import dim_of, out_type, translates
from liquidc.frontend.importer import Importer
from liquidc.ir import Dim, DType, TensorType, Value, ops


@translates("<built-in function getitem>")
def _getitem(imp: Importer, node: fx.Node) -> Any:
    picked = imp.arg(node, 0)[imp.arg(node, 1)]
    if picked is None and node.users:
        raise ValueError("this result of the operator before it is not supported")
    return picked


@translates(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
)
def _reshape(imp: Importer, node: fx.Node) -> Value:
    return imp.reshape(imp.arg(node, 0), out_type(imp, node).shape)


@translates("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), out_type(imp, node)
    return x if x.shape == out.shape else imp.emit(ops.Broadcast(x, shape=out.shape), node).y


@translates("aten.transpose.int")
def _transpose(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    a, b = (dim_of(x, imp.arg(node, i)) for i in (1, 2))
    perm = list(range(x.type.rank))
    perm[a], perm[b] = perm[b], perm[a]
    return imp.emit(ops.Transpose(x, perm=tuple(perm)), node).y


@translates("aten.t.default")
def _t(imp: Importer, node: fx.Node) -> Value:
    return imp.emit(ops.Transpose(imp.arg(node, 0), perm=(1, 0)), node).y


@translates("aten.permute.default")
def _permute(imp: Importer, node: fx.Node) -> Value:
    x = imp.arg(node, 0)
    perm = tuple(dim_of(x, dim) for dim in imp.arg(node, 1))
    return imp.emit(ops.Transpose(x, perm=perm), node).y


@translates("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(imp: Importer, node: fx.Node) -> Value:
    x, given = imp.arg(node, 0), imp.arg(node, 1)
    dims = range(x.type.rank) if given is None else given if isinstance(given, list) else [given]
    if any(isinstance(x.shape[dim], str) for dim in dims):
        raise ValueError("a dimension of unknown size is squeezed if it is 1: name the others")
    return imp.reshape(x, out_type(imp, node).shape)


def _slice_to(imp: Importer, node: fx.Node, x: Value, dim: int, start: int, stop: int) -> Value:
    size = x.shape[dim]
    if (start, stop) == (0, size):
        return x
    return imp.emit(ops.Slice(x, dim=dim, start=start, stop=stop), node).y


@translates("aten.slice.Tensor")
def _slice(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), out_type(imp, node)
    dim, start = dim_of(x, imp.arg(node, 1, "dim", 0)), imp.arg(node, 2, "start") or 0
    step = imp.arg(node, 4, "step", 1)
    if x.type == out:
        return x
    size, width = x.shape[dim], out.shape[dim]
    if isinstance(size, int) and isinstance(width, int) and isinstance(start, int) and step == 1:
        start = start + size if start < 0 else start
        return _slice_to(imp, node, x, dim, start, start + width)
    if isinstance(width, int):
        steps = tuple(step * i for i in range(width))
        type = TensorType(DType.I64, (width,))
        index = imp.emit(ops.Constant(value=steps, result_types=[type]), node).y
    elif step == 1:
        index = imp.emit(ops.Iota(dim=width), node).y
    else:
        raise ValueError(f"can't step over the dimension {size} of unknown size")
    if start != 0:
        index = imp.emit(ops.Add(index, _place(imp, node, start, size)), node).y
    return imp.emit(ops.Gather(x, index, dim=dim), node).y


def _place(imp: Importer, node: fx.Node, index: Any, size: Dim) -> Value:
    """An index i64[] of a dimension; a negative one counts from the end."""
    value = imp.operand(index, DType.I64)
    if not isinstance(index, int) or index >= 0:
        return value
    return imp.emit(ops.Add(imp.operand(size, DType.I64), value), node).y


@translates("aten.select.int")
def _select(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), out_type(imp, node)
    dim, index = dim_of(x, imp.arg(node, 1)), imp.arg(node, 2)
    size = x.shape[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return imp.emit(ops.Gather(x, _place(imp, node, index, size), dim=dim), node).y
    index = index % size
    return imp.reshape(_slice_to(imp, node, x, dim, index, index + 1), out.shape)


@translates("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
def _split(imp: Importer, node: fx.Node) -> list[Value]:
    x = imp.arg(node, 0)
    dim = dim_of(x, imp.arg(node, 2, "dim", 0))
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
    x, dim = imp.arg(node, 0), dim_of(imp.arg(node, 0), imp.arg(node, 1, "dim", 0))
    parts: list[Value] = []
    for i, fake in enumerate(node.meta["val"]):
        parts.append(imp.reshape(_slice_to(imp, node, x, dim, i, i + 1), imp.shape(fake.shape)))
    return parts


@translates("aten.cat.default")
def _cat(imp: Importer, node: fx.Node) -> Value:
    xs = imp.arg(node, 0)
    dtype = out_type(imp, node).dtype
    dim = dim_of(xs[0], imp.arg(node, 1, "dim", 0))
    return imp.emit(ops.Concat([imp.cast(x, dtype) for x in xs], dim=dim), node).y


@translates("aten.stack.default")
def _stack(imp: Importer, node: fx.Node) -> Value:
    xs, out = imp.arg(node, 0), out_type(imp, node)
    dim = imp.arg(node, 1, "dim", 0) % out.rank
    shape = (*xs[0].shape[:dim], 1, *xs[0].shape[dim:])
    parts = [imp.reshape(imp.cast(x, out.dtype), shape) for x in xs]
    return imp.emit(ops.Concat(parts, dim=dim), node).y


@translates("aten.index_select.default")
def _index_select(imp: Importer, node: fx.Node) -> Value:
    x, index = imp.arg(node, 0), imp.arg(node, 2)
    return imp.emit(ops.Gather(x, index, dim=dim_of(x, imp.arg(node, 1))), node).y


@translates("aten.index.Tensor")
def _index(imp: Importer, node: fx.Node) -> Value:
    x, given = imp.arg(node, 0), imp.arg(node, 1)
    ((dim, index),) = _only(given)
    if index.dtype == DType.BOOL:
        raise ValueError("the number of elements that a mask picks is not known: use torch.where")
    return imp.emit(ops.Gather(x, imp.cast(index, DType.I64), dim=dim), node).y


@translates("aten.index_put.default")
def _index_put(imp: Importer, node: fx.Node) -> Value:
    """One value where a mask holds."""
    x, value = imp.arg(node, 0), imp.arg(node, 2)
    ((dim, mask),) = _only(imp.arg(node, 1))
    single = all(size == 1 for size in value.shape) and not imp.arg(node, 3, "accumulate", False)
    if mask.dtype != DType.BOOL or dim != 0 or not single:
        raise ValueError("only one value where a mask holds can be assigned: use torch.where")
    rest = x.type.rank - mask.type.rank
    mask = imp.reshape(mask, (*mask.shape, *[1] * rest))
    value = imp.reshape(imp.cast(value, x.dtype), ())
    return imp.emit(ops.Where(mask, value, x), node).y


def _only(given: Sequence[Any]) -> list[tuple[int, Value]]:
    """The one index among `given` and its dimension."""
    found = [(dim, index) for dim, index in enumerate(given) if index is not None]
    if len(found) != 1:
        raise ValueError("only one tensor may be an index")
    return found


@translates("aten.slice_scatter.default")
def _slice_scatter(imp: Importer, node: fx.Node) -> Value:
    """X with a slice replaced."""
    x, y = imp.arg(node, 0), imp.cast(imp.arg(node, 1), out_type(imp, node).dtype)
    dim, start = dim_of(x, imp.arg(node, 2, "dim", 0)), imp.arg(node, 3, "start") or 0
    size, width = x.shape[dim], y.shape[dim]
    if imp.arg(node, 5, "step", 1) != 1:
        raise ValueError("only slices of step 1 can be assigned to")
    if size == width:
        return y
    if isinstance(size, int) and isinstance(width, int) and isinstance(start, int):
        start = start + size if start < 0 else start
        parts = [(x, 0, start), (y, 0, width), (x, start + width, size)]
        cut = [_slice_to(imp, node, v, dim, a, b) for v, a, b in parts if a < b]
        return imp.emit(ops.Concat(cut, dim=dim), node).y
    if width != 1:
        raise ValueError(f"can't assign to a slice of the dimension {size} of unknown size")
    return _replace(imp, node, x, y, dim, start)


@translates("aten.select_scatter.default")
def _select_scatter(imp: Importer, node: fx.Node) -> Value:
    """X with one entry of a dimension replaced."""
    x, y = imp.arg(node, 0), imp.cast(imp.arg(node, 1), out_type(imp, node).dtype)
    dim = dim_of(x, imp.arg(node, 2))
    y = imp.reshape(y, (*y.shape[:dim], 1, *y.shape[dim:]))
    return _replace(imp, node, x, y, dim, imp.arg(node, 3))


def _replace(imp: Importer, node: fx.Node, x: Value, y: Value, dim: int, index: Any) -> Value:
    """X with y [..., 1, ...] at `index` of a dimension."""
    size = x.shape[dim]
    places = imp.emit(ops.Iota(dim=size), node).y
    here = imp.emit(ops.Eq(places, _place(imp, node, index, size)), node).y
    here = imp.reshape(here, (size, *[1] * (x.type.rank - dim - 1)))
    return imp.emit(ops.Where(here, y, x), node).y


@translates("aten.copy.default", "aten.fill.Tensor", "aten.fill.Scalar")
def _overwrite(imp: Importer, node: fx.Node) -> Value:
    """A value in the place of all elements."""
    out = out_type(imp, node)
    value = imp.operand(imp.arg(node, 1), out.dtype)
    same = value.shape == out.shape
    return value if same else imp.emit(ops.Broadcast(value, shape=out.shape), node).y


@translates("aten.triu.default", "aten.tril.default")
def _triangle(imp: Importer, node: fx.Node) -> Value:
    """Elements at and above the diagonal ("triu"), or at and below it; the others are 0."""
    x, diagonal = imp.arg(node, 0), imp.arg(node, 1, "diagonal", 0)
    row, column = (imp.emit(ops.Iota(dim=dim), node).y for dim in x.shape[-2:])
    if diagonal != 0:
        row = imp.emit(ops.Add(row, imp.operand(diagonal, DType.I64)), node).y
    row = imp.reshape(row, (*row.shape, 1))
    compare = ops.Ge if "triu" in str(node.target) else ops.Le
    kept = imp.emit(compare(column, row), node).y
    if x.dtype == DType.BOOL:
        return imp.emit(ops.And(x, kept), node).y
    return imp.emit(ops.Where(kept, x, imp.scalar(0, x.dtype)), node).y


@translates("aten.repeat.default")
def _repeat(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), out_type(imp, node)
    repeats = imp.arg(node, 1)
    shape = (*[1] * (len(repeats) - x.type.rank), *x.shape)
    return _tile(imp, node, x, list(zip(repeats, shape, strict=True)), out)


@translates("aten.repeat_interleave.self_int")
def _repeat_interleave(imp: Importer, node: fx.Node) -> Value:
    x, repeats, dim = imp.arg(node, 0), imp.arg(node, 1), imp.arg(node, 2, "dim")
    if dim is None:
        raise ValueError("a dimension must be given")
    dim = dim_of(x, dim)
    pairs = [(1, size) for size in x.shape]
    pairs[dim : dim + 1] = [(1, x.shape[dim]), (repeats, 1)]
    return _tile(imp, node, x, pairs, out_type(imp, node))


def _tile(
    imp: Importer, node: fx.Node, x: Value, pairs: Sequence[tuple[Dim, Dim]], out: TensorType
) -> Value:
    """X with each dimension in front of its repeats."""
    apart = imp.reshape(x, tuple(part for _, size in pairs for part in (1, size)))
    shape = tuple(part for pair in pairs for part in pair)
    wide = imp.emit(ops.Broadcast(apart, shape=shape), node).y
    return imp.reshape(wide, out.shape)


@translates("aten.one_hot.default")
def _one_hot(imp: Importer, node: fx.Node) -> Value:
    x, out = imp.arg(node, 0), out_type(imp, node)
    classes = imp.emit(ops.Iota(dim=out.shape[-1]), node).y
    chosen = imp.emit(ops.Eq(imp.reshape(x, (*x.shape, 1)), classes), node).y
    return imp.cast(chosen, out.dtype)

"""Elementwise maths, shapes and reductions as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from liquidc.backends.onnxruntime.graph import CONTRIB, ELEMENT, Graph
from liquidc.ir import Op, ops
from liquidc.ir.weights import sizes

Emit = Callable[[Graph, Any], list[str]]
"""Adds the nodes of one op; the names of its results."""


def _same(kind: str) -> Emit:
    """An op that is one node with the same operands."""
    return lambda g, op: [g.op(kind, [g.name(v) for v in op.operands])]


def _by_row(kind: str, domain: str = "", **attributes: Any) -> Emit:
    """An elementwise op that is one node, on rows where it stands between products."""

    def emit(g: Graph, op: Op) -> list[str]:
        (y,) = op.results
        names = [g.name(value) for value in op.operands]
        alike = all(value.shape == y.shape for value in op.operands)
        known = [g.remember(("flat", name)) for name in names]
        if not alike or y.type.rank != 3 or not any(known):
            return [g.op(kind, names, domain=domain, **attributes)]
        rows = [g.flat(name, y.shape) for name in names]
        return [g.unflat(g.op(kind, rows, domain=domain, **attributes), y.shape)]

    return emit


def _constant(g: Graph, op: ops.Constant) -> list[str]:
    array = np.array(op.value, op.y.dtype.numpy).reshape(sizes(op.y.shape))
    return [g.const(array, np.dtype(op.y.dtype.numpy))]


def _size(g: Graph, op: ops.Size) -> list[str]:
    return [g.op("Squeeze", [g.size(op.dim), g.const([0])])]


def _iota(g: Graph, op: ops.Iota) -> list[str]:
    end = g.op("Squeeze", [g.size(op.dim), g.const([0])])
    return [g.op("Range", [g.const(0), end, g.const(1)])]


def _cast(g: Graph, op: ops.Cast) -> list[str]:
    shape = op.x.shape
    if lead := g.lead(g.name(op.x), shape, make=False):
        return [g.viewed(g.op("Cast", [lead], to=ELEMENT[op.to]), (1, *shape), shape)]
    return [g.op("Cast", [g.name(op.x)], to=ELEMENT[op.to])]


def _add(g: Graph, op: ops.Add) -> list[str]:
    names, shape = [g.name(v) for v in op.operands], op.y.shape
    leads = [g.lead(name, shape, make=False) for name in names]
    if all(leads) and op.a.shape == op.b.shape:
        return [g.viewed(g.op("Add", leads), (1, *shape), shape)]
    return _by_row("Add")(g, op)


def _gelu(g: Graph, op: ops.GELU) -> list[str]:
    return [g.op("Gelu", [g.name(op.x)], approximate=op.approximate)]


def _rsqrt(g: Graph, op: ops.Rsqrt) -> list[str]:
    return [g.op("Reciprocal", [g.op("Sqrt", [g.name(op.x)])])]


def _not_equal(g: Graph, op: ops.Ne) -> list[str]:
    return [g.op("Not", [g.op("Equal", [g.name(op.a), g.name(op.b)])])]


def _reshape(g: Graph, op: ops.Reshape) -> list[str]:
    if op.shape == (1, *op.x.shape):
        return [g.lead(g.name(op.x), op.x.shape)]
    return [g.reshape(g.name(op.x), op.x.shape, op.shape)]


def _broadcast(g: Graph, op: ops.Broadcast) -> list[str]:
    return [g.op("Expand", [g.name(op.x), g.shape(op.shape)])]


def _transpose(g: Graph, op: ops.Transpose) -> list[str]:
    return [g.op("Transpose", [g.name(op.x)], perm=list(op.perm))]


def _slice(g: Graph, op: ops.Slice) -> list[str]:
    count = op.x.shape[op.dim]
    if op.x.op is None and op.stop - op.start == 1 and isinstance(count, int) and count > 1:
        parts = g.remember(("parts", op.x, op.dim))  # an argument's are all asked for
        if parts is None:
            parts = g.op("Split", [g.name(op.x)], count, axis=op.dim, num_outputs=count)
            g.memo["parts", op.x, op.dim] = parts
        return [parts[op.start]]
    cuts = _tiles(op)
    if len(cuts) > 1:
        parts = g.remember(("tiles", op.x, op.dim))
        if parts is None:
            parts = g.memo["tiles", op.x, op.dim] = _split(g, op, cuts)
        return [parts[cuts.index((op.start, op.stop))]]
    bounds = [g.const([v]) for v in (op.start, op.stop, op.dim)]
    return [g.op("Slice", [g.name(op.x), *bounds])]


def _split(g: Graph, op: ops.Slice, cuts: list[tuple[int, int]]) -> list[str]:
    """A value in parts, as rows where it is a product's."""
    x, shape = g.name(op.x), op.x.shape
    widths = g.const([stop - start for start, stop in cuts])
    rows = g.remember(("flat", x)) if op.dim == 2 and op.x.type.rank == 3 else None
    if rows is None:
        return g.op("Split", [x, widths], len(cuts), axis=op.dim)
    parts = g.op("Split", [rows, widths], len(cuts), axis=1)
    shapes = ((*shape[:2], stop - start) for start, stop in cuts)
    return [g.unflat(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _tiles(op: ops.Slice) -> list[tuple[int, int]]:
    """All slices of the same value in order, if they follow one another from end to end."""
    cuts: set[tuple[int, int]] = set()
    for user in op.x.uses:
        if not isinstance(user, ops.Slice) or user.dim != op.dim:
            return []
        cuts.add((user.start, user.stop))
    ordered = sorted(cuts)
    ends = [0, *(stop for _, stop in ordered)]
    joined = [start for start, _ in ordered] == ends[:-1] and ends[-1] == op.x.shape[op.dim]
    return ordered if joined else []


def _concat(g: Graph, op: ops.Concat) -> list[str]:
    return [g.op("Concat", [g.name(x) for x in op.xs], axis=op.dim)]


def _gather(g: Graph, op: ops.Gather) -> list[str]:
    return [g.op("Gather", [g.name(op.x), g.name(op.index)], axis=op.dim)]


def _reduce(kind: str) -> Emit:
    def emit(g: Graph, op: ops.Reduce) -> list[str]:
        x, axes = g.name(op.x), g.const(list(op.dims))
        if not op.keep and len(op.dims) == op.x.type.rank:  # over all, whatever their shape
            x = g.lead(x, op.x.shape, make=False) or x
            return [g.op(kind, [x], keepdims=0)]
        return [g.op(kind, [x, axes], keepdims=int(op.keep), noop_with_empty_axes=1)]

    return emit


def _cumsum(g: Graph, op: ops.CumSum) -> list[str]:
    return [g.op("CumSum", [g.name(op.x), g.const(op.dim)])]


EMIT: dict[type[Op], Emit] = {
    ops.Constant: _constant,
    ops.Size: _size,
    ops.Iota: _iota,
    ops.Cast: _cast,
    ops.SiLU: _by_row("QuickGelu", CONTRIB, alpha=1.0),  # x · sigmoid(x)
    ops.GELU: _gelu,
    ops.Rsqrt: _rsqrt,
    ops.Ne: _not_equal,
    ops.Reshape: _reshape,
    ops.AssumeSizes: lambda g, op: [g.name(op.x)],
    ops.Broadcast: _broadcast,
    ops.Transpose: _transpose,
    ops.Slice: _slice,
    ops.Concat: _concat,
    ops.Gather: _gather,
    ops.Sum: _reduce("ReduceSum"),
    ops.Mean: _reduce("ReduceMean"),
    ops.Max: _reduce("ReduceMax"),
    ops.Any: _reduce("ReduceMax"),
    ops.CumSum: _cumsum,
    ops.Neg: _same("Neg"),
    ops.Exp: _same("Exp"),
    ops.Log: _same("Log"),
    ops.Floor: _same("Floor"),
    ops.Sqrt: _same("Sqrt"),
    ops.Sin: _same("Sin"),
    ops.Cos: _same("Cos"),
    ops.Tanh: _by_row("Tanh"),
    ops.Sigmoid: _same("Sigmoid"),
    ops.ReLU: _by_row("Relu"),
    ops.Not: _same("Not"),
    ops.Add: _add,
    ops.Sub: _same("Sub"),
    ops.Mul: _by_row("Mul"),
    ops.Div: _same("Div"),
    ops.Maximum: _same("Max"),
    ops.Minimum: _same("Min"),
    ops.Eq: _same("Equal"),
    ops.Lt: _same("Less"),
    ops.Le: _same("LessOrEqual"),
    ops.Gt: _same("Greater"),
    ops.Ge: _same("GreaterOrEqual"),
    ops.And: _same("And"),
    ops.Or: _same("Or"),
    ops.Where: _same("Where"),
}
"""Lowerings by op class."""

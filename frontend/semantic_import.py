"""What the operators `liquid::*` and `torch.cond` become in the IR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from liquidc.errors import UnsupportedError
from liquidc.frontend.exporting import Traced, export, traced
from liquidc.frontend.functional import user_inputs
from liquidc.frontend.importer import Import, Importer
from liquidc.frontend.semantic_ops import EXPERTS
from liquidc.ir import Block, Op, TensorType, Value, ops
from liquidc.ir.regions import gates_asked
from liquidc.ir.weights import Select, sizes, torch_dtype


def _whole(cls: type[Op], operands: Sequence[str], attributes: Sequence[str]) -> Import:
    """An operator that is one op: its arguments are the operands, then the attributes."""

    def translate(imp: Importer, node: fx.Node) -> Any:
        given = dict(zip((*operands, *attributes), imp.resolve(node.args), strict=True))
        op = imp.emit(cls(**given), node)
        return op.results[0] if len(op.results) == 1 else list(op.results)

    return translate


def _depth_gate(imp: Importer, node: fx.Node) -> list[Value]:
    """A gate, with what only the whole model knows: layer, number, layers that remain."""
    part = imp.part
    *operands, threshold, compare, reserved, _ = imp.resolve(node.args)
    gate = ops.DepthGate(
        *operands,
        layer=part.layer,
        gate=part.gate + part.gates_seen,
        remaining=part.remaining,
        threshold=threshold,
        compare=compare,
        reserved=reserved,
    )
    part.gates_seen += 1
    imp.emit(gate, node)
    gate.mask.name, gate.p.name = f"gate{gate.gate}", f"p{gate.gate}"
    return [gate.mask, gate.p]


def _cond(imp: Importer, node: fx.Node) -> list[Value]:
    """`torch.cond` as `if`: the region of the last gate that it asks, if it asks any."""
    pred, run, skip, operands = imp.resolve(node.args)
    label = imp.part.next_label()
    gates, _ = gates_asked(pred)
    identity: dict[str, Any] = {}
    if gates:
        gate = gates[-1]
        region = imp.part.regions[gate.gate]
        imp.part.regions[gate.gate] += 1
        identity = {"role": "gate", "gate": gate.gate, "region": region, "layer": gate.layer}
    then, otherwise = (imp.arm(graph, operands, label) for graph in (run, skip))
    cond = imp.reshape(pred, ())
    op = ops.If(cond, label=label, **identity, then=then, otherwise=otherwise)
    return list(imp.emit(op, node).results)


def _dispatch(imp: Importer, node: fx.Node) -> Value:
    """Experts as a chain of conditional regions, one for each expert.

    %sum1 = if any(%used) { yield %sum0 + where(%used, %share * expert(%x), 0) } else { %sum0 }

    The region of an identity expert has %x in the place of expert(%x).
    """
    x, index, weight, params, site, apply, identity = imp.resolve(node.args)
    name, _, width = site.rpartition(":")
    experts = _by_expert(imp, params, int(width))
    tokens = _on_meta(x.type, [5 + i for i in range(x.type.rank)])
    body = _body(name, tokens, tuple(value.type for value in experts[0][1]))
    total = imp.fill(0.0, x.type)
    selections = [selected for selected, _ in experts]
    for expert, selected in enumerate([*selections, *[None] * identity]):
        used = imp.emit(ops.ExpertMask(index, expert=expert), node).y
        any_used = imp.emit(ops.Any(used, dims=tuple(range(used.type.rank))), node).result
        label = f"{imp.part.label}/expert{expert}"
        inner = imp.inner(label)
        share = inner.emit(ops.ExpertWeight(index, weight, expert=expert), node).y
        share = inner.cast(inner.reshape(share, (*share.shape, 1)), x.dtype)
        inputs = inner.emit(ops.Mul(x, share), node).y if apply == "input" else x
        y = inputs
        if selected is not None:
            weights = [v if isinstance(v, Value) else inner.weight(v) for v in selected]
            y = _inline(inner, body, [inputs, *weights])
        y = y if apply == "input" else inner.emit(ops.Mul(y, share), node).y
        seen = inner.reshape(used, (*used.shape, 1))
        kept = inner.emit(ops.Where(seen, y, inner.scalar(0.0, x.dtype)), node).y
        inner.block.append(ops.Yield([inner.emit(ops.Add(total, kept), node).y]))
        other = Block()
        other.append(ops.Yield([total]))
        op = ops.If(
            any_used,
            label=label,
            role="expert",
            layer=imp.part.layer,
            expert=expert,
            then=inner.block,
            otherwise=other,
        )
        total = imp.emit(op, node).results[0]
    return total


def _by_expert(
    imp: Importer, params: Sequence[Value], width: int
) -> list[tuple[list[Value | str], list[Value]]]:
    """For each expert its weights, as values or names of weights; and values of the same types."""
    if width:
        rows = [list(params[i : i + width]) for i in range(0, len(params), width)]
        return [(list[Value | str](row), row) for row in rows]
    experts: list[tuple[list[Value | str], list[Value]]] = []
    (count,) = {param.shape[0] for param in params}
    for expert in range(sizes([count])[0]):
        names: list[Value | str] = []
        for param in params:
            if not isinstance(param.op, ops.Weight):
                raise UnsupportedError("the stacked tensors of experts must be parameters")
            name = f"{param.op.weight}.{expert}"
            imp.module.weights[name] = Select(imp.module.weights[param.op.weight], expert)
            names.append(name)
        types = [param.type.with_shape(*param.shape[1:]) for param in params]
        experts.append((names, [Value(t) for t in types]))
    return experts


class _Body(Traced):
    """An expert's function as a module that can be exported."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = EXPERTS[name].function

    def call(self, *args: Any) -> torch.Tensor:
        return traced(self.function)(*args)


@cache
def _body(
    name: str, tokens: tuple[tuple[int, ...], torch.dtype], params: tuple[TensorType, ...]
) -> torch.export.ExportedProgram:
    """The traced body of an expert on tokens [..., D]; all experts of one shape share it."""
    shape, dtype = tokens
    dynamic = {i: torch.export.Dim(f"tokens{i}") for i in range(len(shape) - 1)}
    args = (
        torch.empty(shape, dtype=dtype),
        *(torch.empty(sizes(t.shape), dtype=torch_dtype(t.dtype)) for t in params),
    )
    return export(_Body(name), (args,), ((dynamic, *(None for _ in params)),))


def _on_meta(type: TensorType, examples: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
    """Example sizes for the tokens' dimensions, and the dtype."""
    width = sizes(type.shape[-1:])
    return (*examples[:-1], *width), torch_dtype(type.dtype)


def _inline(imp: Importer, body: torch.export.ExportedProgram, inputs: Sequence[Value]) -> Value:
    """The body's ops at the end of the block."""
    tokens = user_inputs(body)[0].meta["val"]
    for symbol, dim in zip(tokens.shape[:-1], inputs[0].shape[:-1], strict=True):
        imp.dims = {**imp.dims, str(symbol): dim}
    (y,) = imp.run_program(body, inputs)
    return y


SEMANTIC: dict[str, Import] = {
    "cond": _cond,
    "liquid.rope.default": _whole(ops.Rope, ["x", "positions"], ["theta", "scaling"]),
    "liquid.append.default": _whole(ops.Append, ["cache", "new", "length", "mask"], []),
    "liquid.attend.default": _whole(
        ops.Attend, ["q", "key", "value", "limit", "sink"], ["scale", "window", "chunk"]
    ),
    "liquid.depth_gate.default": _depth_gate,
    "liquid.route.default": _whole(
        ops.Route,
        ["logits", "mask", "selection_bias"],
        [
            "k",
            "score",
            "post",
            "renorm_eps",
            "n_group",
            "topk_group",
            "group_score",
            "group_fill",
            "scaling",
        ],
    ),
    "liquid.dispatch.default": _dispatch,
}
"""Translations by the operator's name."""

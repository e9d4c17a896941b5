"""The pass `fuse-shared-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, DType, Module, Op, TensorType, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare


@dataclass(frozen=True)
class FuseSharedExperts(Pass):
    """A shared expert beside the routed ones becomes further experts, which every token uses.

    Before::

        %y = grouped_experts %x, %i, %s, %gate_up, %down        (four experts of width 6)
        %h = mul silu(linear(%x, %wg)), linear(%x, %wu)         (f32[B, T, 12])
        %z = add %y, mul(%share, linear(%h, %wd))               (%share is f32[B, T, 1])

    After::

        %j = concat %i, [4, 5]
        %t = concat %s, [%share, %share]
        %z = grouped_experts %x, %j, %t, %gate_up.and.shared, %down.and.shared

    A shared expert that is n times as wide as the others becomes n of them; without a share its
    weight is 1. The tokens that the router is not shown keep its result, as they had it before:
    where it does not count, the layer's mask discards it or `compact-tokens` leaves it out. What
    the router says it chose stays the same. Run it before `fuse-linear`, which would put the
    shared expert's projections together with others of the same tokens.
    """

    name: ClassVar[str] = "fuse-shared-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Fuse in every block."""
        for function in module.functions.values():
            self._block(module, function.body, statistics)

    def _block(self, module: Module, block: Block, statistics: Statistics) -> None:
        for op in list(block.ops):
            for inner in op.regions.values():
                self._block(module, inner, statistics)
            if isinstance(op, ops.Add):
                try:
                    _fuse(module, block, op)
                    statistics.fired[self.name] += 1
                except Refusal as refusal:
                    statistics.refuse(self.name, op, refusal)


@dataclass(frozen=True)
class _Shared:
    """A shared expert, taken apart: gate and up [S, D], down [D, S], and the ops it is made of."""

    gate: lazy.WeightExpr
    up: lazy.WeightExpr
    down: lazy.WeightExpr
    share: Value | None
    made_of: tuple[Op, ...]


def _fuse(module: Module, block: Block, add: ops.Add) -> None:
    rw = Rewriter(block, [])
    sides = ((add.a, add.b), (add.b, add.a))
    found = [(a.op, b) for a, b in sides if isinstance(a.op, ops.GroupedExperts)]
    rw.check(bool(found), "no experts are added to")
    experts, other = found[0]
    shared = _take_apart(module, other, experts.x, rw)
    gone = (add, experts, *shared.made_of)
    users = {id(user) for op in gone[1:] for value in op.results for user in value.uses}
    rw.check(
        users <= set(map(id, gone)),
        "a part of the shared expert, or the sum without it, is used too",
    )
    unscaled = shared.share is None or experts.apply == "output"
    rw.check(unscaled, "its share would multiply its input, as the experts' weights do")
    route = rw.need(experts.index.op, ops.Route, "the experts' numbers are no router's")
    gate_up = rw.need(experts.gate_up.op, ops.Weight, "the experts' weights are computed").weight
    down = rw.need(experts.down.op, ops.Weight, "the experts' weights are computed").weight
    count, _, width = lazy.sizes(experts.down.shape)
    rw.check(route.logits.shape[-1] == count, "the router knows more experts than there are")
    wide = shared.gate.sizes[0]
    rw.check(wide % width == 0, f"its width {wide} is no multiple of the experts' {width}")
    more = wide // width
    fused = rw.emit(
        experts.clone(
            reinfer=True,
            index=_with_numbers(experts.index, count, more, rw),
            weight=_with_shares(experts.weight, shared.share, more, rw),
            gate_up=_joined(module, rw, gate_up, _pieces(shared.gate, shared.up, width)),
            down=_joined(module, rw, down, [_part(shared.down, 1, i, width) for i in range(more)]),
        )
    )
    fused.y.name = add.y.name
    add.y.replace_by(fused.y)
    place = block.ops.index(add)
    block.ops[place:place] = rw.emitted
    for op in gone:
        op.detach()


def _take_apart(module: Module, value: Value, x: Value, rw: Rewriter) -> _Shared:
    """[share ·] down(silu(gate x) · up x)."""
    made_of: list[Op] = []
    share: Value | None = None
    if isinstance(value.op, ops.Mul):
        scaled = value.op
        each = [v for v in scaled.operands if v.shape == (*x.shape[:-1], 1)]
        share = rw.need(each[0] if each else None, Value, "its share is no number for each token")
        value = scaled.b if share is scaled.a else scaled.a
        made_of.append(scaled)
    down = rw.need(value.op, ops.Linear, "what is added ends in no linear")
    rw.check(down.bias is None and value.type == x.type, "it has a bias or another width")
    product = rw.need(down.x.op, ops.Mul, "no product of gate and up")
    sides = ((product.a, product.b), (product.b, product.a))
    gated = [(a.op, b) for a, b in sides if isinstance(a.op, ops.SiLU)]
    rw.check(bool(gated), "the gate's activation is not silu")
    silu, up = gated[0]
    rw.check(silu.x.type == up.type, "gate and up differ in width")
    made_of += [down, product, silu]
    rows = [_rows(module, v, x, made_of, rw) for v in (silu.x, up)]
    name = rw.need(down.weight.op, ops.Weight, "its weights are computed").weight
    return _Shared(rows[0], rows[1], module.weights[name], share, tuple(dict.fromkeys(made_of)))


def _rows(
    module: Module, value: Value, x: Value, made_of: list[Op], rw: Rewriter
) -> lazy.WeightExpr:
    """The weight of a projection of x, which may be a slice of a wider one."""
    cut = value.op
    whole = cut.x if isinstance(cut, ops.Slice) else value
    linear = rw.need(whole.op, ops.Linear, "gate or up is no linear")
    rw.check(linear.x is x and linear.bias is None, "it reads other tokens or has a bias")
    weight = module.weights[
        rw.need(linear.weight.op, ops.Weight, "its weights are computed").weight
    ]
    if isinstance(cut, ops.Slice):
        rw.check(cut.dim == x.type.rank - 1, "gate or up is a slice of the tokens")
        made_of.append(cut)
        weight = lazy.Slice(weight, 0, cut.start, cut.stop)
    made_of.append(linear)
    return weight


def _pieces(gate: lazy.WeightExpr, up: lazy.WeightExpr, width: int) -> list[lazy.WeightExpr]:
    """Gate rows, then up rows, of each expert that a shared one is cut into."""
    return [
        lazy.Concat((_part(gate, 0, i, width), _part(up, 0, i, width)), 0)
        for i in range(gate.sizes[0] // width)
    ]


def _part(x: lazy.WeightExpr, dim: int, number: int, width: int) -> lazy.WeightExpr:
    """Piece `number` of a dimension that is cut into pieces of `width`."""
    if x.sizes[dim] == width:
        return x
    return lazy.Slice(x, dim, number * width, (number + 1) * width)


def _joined(module: Module, rw: Rewriter, name: str, more: Sequence[lazy.WeightExpr]) -> Value:
    """The experts' weights with more of them behind."""
    expr = lazy.Concat((module.weights[name], lazy.Stack(tuple(more))), 0)
    return declare(module, rw, f"{name}.and.shared", expr)


def _with_numbers(index: Value, first: int, more: int, rw: Rewriter) -> Value:
    """The experts of each token, and `more` that all tokens use."""
    numbers = tuple(range(first, first + more))
    type = TensorType(DType.I64, (more,))
    constant = rw.emit(ops.Constant(value=numbers, result_types=[type])).y
    return _behind(index, constant, more, rw)


def _with_shares(weight: Value, share: Value | None, more: int, rw: Rewriter) -> Value:
    """The weights of each token's experts, and that of `more` further ones."""
    if share is None:
        type = TensorType(DType.F32)
        share = rw.emit(ops.Constant(value=(1.0,), result_types=[type])).y
    elif share.dtype != DType.F32:
        share = rw.emit(ops.Cast(share, to=DType.F32)).y
    return _behind(weight, share, more, rw)


def _behind(x: Value, repeated: Value, more: int, rw: Rewriter) -> Value:
    """The slots of x [..., k], and `more` that repeat the same for all tokens: [..., k + more]."""
    shape = (*x.shape[:-1], more)
    slots = rw.emit(ops.Broadcast(repeated, shape=shape)).y
    return rw.emit(ops.Concat([x, slots], dim=x.type.rank - 1)).y

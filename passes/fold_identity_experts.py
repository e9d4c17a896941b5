"""The pass `fold-identity-experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, DType, Module, TensorType, Value, ops
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.expert_regions import is_region, next_region, region_of


@dataclass(frozen=True)
class FoldIdentityExperts(Pass):
    """The regions of identity experts become one product of the tokens and their shares.

    Before::

        %y3 = if any(%m3) { ... yield %y2 + where(%m3, %x · %s3, 0) } ...
        %y4 = if any(%m4) { ... yield %y3 + where(%m4, %x · %s4, 0) } ...

    After::

        %own = and (%index >= 3), (%index <= 4)
        %share = sum where(%own, %weight, 0), dims=[-1]
        %y4 = %y2 + %x · %share

    An identity expert (LongCat-Flash) gives back its input: it has no weights and costs a token
    nothing but this. Regions in a row with numbers in a row are folded together. The experts
    before them are left for `stack-experts`; to a grouped op, the numbers of the folded ones are
    of no expert.
    """

    name: ClassVar[str] = "fold-identity-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Fold in every block."""
        for function in module.functions.values():
            self._block(function.body, statistics)

    def _block(self, block: Block, statistics: Statistics) -> None:
        for op in list(block.ops):
            for inner in op.regions.values():
                self._block(inner, statistics)
            if isinstance(op, ops.If) and op.parent is block and is_region(op):
                try:
                    _fold(block, op)
                    statistics.fired[self.name] += 1
                except Refusal as refusal:
                    statistics.refuse(self.name, op, refusal)


@dataclass(frozen=True)
class _Identity:
    """An identity expert's region, taken apart."""

    op: ops.If
    total: Value
    x: Value
    index: Value
    weight: Value
    expert: int

    def precedes(self, other: _Identity) -> bool:
        """Whether the other one is of the next expert of the same tokens."""
        same = self.x is other.x and self.index is other.index and self.weight is other.weight
        return same and other.expert == self.expert + 1


def _take_apart(op: ops.If, rw: Rewriter) -> _Identity:
    """The parts of `total + where(used, x · share, 0)`."""
    region = region_of(op, rw)
    product = rw.need(region.added.op, ops.Mul, "no weight of the expert is applied")
    share = rw.need(region.share(product.b), ops.ExpertWeight, "the last product is no weight's")
    computed = product.a.op is not None and product.a.op.parent is op.then
    rw.check(not computed, "the expert computes something")
    return _Identity(op, region.total, product.a, share.index, share.weight, share.expert)


def _fold(block: Block, first: ops.If) -> None:
    rw = Rewriter(block, [])
    run = [_take_apart(first, rw)]
    while (following := next_region(run[-1].op)) is not None:
        try:
            region = _take_apart(following, rw)
        except Refusal:
            break
        if not run[-1].precedes(region):
            break
        run.append(region)
    head, last = run[0], run[-1]
    share = _share(head, last.expert, rw)
    y = rw.emit(ops.Add(head.total, rw.emit(ops.Mul(head.x, share)).y)).y
    y.name = last.op.results[0].name
    last.op.results[0].replace_by(y)
    place = block.ops.index(last.op)
    block.ops[place:place] = rw.emitted
    for region in reversed(run):
        block.ops.remove(region.op)
        region.op.forget()


def _share(head: _Identity, last: int, rw: Rewriter) -> Value:
    """The sum of each token's weights of the experts from the head to `last`: [..., 1]."""
    index, weight, type = head.index, head.weight, head.x.dtype
    above = rw.emit(ops.Ge(index, _scalar(head.expert, DType.I64, rw))).y
    below = rw.emit(ops.Le(index, _scalar(last, DType.I64, rw))).y
    own = rw.emit(ops.And(above, below)).y
    kept = rw.emit(ops.Where(own, weight, _scalar(0.0, weight.dtype, rw))).y
    share = rw.emit(ops.Sum(kept, dims=(index.type.rank - 1,), keep=True)).y
    return share if share.dtype == type else rw.emit(ops.Cast(share, to=type)).y


def _scalar(number: float, type: DType, rw: Rewriter) -> Value:
    return rw.emit(ops.Constant(value=(number,), result_types=[TensorType(type)])).y

"""The pass `fuse-linear`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import declare, joined
from liquidc.passes.routers import router_linears


@dataclass(frozen=True)
class FuseLinear(Pass):
    """Several `linear` of one operand in one block become one, whose result is sliced.

    Before::

        %q = linear %x, %wq : f32[B, T, 32]
        %k = linear %x, %wk : f32[B, T, 16]

    After::

        %qk = linear %x, %w : f32[B, T, 48]          (w = concat([wq, wk], 0))
        %q = slice %qk, dim=2, start=0, stop=32
        %k = slice %qk, dim=2, start=32, stop=48

    Routers stay apart: a fused matrix product may add up in another order, and decisions must not
    move.
    """

    name: ClassVar[str] = "fuse-linear"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Fuse in every block."""
        routed = router_linears(module)
        for function in module.functions.values():
            self._block(module, function.body, routed, statistics)

    def _block(self, module: Module, block: Block, routed: set[Op], statistics: Statistics) -> None:
        groups: defaultdict[Value, list[ops.Linear]] = defaultdict(list)
        for op in block.ops:
            for inner in op.regions.values():
                self._block(module, inner, routed, statistics)
            if isinstance(op, ops.Linear) and op not in routed:
                groups[op.x].append(op)
        for group in groups.values():
            if len(group) > 1:
                try:
                    self._fuse(module, block, group)
                    statistics.fired[self.name] += 1
                except Refusal as refusal:
                    statistics.refuse(self.name, group[0], refusal)

    def _fuse(self, module: Module, block: Block, group: Sequence[ops.Linear]) -> None:
        emitted: list[Op] = []
        rw = Rewriter(block, emitted)
        used = [rw.need(op.weight.op, ops.Weight, "a factor is no weight") for op in group]
        biases = [op.bias for op in group if op.bias is not None]
        rw.check(len(biases) in (0, len(group)), "some have a bias and some have none")
        known = [rw.need(bias.op, ops.Weight, "a bias is no weight") for bias in biases]
        weight = _together(module, rw, used)
        bias = _together(module, rw, known) if known else None
        fused = rw.emit(ops.Linear(group[0].x, weight, bias, loc=group[0].loc))
        start, last = 0, fused.y.type.rank - 1
        for op in group:
            width = lazy.sizes(op.y.shape[-1:])[0]
            part = rw.emit(ops.Slice(fused.y, dim=last, start=start, stop=start + width))
            part.y.name = op.y.name
            op.y.replace_by(part.y)
            start += width
        place = block.ops.index(group[0])
        for op in group:
            block.ops.remove(op)
            op.forget()
        block.ops[place:place] = emitted


def _together(module: Module, rw: Rewriter, used: Sequence[ops.Weight]) -> Value:
    names = [op.weight for op in used]
    expr = lazy.Concat(tuple(module.weights[name] for name in names), 0)
    return declare(module, rw, joined(names), expr)

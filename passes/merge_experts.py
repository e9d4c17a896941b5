"""The pass `merge-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from liquidc.ir import Module, ops
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.ir.weight_maths import Mix, Take
from liquidc.ir.weights import Concat, Slice, WeightExpr, WeightSource, materialize
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.fold_constants import declare
from liquidc.passes.routed_experts import (
    RATIO,
    Routed,
    change_layers,
    check_options,
    share_left,
    starved,
    weight_name,
)
from liquidc.profile import ExpertProfile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class MergeExperts(Pass):
    """Experts that are used less are merged into those that the router takes for most alike.

    Before::

        %i, %s = route %l, %m, k=2
        %y = grouped_experts %x, %i, %s, %gate_up, %down              (4 experts)

    After::

        %i, %s = route %l, %m, k=2
        %j = renumber %i, table=[0, 1, 0, 1]
        %y = grouped_experts %x, %j, %s, %gate_up.merged, %down.merged    (2 experts)

    This is M-SMoE (arXiv 2310.01334). The experts with most tokens are dominant: all but `ratio`,
    or `keep` a layer. Each other one joins the dominant one whose row of the router's weight has
    the most similar direction. Its neurons are put into the order in which they resemble the
    dominant one's most ([gate row, up row, down column], by the Hungarian method), and a group's
    weights become their mean, weighted by tokens. The router stays: its numbers are aliases of
    the merged experts, and it is its numbers that the engine reports. Experts with fewer than
    `least` tokens are listed.
    """

    name: ClassVar[str] = "merge-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"
    needs: ClassVar[Need] = "experts"
    keep: int = 0
    ratio: float = RATIO
    least: int = 32

    def __post_init__(self) -> None:
        check_options(self.keep, self.ratio)

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Merge in every layer whose experts are found; the others keep theirs, with the reason."""
        profile, source = context.need_profile(self.name), context.need_source(self.name)

        def merge(experts: ExpertProfile, found: list[Routed], rw: Rewriter) -> dict[str, Any]:
            count = self.keep or share_left(len(experts.load), self.ratio)
            rw.check(count < len(experts.load), "it has no experts to spare")
            grouped = all(isinstance(one.holder, ops.GroupedExperts) for one in found)
            rw.check(grouped, "its experts are not grouped: run group-experts before")
            add_up = all(
                one.holder.apply == "output" or one.holder.index.shape[-1] == 1 for one in found
            )
            rw.check(add_up, "its shares multiply what experts read: they don't add up")
            named = {(one.router, *map(weight_name, one.params)) for one in found}
            rw.check(len(named) == 1, "its weights differ from function to function")
            router, gate_up, down = (module.weights[name] for name in named.pop())
            groups = _groups(_matrix(router, source), experts.load, count)
            merged = [_merge(gate_up, down, source, group, experts.load) for group in groups]
            for one in found:
                _replace(module, one, groups, merged)
            return {
                "layer": experts.layer,
                "groups": groups,
                "starved": starved(experts, self.least),
            }

        change_layers(self, module, statistics, profile, merge)


def _matrix(expr: WeightExpr, source: WeightSource) -> Matrix:
    return materialize(expr, source).double().numpy()


def _groups(rows: Matrix, load: Sequence[int], count: int) -> list[list[int]]:
    """The experts of each group: its dominant one, then those that join it.

    Args:
        rows: the router's weight [E, D].
        load: tokens by expert.
        count: number of groups.
    """
    import numpy as np

    order = sorted(range(len(load)), key=lambda e: (-load[e], e))
    groups = {e: [e] for e in sorted(order[:count])}
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.maximum(length, np.finfo(np.float64).tiny)
    alike = unit @ unit[list(groups)].T
    for expert in sorted(order[count:]):
        groups[list(groups)[int(alike[expert].argmax())]].append(expert)
    return list(groups.values())


def _merge(
    gate_up: WeightExpr,
    down: WeightExpr,
    source: WeightSource,
    group: Sequence[int],
    load: Sequence[int],
) -> tuple[WeightExpr, WeightExpr]:
    """The weights [1, 2I, D] and [1, D, I] of a group as one expert; unused ones add nothing."""
    used = [group[0], *(e for e in group[1:] if load[e])]
    parts = [(Slice(gate_up, 0, e, e + 1), Slice(down, 0, e, e + 1)) for e in used]
    if len(parts) == 1:
        return parts[0]
    dominant = _neurons(*parts[0], source)
    ups: list[WeightExpr] = [parts[0][0]]
    downs: list[WeightExpr] = [parts[0][1]]
    for part in parts[1:]:
        order = _align(dominant, _neurons(*part, source))
        both = (*order, *(len(order) + i for i in order))
        ups.append(Take(part[0], 1, both))
        downs.append(Take(part[1], 2, order))
    total = sum(load[e] for e in used)
    shares = tuple(load[e] / total for e in used)
    return Mix(tuple(ups), shares), Mix(tuple(downs), shares)


def _neurons(gate_up: WeightExpr, down: WeightExpr, source: WeightSource) -> Matrix:
    """[gate row | up row | down column] of each neuron: [I, 3 D]."""
    import numpy as np

    both, columns = _matrix(gate_up, source)[0], _matrix(down, source)[0]
    return np.hstack([*np.split(both, 2), columns.T])


def _align(ours: Matrix, theirs: Matrix) -> tuple[int, ...]:
    """The order of their neurons in which the products with ours sum to most: ours ≈ theirs[P]."""
    from scipy.optimize import linear_sum_assignment

    return tuple(linear_sum_assignment(ours @ theirs.T, maximize=True)[1].tolist())


def _replace(
    module: Module,
    found: Routed,
    groups: Sequence[Sequence[int]],
    merged: Sequence[tuple[WeightExpr, WeightExpr]],
) -> None:
    """Let the experts' op read the merged weights, by the numbers of the groups."""
    holder = found.holder
    number = {expert: i for i, group in enumerate(groups) for expert in group}
    rw = Rewriter(found.block, [])
    table = tuple(number[expert] for expert in sorted(number))
    index = rw.emit(ops.Renumber(holder.index, table=table, loc=holder.loc)).y
    params = [
        declare(module, rw, f"{weight_name(param)}.merged", Concat(parts, 0))
        for param, parts in zip(found.params, zip(*merged, strict=True), strict=True)
    ]
    holder.set_operands([holder.x, index, holder.weight, *params])
    for op in rw.emitted:
        found.block.insert_before(holder, op)

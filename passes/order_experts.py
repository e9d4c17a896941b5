"""The pass `order-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from liquidc.ir import Block, DType, Module, Op, ops
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.passes.balanced_cut import balanced_parts, cut_weight, graph_of
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.fold_constants import splat
from liquidc.passes.routed_experts import Routed, change_layers, take_experts
from liquidc.profile import ExpertProfile

if TYPE_CHECKING:
    from networkx import Graph


@dataclass(frozen=True)
class OrderExperts(Pass):
    """Experts that tokens use together get to lie together.

    Before::

        %l = linear %x, %wr : f32[B, T, 4]
        %i, %s = route %l, %m, k=2
        %y = grouped_experts %x, %i, %s, %gate_up, %down
        return %y, %i

    After::

        %l = linear %x, %wr.ordered : f32[B, T, 4]      (wr.ordered = take(wr, 0, [0, 2, 1, 3]))
        %i, %s = route %l, %m, k=2
        %j = renumber %i, table=[0, 2, 1, 3]
        %y = grouped_experts %x, %i, %s, %gate_up.ordered, %down.ordered
        return %y, %j

    The experts of a layer are divided into `groups` groups of one size, so that the pairs of
    experts in different groups are used together by as few of the profile's tokens as possible: a
    balanced minimum cut, by greedy growth and swaps. Where the router has groups of its own, each
    is divided. Memory is then read in longer runs, and experts can be spread over devices; no
    result changes but the order of sums. Results keep the experts' own numbers. Only between
    experts whose scores tie exactly may the choice change: the lower number wins, and that is
    another one.
    """

    name: ClassVar[str] = "order-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "reassociates"
    needs: ClassVar[Need] = "experts"
    groups: int = 2

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError("groups is 2 or more")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Order the experts of every layer that is understood; the others stay, with the reason."""

        def order(profile: ExpertProfile, found: list[Routed], rw: Rewriter) -> dict[str, Any]:
            for one in found:
                _check_numbers(one, rw)
            graph, count = graph_of(profile.together), len(profile.load)
            parts = self._parts(graph, count // found[0].route.n_group, rw)
            entries = tuple(expert for part in parts for expert in part)
            rw.check(entries != tuple(range(count)), "no order is better than the one that it has")
            for one in found:
                _order(module, one, entries)
            old = _runs(count, len(parts[0]))
            return {
                "layer": profile.layer,
                "order": list(entries),
                "group_size": len(parts[0]),
                "cut": {"before": cut_weight(graph, old), "after": cut_weight(graph, parts)},
                "groups_per_token": {
                    "before": groups_per_token(profile, old),
                    "after": groups_per_token(profile, parts),
                },
            }

        change_layers(self, module, statistics, context.need_profile(self.name), order)

    def _parts(self, graph: Graph[int], block: int, rw: Rewriter) -> list[list[int]]:
        """The groups; `block` experts make one of the router's own groups."""
        rw.check(block % self.groups == 0, f"{block} experts don't make {self.groups} equal groups")
        rw.check(block > self.groups, f"{self.groups} groups of {block} experts have one each")
        blocks = (graph.subgraph(run) for run in _runs(len(graph), block))
        return [part for block in blocks for part in balanced_parts(block, self.groups)]


def groups_per_token(profile: ExpertProfile, parts: Sequence[Sequence[int]]) -> float:
    """How many groups a token's experts lie in, on average.

    Loads and pairs say exactly how many if a token uses at most two experts, otherwise at least
    how many: the bound of Dawson and Sankoff (1967), the best that pairs allow.
    """
    total = 0.0
    for part in parts:
        uses = sum(profile.load[i] for i in part)
        pairs = sum(profile.together[i][j] for i in part for j in part if i < j)
        if uses:
            most = 1 + 2 * pairs // uses
            total += 2 * uses / (most + 1) - 2 * pairs / (most * (most + 1))
    return total / profile.tokens


def _runs(count: int, size: int) -> list[list[int]]:
    """The numbers below `count` in order, `size` together."""
    return [list(range(start, start + size)) for start in range(0, count, size)]


def _numbers(found: Routed) -> list[Op]:
    """What stands between the router's choice and the experts, in order."""
    return [op for op in found.chosen if op.result.dtype == DType.I64]


def _check_numbers(found: Routed, rw: Rewriter) -> None:
    """Refuse experts that are used by numbers of their own."""
    for op in _numbers(found):
        if isinstance(op, ops.Where):
            other = splat(op.b)
            rw.check(other is not None and other < 0, "it uses experts that no router chose")


def _order(module: Module, found: Routed, entries: tuple[int, ...]) -> None:
    """Order the weights; what reads the router's choice gets the old numbers, but the experts."""
    take_experts(module, found, entries, "ordered")
    route, block = found.route, cast(Block, found.route.parent)
    renumber = ops.Renumber(route.index, table=entries, loc=route.loc)
    block.ops.insert(block.ops.index(route) + 1, renumber)
    renumber.parent = block
    for user in [user for user in route.index.uses if user is not renumber]:
        user.set_operands([renumber.y if v is route.index else v for v in user.operands])
    mapping = {renumber.y: route.index}
    for op in _numbers(found):
        cast(Block, op.parent).insert_before(op, op.clone(mapping))
    found.holder.set_operands([mapping.get(v, v) for v in found.holder.operands])

"""The pass `prune-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Module, ops
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.routed_experts import (
    RATIO,
    Routed,
    change_layers,
    check_options,
    share_left,
    starved,
    take_experts,
)
from liquidc.profile import UNIT, ExpertProfile


@dataclass(frozen=True)
class PruneExperts(Pass):
    """The experts that contribute least are removed, with their rows of the router.

    Before::

        %l = linear %x, %wr : f32[B, T, 4]
        %i, %s = route %l, %m, k=2
        %y = grouped_experts %x, %i, %s, %gate_up, %down

    After::

        %l = linear %x, %wr.kept : f32[B, T, 3]         (wr.kept = take(wr, 0, [0, 1, 3]))
        %i, %s = route %l, %m, k=2
        %y = grouped_experts %x, %i, %s, %gate_up.kept, %down.kept

    An expert's score is REAP's (arXiv 2510.13999): the mean over its tokens of
    weight · ‖output‖₂, from the profile; an expert without tokens goes first. Every layer, and
    every group of a router with groups, loses the same number: `ratio` of them, or all but `keep`
    a layer; never so many that a token finds too few. The engine numbers those that stay from 0.
    Experts with fewer than `least` tokens are listed: their score is not to be trusted.
    """

    name: ClassVar[str] = "prune-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"
    needs: ClassVar[Need] = "experts"
    keep: int = 0
    ratio: float = RATIO
    least: int = 32

    def __post_init__(self) -> None:
        check_options(self.keep, self.ratio)

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Prune every layer whose experts are found; the others keep theirs, with the reason."""

        def prune(profile: ExpertProfile, found: list[Routed], rw: Rewriter) -> dict[str, Any]:
            scores, route = reap(profile), found[0].route
            kept = _best(profile, scores, self._kept(profile, route, rw), route.n_group)
            for one in found:
                take_experts(module, one, kept, "kept")
            return self._facts(profile, scores, kept)

        change_layers(self, module, statistics, context.need_profile(self.name), prune)

    def _kept(self, profile: ExpertProfile, route: ops.Route, rw: Rewriter) -> int:
        """How many experts every group keeps."""
        size = len(profile.load) // route.n_group
        least = -(-profile.per_token // route.topk_group)
        count, rest = max(share_left(size, self.ratio), least), 0
        if self.keep:
            count, rest = divmod(self.keep, route.n_group)
        rw.check(rest == 0, f"{self.keep} experts don't fill {route.n_group} groups")
        rw.check(count < size, "it has no experts to spare")
        if count < least:
            raise InputError(
                f"the pass {self.name}: keep={self.keep} leaves a token of layer {profile.layer} "
                f"less than the {profile.per_token} experts that it uses"
            )
        return count

    def _facts(
        self, profile: ExpertProfile, scores: Sequence[float], kept: Sequence[int]
    ) -> dict[str, Any]:
        removed = [e for e in range(len(scores)) if e not in kept]
        return {
            "layer": profile.layer,
            "kept": list(kept),
            "removed": [
                {"expert": e, "score": scores[e], "tokens": profile.load[e]} for e in removed
            ],
            "starved": starved(profile, self.least),
        }


def reap(profile: ExpertProfile) -> list[float]:
    """The score of each expert.

    Raises:
        InputError: the profile does not know the experts' outputs.
    """
    if profile.saliency is None:
        raise InputError(
            "the pass prune-experts needs the experts' outputs in the profile: profile the model "
            "directory, not an engine, which does not show them"
        )
    pairs = zip(profile.saliency, profile.load, strict=True)
    return [total / tokens / UNIT if tokens else 0.0 for total, tokens in pairs]


def _best(
    profile: ExpertProfile, scores: Sequence[float], count: int, groups: int
) -> tuple[int, ...]:
    """The `count` best experts of each group; of equal ones the more used, then the first."""
    size = len(scores) // groups
    kept: list[int] = []
    for start in range(0, len(scores), size):
        group = range(start, start + size)
        kept += sorted(group, key=lambda e: (-scores[e], -profile.load[e], e))[:count]
    return tuple(sorted(kept))

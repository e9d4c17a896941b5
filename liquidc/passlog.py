"""What each pass of a compile changed: ops by kind, weights, the rules that fired or refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from liquidc.facts import total_bytes
from liquidc.ir import Module, ops
from liquidc.ir.rewriter import Statistics


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass.

    Attributes:
        name: of the pass.
        ops: number of ops before and after.
        weights: bytes of the weights in use before and after.
        kinds: before and after, by the kinds of ops whose number changed.
        fired: firings by rule.
        refused: by rule, why its nearest miss did not fire.
    """

    name: str
    ops: tuple[int, int]
    weights: tuple[int, int]
    kinds: dict[str, tuple[int, int]]
    fired: dict[str, int]
    refused: dict[str, str]


def weights_in_use(module: Module) -> int:
    """Bytes of the weights that something reads."""
    used = {op.weight for op in module.walk() if isinstance(op, ops.Weight) and op.y.uses}
    return total_bytes(module.weights[name].type for name in used)


class PassLog:
    """Records passes as they run.

    Args:
        module: before the first pass.
        statistics: that the passes count in.

    Attributes:
        records: one for each pass, in order.
    """

    def __init__(self, module: Module, statistics: Statistics) -> None:
        self.records: list[PassRecord] = []
        self._statistics = statistics
        self._look(module)

    def _look(self, module: Module) -> None:
        self._kinds = Counter(op.op_name for op in module.walk())
        self._weights = weights_in_use(module)
        self._fired = Counter(self._statistics.fired)
        self._misses = dict(self._statistics.near_misses)

    def after(self, name: str, module: Module) -> None:
        """Record that the pass `name` made `module` of what there was before."""
        kinds, weights, fired, misses = self._kinds, self._weights, self._fired, self._misses
        self._look(module)
        self.records.append(
            PassRecord(
                name,
                (kinds.total(), self._kinds.total()),
                (weights, self._weights),
                {
                    kind: (kinds[kind], self._kinds[kind])
                    for kind in sorted(kinds | self._kinds)
                    if kinds[kind] != self._kinds[kind]
                },
                dict(sorted((self._fired - fired).items())),
                {
                    rule: miss.reason
                    for rule, miss in sorted(self._misses.items())
                    if misses.get(rule) is not miss
                },
            )
        )

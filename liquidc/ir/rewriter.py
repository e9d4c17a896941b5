"""Rewrite rules: pattern → check → rewrite, each refusal with its reason.

A rule looks at one op and either returns the values that replace its results or refuses::

    class FoldDoubleNeg(Rule):
        '''-(-x) → x.'''

        root = ops.Neg

        def rewrite(self, op: ops.Neg, rw: Rewriter) -> list[Value]:
            inner = rw.need(op.x.op, ops.Neg, "the operand is not a neg")
            return [inner.x]

`apply_rules` walks every block in order until no rule fires any more, and counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar

from liquidc.errors import InternalError
from liquidc.ir.core import Block, Module, Op, Value

T = TypeVar("T")
AnyOp = TypeVar("AnyOp", bound=Op)
MAX_ROUNDS = 50
"""Rounds over a module after which rules that keep firing are taken to be in a loop."""


class Refusal(Exception):
    """A rule does not apply; how many of its checks held, and why not the next one."""

    def __init__(self, reason: str, held: int) -> None:
        super().__init__(reason)
        self.reason, self.held = reason, held


@dataclass(slots=True)
class NearMiss:
    """The refusal of a rule that came closest to firing."""

    op: str
    reason: str
    held: int


@dataclass(slots=True)
class Statistics:
    """What rules and passes did.

    Attributes:
        fired: firings by rule.
        near_misses: each rule's nearest miss.
        facts: by name of the pass, what it wants its user to know, as JSON values.
    """

    fired: Counter[str] = field(default_factory=Counter[str])
    facts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    near_misses: dict[str, NearMiss] = field(default_factory=dict[str, NearMiss])

    def refuse(self, rule: str, op: Op, refusal: Refusal) -> None:
        """Remember `refusal` if it is the nearest miss so far."""
        best = self.near_misses.get(rule)
        if best is None or refusal.held > best.held:
            self.near_misses[rule] = NearMiss(repr(op), refusal.reason, refusal.held)


class Rewriter:
    """What a rule may do: check with reasons, and emit ops before the one that it rewrites."""

    def __init__(self, block: Block, emitted: list[Op]) -> None:
        self.block = block
        self.emitted = emitted
        self.held = 0

    def refuse(self, reason: str) -> NoReturn:
        """Give up.

        Raises:
            Refusal: always.
        """
        raise Refusal(reason, self.held)

    def check(self, condition: bool, reason: str) -> None:
        """Go on only if `condition` holds.

        Raises:
            Refusal: it does not.
        """
        if not condition:
            self.refuse(reason)
        self.held += 1

    def need(self, thing: object, kind: type[T], reason: str) -> T:
        """`thing`, which must be a `kind`.

        Raises:
            Refusal: it is not.
        """
        if not isinstance(thing, kind):
            self.refuse(reason)
        self.held += 1
        return thing

    def emit(self, op: AnyOp, *names: str) -> AnyOp:
        """Put `op` before the op that is being rewritten; `names` are hints for its results."""
        op.parent = self.block
        self.emitted.append(op)
        for value, name in zip(op.results, names, strict=False):
            value.name = name
        return op


class Rule:
    """One rewrite; the class's docstring draws before → after."""

    root: ClassVar[type[Op] | tuple[type[Op], ...]] = Op

    @property
    def name(self) -> str:
        """The rule's name, as in `--explain`."""
        words = "".join(f"-{c.lower()}" if c.isupper() else c for c in type(self).__name__)
        return words.lstrip("-")

    def rewrite(self, op: Any, rw: Rewriter) -> Sequence[Value]:
        """The values that replace the results of `op`.

        Raises:
            Refusal: the rule does not apply, through `rw.check`, `rw.need` or `rw.refuse`.
        """
        raise NotImplementedError


def apply_rules(module: Module, rules: Sequence[Rule], stats: Statistics | None = None) -> bool:
    """Apply `rules` everywhere until none fires; true if one did.

    Raises:
        InternalError: the rules undo one another.
    """
    stats = stats if stats is not None else Statistics()
    changed = False
    for _ in range(MAX_ROUNDS):
        fired = [
            _rewrite_block(function.body, rules, stats) for function in module.functions.values()
        ]
        if not any(fired):
            return changed
        changed = True
    names = ", ".join(rule.name for rule in rules)
    raise InternalError(f"rewrite rules still fire after {MAX_ROUNDS} rounds: {names}")


def _rewrite_block(block: Block, rules: Sequence[Rule], stats: Statistics) -> bool:
    changed = False
    out: list[Op] = []
    for op in block.ops:
        for inner in op.regions.values():
            changed |= _rewrite_block(inner, rules, stats)
        if _rewrite_op(op, block, out, rules, stats):
            changed = True
        else:
            out.append(op)
    block.ops = out
    return changed


def _rewrite_op(
    op: Op, block: Block, out: list[Op], rules: Sequence[Rule], stats: Statistics
) -> bool:
    for rule in rules:
        if not isinstance(op, rule.root):
            continue
        emitted: list[Op] = []
        try:
            values = list(rule.rewrite(op, Rewriter(block, emitted)))
        except Refusal as refusal:
            for unused in emitted:
                unused.forget()
            stats.refuse(rule.name, op, refusal)
            continue
        out += emitted
        for old, new in zip(op.results, values, strict=True):
            new.name = new.name or old.name
            old.replace_by(new)
        op.forget()
        stats.fired[rule.name] += 1
        return True
    return False

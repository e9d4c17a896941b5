"""The regions that a function's gates open: when they are reached, and what shows their work.

A region is the first arm of an `if` with the role `gate`. Its work is counted at one op of the arm,
the `witness`: a matrix product, or else experts, of as many rows as tokens are computed. Backends
count the rows of that op, whatever they call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from liquidc.ir import ops
from liquidc.ir.core import Block, Function, Op, Value
from liquidc.ir.types import product

Masks = tuple[int, ...]
"""Gates that let a token run together: it runs if each of them does."""
Key = tuple[int, int]
"""A gate, and the number of a region among those that it opens."""


@dataclass(frozen=True)
class Region:
    """A region of a gate.

    Attributes:
        op: the conditional.
        masks: the gates whose masks, all together, say which tokens run; empty if something else
            decides too.
        within: conditionals around it whose first arm it stands in, by their masks: it is reached
            if each has a token that runs.
        without: those whose other arm it stands in: it is reached if none has.
        tried: whether it stands in the code of an expected path, which the general code repeats.
        witness: the op that shows how many tokens are computed; None if the arm has none.
    """

    op: ops.If
    masks: Masks
    within: tuple[Masks, ...]
    without: tuple[Masks, ...]
    tried: bool
    witness: Op | None

    @property
    def key(self) -> Key:
        """Its gate and its number."""
        return self.op.gate, self.op.region

    @property
    def lowering(self) -> str:
        """`compact` if the tokens that run are computed, `branch` if all of the call."""
        return "branch" if _rows(self.op) is None else "compact"

    @property
    def shown(self) -> bool:
        """Whether the tokens that it computes can be told from decisions, and be counted."""
        known = all((self.masks, *self.within, *self.without))
        return known and self.witness is not None


def regions_of(function: Function) -> list[Region]:
    """The regions of gates, in the order of the program, one after those around it."""
    return list(_regions(function.body, (), (), False))


def is_commit(op: ops.If) -> bool:
    """Whether an `if` of the role `path` takes over what the one before it computed."""
    tried = op.cond.op
    return op.role == "path" and isinstance(tried, ops.If) and tried.role == "path"


def gates_asked(condition: Value) -> tuple[list[ops.DepthGate], bool]:
    """The gates that a condition asks whether they let any token run, all of them together.

    Returns:
        The gates by number, and whether nothing but they and padding decides.
    """
    terms = list(_terms(_mask(condition)))
    found = {term.op.gate: term.op for term in terms if isinstance(term.op, ops.DepthGate)}
    gates = [found[number] for number in sorted(found)]
    allowed = {value for gate in gates for value in (gate.mask, gate.valid)}
    return gates, bool(gates) and allowed.issuperset(terms)


def _mask(condition: Value) -> Value:
    """The mask that a condition asks for any token."""
    while isinstance(op := condition.op, ops.Any | ops.Reshape | ops.Cast | ops.AssumeSizes):
        condition = op.x
    return condition


def _terms(mask: Value) -> Iterator[Value]:
    """The masks whose conjunction a mask is."""
    if isinstance(op := mask.op, ops.And):
        yield from _terms(_mask(op.a))
        yield from _terms(_mask(op.b))
    else:
        yield mask


def _regions(
    block: Block, within: tuple[Masks, ...], without: tuple[Masks, ...], tried: bool
) -> Iterator[Region]:
    for op in block.ops:
        if not isinstance(op, ops.If):
            for inner in op.regions.values():
                yield from _regions(inner, within, without, tried)
        elif op.role == "gate":
            gates, known = gates_asked(op.cond)
            masks = tuple(gate.gate for gate in gates) if known else ()
            yield Region(op, masks, within, without, tried, _witness(op))
            yield from _regions(op.then, (*within, masks), without, tried)
            yield from _regions(op.otherwise, within, (*without, masks), tried)
        else:
            path = op.role == "path"
            yield from _regions(op.then, within, without, tried or path)
            yield from _regions(op.otherwise, within, without, tried)


def _rows(op: ops.If) -> ops.Rows | None:
    """Where an arm finds the tokens that run, if it computes them alone."""
    mask = _mask(op.cond)
    found = (inner for inner in op.then.ops if isinstance(inner, ops.Rows) and inner.mask is mask)
    return next(found, None)


def _witness(op: ops.If) -> Op | None:
    """The last product of as many rows as tokens are computed, or else the last experts."""
    rows = _rows(op)
    count = rows.dim if rows is not None else product(_mask(op.cond).shape)
    for kind in (ops.Linear, ops.GroupedExperts | ops.MapExperts):
        for inner in reversed(op.then.ops):
            if isinstance(inner, kind) and product(inner.operands[0].shape[:-1]) == count:
                return inner
    return None

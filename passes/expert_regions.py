"""The conditional region of one expert, as the trace writes it."""

from __future__ import annotations

from dataclasses import dataclass

from liquidc.ir import Value, ops
from liquidc.ir.rewriter import Rewriter
from liquidc.passes.fold_constants import splat


@dataclass(frozen=True)
class Region:
    """`if any(used) { yield total + where(used, added, 0) } else { yield total }`.

    Attributes:
        op: the conditional.
        used: the tokens that chose the expert.
        total: what the region adds to.
        added: what it adds for those tokens.
    """

    op: ops.If
    used: ops.ExpertMask
    total: Value
    added: Value

    def share(self, value: Value) -> ops.ExpertWeight | None:
        """The expert's weight that `value` is a reshape of."""
        op = value.op
        while isinstance(op, ops.Reshape | ops.Cast):
            op = op.x.op
        if not isinstance(op, ops.ExpertWeight) or op.expert != self.used.expert:
            return None
        return op if op.index is self.used.index else None


def is_region(op: ops.If) -> bool:
    """Whether a conditional is an expert's."""
    return op.role == "expert"


def next_region(op: ops.If) -> ops.If | None:
    """The expert's region in the same block that alone uses what this one gives."""
    users = list(op.results[0].uses)
    owners = {id(user.parent.parent): user.parent.parent for user in users if user.parent}
    if len(users) != 2 or len(owners) != 1:
        return None
    (owner,) = owners.values()
    if not isinstance(owner, ops.If) or owner.parent is not op.parent:
        return None
    return owner if is_region(owner) else None


def region_of(op: ops.If, rw: Rewriter) -> Region:
    """The parts of an expert's conditional.

    Raises:
        Refusal: it has another form.
    """
    any_used = rw.need(op.cond.op, ops.Any, "the condition is not any(...)")
    used = rw.need(any_used.x.op, ops.ExpertMask, "the condition is no expert's mask")
    rw.check(len(op.results) == 1, "the region gives more than a total")
    total = rw.need(
        op.then.terminator.operands[0].op, ops.Add, "the region does not add to a total"
    )
    rw.check(op.otherwise.terminator.operands == [total.a], "skipping changes the total")
    kept = rw.need(total.b.op, ops.Where, "what is added is not masked")
    rw.check(splat(kept.b) == 0, "what is added elsewhere is not 0")
    mask = rw.need(kept.mask.op, ops.Reshape, "the mask is no reshape")
    rw.check(mask.x is used.y, "the mask is another one")
    return Region(op, used, total.a, kept.a)

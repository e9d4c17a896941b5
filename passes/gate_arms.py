"""Depth gates and the conditionals behind them, and how an arm takes the place of its `if`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from liquidc.ir import Block, Function, Op, Value, ops
from liquidc.ir.rewriter import Rewriter
from liquidc.passes.known_mask import KnownMask


@dataclass(frozen=True)
class Gate:
    """A gate and the conditionals that ask whether any of its tokens runs."""

    op: ops.DepthGate
    conditionals: tuple[ops.If, ...]

    @property
    def number(self) -> int:
        """Its index in `gates` and `gate_force`."""
        return self.op.gate


def gates_of(function: Function) -> list[Gate]:
    """The gates of a function that still decide, by number."""
    gates = [op for op in function.body.walk() if isinstance(op, ops.DepthGate)]
    return [Gate(op, tuple(_asking(op.mask))) for op in sorted(gates, key=lambda op: op.gate)]


def _asking(mask: Value) -> list[ops.If]:
    """The conditionals on `any(mask)`."""
    found: list[ops.If] = []
    for user in mask.uses:
        if isinstance(user, ops.Any) and user.y.type.rank == 0:
            found += [op for op in user.y.uses if isinstance(op, ops.If) and op.cond is user.y]
    return found


def inline_arm(op: ops.If, arm: Block) -> list[Op]:
    """Put the ops of one arm in the place of `op`; returns them. The other arm is gone."""
    block = cast(Block, op.parent)
    *inner, end = arm.ops
    for value, result in zip(end.operands, op.results, strict=True):
        value.name = value.name or result.name
        result.replace_by(value)
    place = block.ops.index(op)
    end.forget()
    arm.ops = []
    op.forget()
    for moved in inner:
        moved.parent = block
    block.ops[place : place + 1] = inner
    return inner


def unread_caches(function: Function) -> list[str]:
    """Results `present.*` that nothing in the function reads: no attention looks at them."""
    names: list[str] = []
    for name, value in zip(function.result_names, function.returned, strict=True):
        if name.startswith("present.") and value.type.rank == 4 and _unread(value, function):
            names.append(name)
    return names


def _unread(value: Value, function: Function) -> bool:
    """Whether a cache only goes from the argument through appends to the result."""
    while True:
        if any(not isinstance(u, ops.Return | ops.Append | ops.AppendRows) for u in value.uses):
            return False
        op = value.op
        if op is None:
            return value in function.args
        if not isinstance(op, ops.Append | ops.AppendRows):
            return False
        value = op.cache


def drop_results(function: Function, names: Sequence[str]) -> None:
    """Remove caches from the results of a function, their appends, and then unread arguments."""
    kept = [
        (name, value)
        for name, value in zip(function.result_names, function.returned, strict=True)
        if name not in names
    ]
    end = function.body.terminator
    end.forget()
    function.body.ops.pop()
    function.body.append(ops.Return([value for _, value in kept]))
    function.result_names = tuple(name for name, _ in kept)
    for name in names:
        value = function.arg(name.replace("present.", "past.", 1))
        while appended := [op for op in value.uses if not any(v.uses for v in op.results)]:
            for op in appended:
                op.detach()
        if not value.uses:
            function.body.args.remove(value)


def mask_of(conditional: ops.If, rw: Rewriter) -> Value:
    """The mask [B, T] of which a conditional asks whether it holds for any token.

    Raises:
        Refusal: it asks something else.
    """
    condition = rw.need(conditional.cond.op, ops.Any, "the condition is not any(mask)")
    rw.check(condition.x.type.rank == 2, "the mask is not [B, T]")
    return condition.x


def check_masked(conditional: ops.If, rw: Rewriter) -> None:
    """Whether the masked arm gives what the other arm gives where no token runs.

    With the mask false for all tokens, each value that the arm yields must be the other arm's.

    Raises:
        Refusal: that can't be shown.
    """
    mask = mask_of(conditional, rw)
    inside = {value for op in conditional.then.walk() for value in op.results}
    off = KnownMask(mask, inside, known=False)
    pairs = zip(
        conditional.then.terminator.operands,
        conditional.otherwise.terminator.operands,
        strict=True,
    )
    for number, (mine, other) in enumerate(pairs):
        same = off.same(mine, other)
        rw.check(same, f"result {number} of a skipped token is not shown to be the other arm's")


def inline_masked(conditional: ops.If, rw: Rewriter) -> None:
    """Let the masked arm stand without its conditional.

    Raises:
        Refusal: as `check_masked`.
    """
    check_masked(conditional, rw)
    inline_arm(conditional, conditional.then)

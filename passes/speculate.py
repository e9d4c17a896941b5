"""Straight-line code for one token on an expected depth path, and the general code behind it.

    %try = one token, and the first gate decides as the path says
    %ok, ... = if %try, role="path"         { the path's layers; every gate on the way }
               else                         { false, zeros }
    ...      = if %ok, role="path"          { what the path computed; its keys and values appended }
               else                         { the general code, from the same state and cache }

The function also returns whether the path was tried and whether it was right.

Nothing is committed before all gates agree: the path attends over the cache as it was, with its
own key and value appended to it, and yields these; a cache is written in one of the last two arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from liquidc.ir import Block, Dim, DType, Function, Op, TensorType, Value, ops
from liquidc.ir.rewriter import Refusal, Rewriter
from liquidc.passes.gate_arms import Gate
from liquidc.passes.specialize_decode import bound, copy_bound, know_mask

TRIED, HIT = "path_tried", "path_hit"
"""Results that count: whether the path was tried, and whether all gates agreed."""
BIND: Mapping[str, Dim] = {"B": 1, "T": 1}


def speculate(function: Function, gates: list[Gate], path: str, rw: Rewriter) -> None:
    """Put the code for `path` (a digit for each of `gates`) before that of the gates' layers.

    Raises:
        Refusal: the layers do not stand in one block, or keep something that can't be committed.
    """
    block = function.body
    conditionals = [op for gate in gates for op in gate.conditionals]
    rw.check(len(gates) > 1, "there are fewer than two gates")
    rw.check(all(gate.conditionals for gate in gates), "a gate has no conditional")
    rw.check(all(op.parent is block for op in conditionals), "a conditional is nested")
    first = min(block.ops.index(op) for op in conditionals)
    last = max(block.ops.index(op) for op in conditionals)
    later = [block.ops.index(gate.op) for gate in gates[1:]]
    rw.check(all(first < at < last for at in later), "the gates do not follow one another")
    rw.check(block.ops.index(gates[0].op) < first, "the first gate decides too late")
    region = _without_what_is_free(block, block.ops[first : last + 1])
    out = _used_outside(region)
    straight = _Straight(region, gates, path, rw)
    try:
        hot = straight.block(out)
    except Refusal:
        straight.discard()
        raise
    place = block.ops.index(region[0])
    for op in region:
        block.ops.remove(op)
    before: list[Op] = []
    attempt = _attempt(gates[0], path[0] == "1", before)
    tried = ops.If(attempt, label="path", role="path", then=hot, otherwise=_nothing(hot))
    commit = straight.commit(tried)
    general = Block()
    for op in region:
        general.append(op)
    general.append(ops.Yield(out))
    hit, label = tried.results[0], "path/commit"
    end = ops.If(hit, label=label, role="path", then=commit, otherwise=general)
    for value, result in zip(out, end.results, strict=True):
        result.name = value.name
        for user in list(value.uses):
            if not _inside(user, general):
                user.set_operands([result if v is value else v for v in user.operands])
    for op in (*before, tried, end):
        op.parent = block
    block.ops[place:place] = [*before, tried, end]
    returned = function.returned
    block.ops.pop().forget()
    block.append(ops.Return([*returned, attempt, tried.results[0]]))
    function.result_names = (*function.result_names, TRIED, HIT)


def _without_what_is_free(block: Block, region: list[Op]) -> list[Op]:
    """Move ops that need nothing of the region before it; returns the rest."""
    made = {value for op in region for value in op.results}
    free: list[Op] = []
    for op in region:
        if not op.regions and not made.intersection(op.operands):
            free.append(op)
            made -= set(op.results)
    place = block.ops.index(region[0])
    for op in free:
        block.ops.remove(op)
    block.ops[place:place] = free
    return [op for op in region if op not in free]


def _used_outside(region: list[Op]) -> list[Value]:
    """Results of the region that ops outside use."""
    inside = {id(inner) for op in region for inner in op.walk()}
    values = [value for op in region for value in op.results]
    return [value for value in values if any(id(user) not in inside for user in value.uses)]


def _inside(op: Op, block: Block) -> bool:
    """Whether an op stands in a block or in one nested there."""
    at = op.parent
    while at is not None:
        if at is block:
            return True
        at = at.parent.parent if isinstance(at.parent, Op) else None
    return False


def _attempt(first: Gate, runs: bool, out: list[Op]) -> Value:
    """Whether there is one token and the first gate decides for it as the path says."""
    valid = first.op.valid

    def emit(op: Op) -> Value:
        out.append(op)
        return op.results[0]

    rows = emit(ops.Size(dim=valid.shape[0]))
    tokens = emit(ops.Size(dim=valid.shape[1]))
    one = emit(ops.Constant(value=(1,), result_types=[TensorType(DType.I64)]))
    alone = emit(ops.Eq(emit(ops.Mul(rows, tokens)), one))
    some = emit(ops.And(alone, emit(ops.Any(valid, dims=(0, 1)))))
    ran = emit(ops.Any(first.op.mask, dims=(0, 1)))
    return emit(ops.And(some, ran if runs else emit(ops.Not(ran))))


def _nothing(hot: Block) -> Block:
    """What is yielded when there is no attempt: false and zeros."""
    block = Block()
    values: list[Value] = []
    for value in hot.terminator.operands:
        zero = False if value.dtype == DType.BOOL else 0.0 if value.dtype.is_float else 0
        type = TensorType(value.dtype)
        scalar = block.append(ops.Constant(value=(zero,), result_types=[type])).y
        values.append(
            scalar if not value.shape else block.append(ops.Broadcast(scalar, shape=value.shape)).y
        )
    block.append(ops.Yield(values))
    return block


@dataclass(frozen=True)
class _Entry:
    """Where an appended entry goes: values from before the region."""

    cache: Value
    length: Value
    scale: Value | None


class _Straight(dict[Value, Value]):
    """The region copied for one token on the path; a mapping from its values to the copies.

    Args:
        region: the general code.
        gates: that decide in it.
        path: how.
        rw: for refusals.
    """

    def __init__(self, region: list[Op], gates: list[Gate], path: str, rw: Rewriter) -> None:
        super().__init__()
        self._region, self._gates, self._path, self._rw = region, gates, path, rw
        self._block = Block()
        self._runs = {
            op: (gate, digit == "1")
            for gate, digit in zip(gates, path, strict=True)
            for op in gate.conditionals
        }
        self._plan: list[tuple[Value, int | None, _Entry | None]] = []

    def __missing__(self, value: Value) -> Value:
        """A value from before the region, with its sizes known."""
        type = bound(value.type, BIND)
        if type == value.type:
            return value
        self[value] = self._block.append(ops.AssumeSizes(value, shape=type.shape)).y
        return self[value]

    def block(self, out: list[Value]) -> Block:
        """The code; yields whether all gates agree, and the values `out` but for their caches."""
        for op in self._region:
            self._copy(op)
        verdicts: list[Value] = []
        for gate, digit in list(zip(self._gates, self._path, strict=True))[1:]:
            ran = self._block.append(ops.Any(self[gate.op.mask], dims=(0, 1))).y
            verdicts.append(ran if digit == "1" else self._block.append(ops.Not(ran)).y)
        agree = verdicts[0]
        for verdict in verdicts[1:]:
            agree = self._block.append(ops.And(agree, verdict)).y
        yields = [agree]
        for value in out:
            yields += self._yielded(value, len(yields))
        self._block.append(ops.Yield(yields))
        return self._block

    def _copy(self, op: Op) -> None:
        if not isinstance(op, ops.If) or op not in self._runs:
            copy_bound(op, self._block, self, BIND)
            return
        gate, runs = self._runs[op]
        arm = (op.then if runs else op.otherwise).clone({})
        know_mask(arm, gate.op.mask, known=runs)
        for inner in arm.ops[:-1]:
            copy_bound(inner, self._block, self, BIND)
        for value, result in zip(arm.terminator.operands, op.results, strict=True):
            self[result] = self[value]
        for inner in arm.ops:
            inner.forget()

    def _yielded(self, value: Value, at: int) -> list[Value]:
        """What stands for a value of the general code: itself, or what is appended to its cache."""
        made, cache = self[value], _is_cache(value)
        appended = made.op if isinstance(made.op, ops.Append) else None
        if cache and appended is None:
            self._rw.check(self._is_from_before(made), "a cache is neither kept nor appended to")
            self._plan.append((self._outer(made), None, None))
            return []
        if appended is not None:
            scale = None if appended.scale is None else self._outer(appended.scale)
            entry = _Entry(self._outer(appended.cache), self._outer(appended.length), scale)
            self._plan.append((value, at, entry))
            shape = (*self._gates[0].op.valid.shape, *appended.new.shape[2:])
            return [self._block.append(ops.Broadcast(appended.new, shape=shape)).y]
        self._plan.append((value, at, None))
        if made.type == value.type:
            return [made]
        return [self._block.append(ops.Broadcast(made, shape=value.shape)).y]

    def commit(self, tried: ops.If) -> Block:
        """The arm that takes over what the path computed."""
        block = Block()
        values: list[Value] = []
        valid = self._gates[0].op.valid
        for value, at, entry in self._plan:
            if at is None:
                values.append(value)
            elif entry is None:
                values.append(tried.results[at])
            else:
                new = ops.Append(entry.cache, tried.results[at], entry.length, valid, entry.scale)
                values.append(block.append(new).y)
        block.append(ops.Yield(values))
        return block

    def discard(self) -> None:
        """Undo a refused copy: its ops use nothing any more."""
        for op in self._block.ops:
            op.forget()

    def _outer(self, value: Value) -> Value:
        """The value from before the region that a value inside is a shape of."""
        while value.op is not None and value.op.parent is self._block:
            same = self._rw.need(value.op, ops.AssumeSizes, "a cache or its length is computed")
            value = same.x
        return value

    def _is_from_before(self, value: Value) -> bool:
        return (
            value.op is None
            or value.op.parent is not self._block
            or (isinstance(value.op, ops.AssumeSizes))
        )


def _is_cache(value: Value) -> bool:
    return value.type.rank == 4 and isinstance(value.shape[2], str)


def gates_in_order(gates: list[Gate]) -> list[Gate]:
    """Gates by the place of their decision; they all stand in one block."""
    if not gates:
        return []
    block = cast(Block, gates[0].op.parent)
    return sorted(gates, key=lambda gate: block.ops.index(gate.op))

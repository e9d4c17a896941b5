"""An arm's values on the rows of some tokens; `compact-tokens` is made of it."""

from __future__ import annotations

from typing import Any, cast

from liquidc.ir import Block, Op, TensorType, Value, ops
from liquidc.ir.core import AnyOp
from liquidc.ir.rewriter import Rewriter
from liquidc.passes.known_mask import KnownMask, Number


class ArmRows:
    """Rebuilds the values of an arm in a new block, token by token where that is possible.

    Args:
        arm: the block that is rebuilt; it stays as it is.
        mask: the tokens that run it, bool[B, T], from outside.
        taken: names of dimensions in use; new ones are added.
        rw: for refusals.
    """

    def __init__(self, arm: Block, mask: Value, taken: set[str], rw: Rewriter) -> None:
        self.mask, self.taken, self.rw = mask, taken, rw
        self.block = Block()
        self.inside = {value for op in arm.walk() for value in op.results}
        self.sides: dict[bool, Side] = {}
        self.whole: dict[Value, Value] = {}
        self.same: dict[Value, Value] = {}

    def emit(self, op: AnyOp) -> AnyOp:
        """Add an op to the new block."""
        return self.block.append(op)

    def side(self, known: bool) -> Side:
        """The rows where the mask is `known`."""
        if known not in self.sides:
            self.sides[known] = Side(self, known)
        return self.sides[known]

    def by_token(self, value: Value) -> bool:
        """Whether a value has an entry for each token, [B, T, ...]; a cache has not."""
        if isinstance(value.op, ops.Weight) or any(isinstance(d, str) for d in value.shape[2:]):
            return False
        return value.shape[:2] == self.mask.shape

    def dense(self, value: Value) -> Value:
        """The value as it was, for all tokens: by rows and a scatter if it goes by token."""
        if value not in self.inside:
            return value
        if value not in self.whole:
            by_token = self.by_token(value)
            self.whole[value] = self._scattered(value) if by_token else self._other(value)
            self.whole[value].name = value.name
        return self.whole[value]

    def plain(self, value: Value) -> Value:
        """The value computed as it was, masked."""
        if value not in self.inside:
            return value
        if value not in self.same:
            op = cast(Op, value.op)
            self.rw.check(not op.regions, f"{op.op_name} holds blocks")
            mapping = {v: self.plain(v) for v in op.operands}
            copy = self.emit(op.clone(mapping))
            self.same.update(zip(op.results, copy.results, strict=True))
        return self.same[value]

    def fill(self, number: Number, type: TensorType) -> Value:
        """A repeated number."""
        scalar = self.emit(ops.Constant(value=(number,), result_types=[TensorType(type.dtype)]))
        return self.emit(ops.Broadcast(scalar.y, shape=type.shape)).y

    def _scattered(self, value: Value) -> Value:
        skipped = self.side(False).simple(value)
        base = skipped if isinstance(skipped, Value) else None
        if base is None or base.type != value.type:
            number = skipped if isinstance(skipped, int | float) else 0
            base = self.fill(number if value.dtype.is_float else int(number), value.type)
            if skipped is None or isinstance(skipped, Value):
                off = self.side(False)
                base = self.emit(ops.ScatterRows(base, off.rows, off.row(value))).y
        on = self.side(True)
        return self.emit(ops.ScatterRows(base, on.rows, on.row(value))).y

    def _other(self, value: Value) -> Value:
        """Something that does not go by token: a cache, a weight, a constant."""
        op = cast(Op, value.op)
        if isinstance(op, ops.Append):
            if op.mask is not self.mask:
                return self.emit(op.clone({v: self.dense(v) for v in op.operands})).y
            on = self.side(True)
            cache, length = self.dense(op.cache), self.dense(op.length)
            scale = op.scale and self.dense(op.scale)
            new = ops.AppendRows(cache, on.row(op.new), on.rows, length, self.mask, scale)
            return self.emit(new).y
        self.rw.check(not op.regions and len(op.results) == 1, f"{op.op_name} is not understood")
        mapping = {v: self.dense(v) for v in op.operands}
        return self.emit(op.clone(mapping)).results[0]


class Side(KnownMask):
    """The tokens where the mask is known to be true, or those where it is false."""

    def __init__(self, arm: ArmRows, known: bool) -> None:
        super().__init__(arm.mask, arm.inside, known)
        self.arm = arm
        mask = arm.mask if known else arm.emit(ops.Not(arm.mask)).y
        number = 0
        while f"N{number}" in arm.taken:
            number += 1
        self.dim = f"N{number}"
        arm.taken.add(self.dim)
        self.token_mask = mask
        self.rows = arm.emit(ops.Rows(mask, dim=self.dim)).y
        self.made: dict[Value, Value] = {}

    def row(self, value: Value) -> Value:
        """The value on these rows, [N, ...]; what does not go by token stays as it is."""
        if value not in self.made:
            made = self._row(value)
            made.name = made.name or (f"{value.name}.rows" if value.name else "")
            self.made[value] = made
        return self.made[value]

    def _row(self, value: Value) -> Value:
        arm, by_token = self.arm, self.arm.by_token(value)
        known = self.truth(value) if by_token else None
        if known is not None:
            return arm.fill(known, self._type(value))
        if value not in arm.inside:
            if by_token:
                return arm.emit(ops.GatherRows(value, self.rows)).y
            self._free_of_tokens(value)
            return value
        if not by_token:
            result = arm.dense(value)
            self._free_of_tokens(value)
            return result
        number = self.simple(value)
        if isinstance(number, int | float) and not isinstance(value.op, ops.Broadcast):
            return arm.fill(number, self._type(value))
        return self._op(cast(Op, value.op), value)

    def _type(self, value: Value) -> TensorType:
        return value.type.with_shape(self.dim, *value.shape[2:])

    def _goes_along(self, value: Value) -> bool:
        """Whether an operand has an entry for each token, or the same one for all of them."""
        return self.arm.by_token(value) or not set(value.shape) & set(self.arm.mask.shape[:1])

    def _free_of_tokens(self, value: Value) -> None:
        """Refuse a value that would have to be repeated for each token, like [B, 1, D]."""
        leading = set(self.arm.mask.shape) - {1}
        lengths = [dim for dim in value.shape if dim in leading and isinstance(dim, str)]
        cache = value.type.rank == 4
        self.arm.rw.check(not lengths or cache, f"%{value.name} {value.type} mixes rows and tokens")

    def _op(self, op: Op, value: Value) -> Value:
        arm = self.arm
        match op:
            case ops.Where() if (known := self.truth(op.mask)) is not None:
                side = self.row(op.a if known else op.b)
                if side.type != self._type(value):
                    side = arm.emit(ops.Broadcast(side, shape=self._type(value).shape)).y
                return side
            case ops.Attend():
                limit, key, val = self.row(op.limit), arm.dense(op.key), arm.dense(op.value)
                attend = ops.AttendRows(
                    self.row(op.q),
                    key,
                    val,
                    limit,
                    self.rows,
                    self.token_mask,
                    op.key_scale and arm.dense(op.key_scale),
                    op.value_scale and arm.dense(op.value_scale),
                    op.sink and arm.dense(op.sink),
                    scale=op.scale,
                    window=op.window,
                    chunk=op.chunk,
                    loc=op.loc,
                )
                return arm.emit(attend).y
            case ops.MapExperts():
                mapping = {v: self.row(v) for v in op.operands}
                return arm.emit(op.clone(mapping, reinfer=True, body=self._body(op.body))).y
            case _:
                pass
        changes = self._changes(op)
        if changes is not None and all(self._goes_along(v) for v in op.operands):
            mapping = {v: self.row(v) for v in op.operands}
            self.made.update(self._copy(op, arm.block, mapping, changes))
            return self.made[value]
        # Positions and limits: a few integers, which need all tokens (a running sum).
        small = not value.dtype.is_float and value.type.rank == 2
        arm.rw.check(small, f"{op.op_name} does not go token by token")
        return arm.emit(ops.GatherRows(arm.plain(value), self.rows)).y

    def _changes(self, op: Op) -> dict[str, Any] | None:
        """The attributes that change when [B, T] becomes [N]; None if the op mixes tokens."""
        by_token, y = self.arm.by_token, op.results[0]
        if not by_token(y):
            return None if any(map(by_token, op.operands)) else {}
        match op:
            case ops.Slice() | ops.Softmax() | ops.Concat() if op.dim >= 2:
                return {"dim": op.dim - 1}
            case ops.Reduce() if all(dim >= 2 for dim in op.dims):
                return {"dims": tuple(dim - 1 for dim in op.dims)}
            case ops.Reshape() if by_token(op.x):
                return {"shape": self._type(y).shape}
            case ops.Broadcast() if by_token(op.x) or op.x.type.rank < y.type.rank:
                return {"shape": self._type(y).shape}
            case _:
                return {} if op.tokenwise else None

    def _copy(
        self, op: Op, block: Block, mapping: dict[Value, Value], changes: dict[str, Any]
    ) -> dict[Value, Value]:
        """The op on rows at the end of `block`; old results → new ones."""
        copy = block.append(op.clone(mapping, reinfer=True, **changes))
        for old, new in zip(op.results, copy.results, strict=True):
            kept = not self.arm.by_token(old) or new.type == self._type(old)
            self.arm.rw.check(kept, f"{op.op_name} loses its tokens")
        return dict(zip(op.results, copy.results, strict=True))

    def _body(self, body: Block) -> Block:
        """The body of `map_experts` for rows."""
        types = [self._type(a) if self.arm.by_token(a) else a.type for a in body.args]
        block = Block([(a.name, type) for a, type in zip(body.args, types, strict=True)])
        mapping = dict(zip(body.args, block.args, strict=True))
        for op in body.ops:
            changes = {} if op.terminator else None if op.regions else self._changes(op)
            if changes is None:
                self.arm.rw.refuse(f"{op.op_name} does not go token by token")
            for value in op.operands:
                mapping[value] = mapping[value] if value in mapping else self.row(value)
            mapping.update(self._copy(op, block, mapping, changes))
        return block

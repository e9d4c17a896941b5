"""What one token costs, read off the IR: by layer, and by what the layer's gate decides.

Counted are the weights and keys that are read and the FLOPs of matrix products, two for each
multiply-add; norms, elementwise maths and softmax are not. Experts count with the k of E that a
token uses; identity experts are free, and taken to be chosen as often as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, cast

from liquidc.ir import ops
from liquidc.ir.core import Block, Function, Module, Op, Value
from liquidc.ir.experts import experts_used
from liquidc.ir.weights import sizes


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one token.

    Attributes:
        weights: bytes of weights.
        flops: FLOPs of products with weights.
        key_bytes: bytes of the cache, for each key that attention sees.
        key_flops: FLOPs of attention, for each key that it sees.
    """

    weights: int = 0
    flops: int = 0
    key_bytes: int = 0
    key_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights,
            self.flops + other.flops,
            self.key_bytes + other.key_bytes,
            self.key_flops + other.key_flops,
        )

    def share(self, part: int, whole: int) -> Cost:
        """`part` of `whole` equal parts."""
        return Cost(
            self.weights * part // whole,
            self.flops * part // whole,
            self.key_bytes * part // whole,
            self.key_flops * part // whole,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cost arises.

    Attributes:
        layer: None for the embedding, the head and what else belongs to no layer.
        gate: paid only by tokens for which this gate decides as `ran` says; None if by all.
        ran: the gate's decision.
    """

    layer: int | None = None
    gate: int | None = None
    ran: bool = True


def costs(module: Module, function: Function) -> dict[Place, Cost]:
    """What one token pays where.

    A path that is tried before the general code is not counted: it reads what that would read.
    """
    return _Counter(module, function).found


class _Where(NamedTuple):
    """The code that an op stands in: of a gate's arm, of an expert (k of E are used)."""

    gate: int | None = None
    ran: bool = True
    used: int = 1
    experts: int = 1


class _Counter:
    """Walks a function; weights are counted last, when the places of all their readers are known.

    Attributes:
        found: the costs.
    """

    def __init__(self, module: Module, function: Function) -> None:
        self.found: dict[Place, Cost] = {}
        self._module = module
        self._layers = cast(int, module.attributes.get("layers", 0))
        self._where: dict[Op, _Where] = {}
        self._layer_of_gate: dict[int, int] = {}
        self._experts: dict[Value, set[int]] = {}
        for op in function.body.walk():
            if isinstance(op, ops.DepthGate | ops.FixedGate):
                self._layer_of_gate[op.gate] = op.layer
            if isinstance(op, ops.If) and (mask := _expert_mask(op)) is not None:
                self._experts.setdefault(mask.index, set()).add(op.expert)
        self._block(function.body, _Where())
        for op in function.body.walk():
            if isinstance(op, ops.Weight):
                self._weight(op)

    def _block(self, block: Block, where: _Where) -> None:
        for op in block.ops:
            self._where[op] = where
            if isinstance(op, ops.If):
                then, otherwise = self._arms(op, where)
                if op.role != "path":
                    self._block(op.then, then)
                self._block(op.otherwise, otherwise)
            elif (cost := product(op)) is not None:
                self._add(where, self._layer(op), cost.share(where.used, where.experts))

    def _arms(self, op: ops.If, where: _Where) -> tuple[_Where, _Where]:
        if (mask := _expert_mask(op)) is not None:
            used, count = sizes(mask.index.shape[-1:])[0], len(self._experts[mask.index])
            return where._replace(used=min(used, count), experts=count), where
        if op.role == "gate":
            ran, skipped = (where._replace(gate=op.gate, ran=ran) for ran in (True, False))
            return ran, skipped
        return where, where

    def _weight(self, op: ops.Weight) -> None:
        """Count what is read of a weight: by the reader that needs most of it."""
        users = [(user, value) for user, value in _readers(op.y) if user in self._where]
        arms = {self._where[user][:2] for user, _ in users}
        gate, ran = arms.pop() if len(arms) == 1 else (None, True)
        total = prod(sizes(op.y.shape)) * op.y.dtype.bytes
        read = max((self._read(user, value, total) for user, value in users), default=0)
        self._add(_Where(gate, ran), self._layer_of_weight(op), Cost(weights=read))

    def _read(self, user: Op, weight: Value, total: int) -> int:
        """Bytes, of `total`, that one token reads in `user`: one row, its k experts, or all."""
        rows = sizes(weight.shape[:1])
        if isinstance(user, ops.Embed):
            return total // rows[0]
        if isinstance(user, ops.MapExperts | ops.GroupedExperts):
            held = weight not in (user.x, user.index, user.weight)
            return int(total * experts_used(user) / rows[0]) if held else total
        where = self._where[user]
        return total * where.used // where.experts

    def _add(self, where: _Where, layer: int | None, cost: Cost) -> None:
        layer = layer if where.gate is None else self._layer_of_gate[where.gate]
        place = Place(layer, where.gate, where.ran)
        self.found[place] = self.found.get(place, Cost()) + cost

    def _layer(self, op: Op) -> int | None:
        """The layer of a product, by the weights or the cache that it reads."""
        if isinstance(op, ops.Attend | ops.AttendRows):
            return self._known([_cache_name(op.key)])
        made = [value.op for value in op.operands]
        made = [op.codes.op if isinstance(op, ops.Dequantize) else op for op in made]
        layers = {self._layer_of_weight(op) for op in made if isinstance(op, ops.Weight)}
        return layers.pop() if len(layers) == 1 else None

    def _layer_of_weight(self, op: ops.Weight) -> int | None:
        return self._known(self._module.weights[op.weight].sources())

    def _known(self, names: Sequence[str]) -> int | None:
        """The layer that all these dotted names speak of: their first number."""
        numbers = {next(filter(str.isdigit, name.split(".")), "") for name in names}
        number = numbers.pop() if len(numbers) == 1 else ""
        return int(number) if number and int(number) < self._layers else None


def _expert_mask(op: ops.If) -> ops.ExpertMask | None:
    """The tokens that choose an expert which is a conditional, and is not grouped with others."""
    asked = op.cond.op.operands[0].op if op.role == "expert" and op.cond.op is not None else None
    return asked if isinstance(asked, ops.ExpertMask) else None


def _readers(value: Value) -> list[tuple[Op, Value]]:
    """The ops that read a weight, and what they read: it, or the floats that its codes mean."""
    found: list[tuple[Op, Value]] = []
    for user in value.uses:
        found += _readers(user.y) if isinstance(user, ops.Dequantize) else [(user, value)]
    return found


def product(op: Op) -> Cost | None:
    """What a product costs one token, the reading of weights apart; None of another op."""
    if isinstance(op, ops.Linear):
        return Cost(flops=2 * _known_size(op.y) * sizes(op.x.shape[-1:])[0])
    if isinstance(op, ops.MatMul):
        inner = op.a.shape[-1]
        each = 2 * _known_size(op.y) * (inner if isinstance(inner, int) else 1)
        per_key = isinstance(inner, str) or isinstance(op.y.shape[-1], str)
        return Cost(key_flops=each) if per_key else Cost(flops=each)
    if isinstance(op, ops.Attend | ops.AttendRows):
        heads, width = sizes(op.q.shape[-2:])
        stored = sizes((op.key.shape[1], op.key.shape[3]))
        return Cost(key_bytes=2 * prod(stored) * op.key.dtype.bytes, key_flops=4 * heads * width)
    if isinstance(op, ops.GroupedExperts):
        each = sum(prod(sizes(weight.shape[1:])) for weight in (op.gate_up, op.down))
        return Cost(flops=int(2 * experts_used(op) * each))
    if isinstance(op, ops.MapExperts):
        inside = [cost for o in op.body.walk() if (cost := product(o)) is not None]
        return Cost(flops=int(experts_used(op) * sum(cost.flops for cost in inside)))
    return None


def _known_size(value: Value) -> int:
    """Elements for one token: dimensions with names count tokens or keys."""
    return prod(dim for dim in value.shape if isinstance(dim, int))


def _cache_name(value: Value) -> str:
    """The argument `past.3.key` behind what was appended to it."""
    while isinstance(value.op, ops.Append | ops.AppendRows):
        value = value.op.cache
    return value.name

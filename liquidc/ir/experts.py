"""Routers and experts of a function by layer, read off its result `experts`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction

from liquidc.ir import ops
from liquidc.ir.core import Function, Op, Value
from liquidc.ir.weights import sizes

Holder = ops.GroupedExperts | ops.MapExperts


def routers_by_layer(function: Function) -> dict[int, list[ops.Route]]:
    """The routers whose choices make each row of the result `experts`, the first one met first.

    A layer has several where its code stands in several arms. A state of the layer below is
    reached only through a router of this layer, so the search ends at the first on each way.
    """
    found = {layer: list(_behind(row)) for layer, row in enumerate(_rows(function))}
    return {layer: routers for layer, routers in found.items() if routers}


def layers_of_experts(function: Function) -> dict[Op, int]:
    """The layer of every router, and of every op that holds experts."""
    layers: dict[Op, int] = {
        route: layer for layer, routes in routers_by_layer(function).items() for route in routes
    }
    for op in function.body.walk():
        if isinstance(op, Holder):
            layer = next((layers[r] for r in _behind(op.index) if r in layers), None)
            if layer is not None:
                layers[op] = layer
    return layers


def places_of_experts(function: Function) -> dict[int, tuple[int, ...]]:
    """Where the weights of each expert are, by the number that results give it.

    Layers in which every expert is where its number says are left out.
    """
    layers, rows = layers_of_experts(function), _rows(function)
    found: dict[int, tuple[int, ...]] = {}
    for op, layer in layers.items():
        if isinstance(op, Holder):
            reported = _behind(rows[layer])
            for route, stored in _behind(op.index).items():
                places = dict(zip(reported.get(route, ()), stored, strict=False))
                if any(number != place for number, place in places.items()):
                    found[layer] = tuple(places.get(n, n) for n in range(len(stored)))
    return found


def experts_held(op: Holder) -> int:
    """How many experts the weights of an op are of."""
    return sizes((op.params[0] if isinstance(op, ops.MapExperts) else op.down).shape[:1])[0]


def identity_experts(op: Holder) -> int:
    """How many of the numbers that a router gives an op are of no weights: identity experts."""
    held = experts_held(op)
    return max((sum(n >= held for n in ns) for ns in _behind(op.index).values()), default=0)


def experts_used(op: Holder) -> Fraction:
    """The experts with weights that one token uses.

    Identity experts, if there are any, are taken to be chosen as often as the others.
    """
    slots = Fraction(sizes(op.index.shape[-1:])[0])
    for route in _behind(op.index):
        count = sizes(route.logits.shape[-1:])[0]
        slots -= Fraction(route.k * identity_experts(op), count)
        break
    return min(slots, Fraction(experts_held(op)))


def _rows(function: Function) -> list[Value]:
    """The result `experts` by layer."""
    returned = dict(zip(function.result_names, function.returned, strict=True))
    if "experts" not in returned:
        return []
    concat = returned["experts"].op
    return concat.operands if isinstance(concat, ops.Concat) else [returned["experts"]]


def _behind(value: Value) -> dict[ops.Route, tuple[int, ...]]:
    """The routers whose choice a value is, through conditionals and what moves integers.

    By router, what its numbers have become on the way.
    """
    pending: deque[tuple[Value, tuple[ops.Renumber, ...]]] = deque([(value, ())])
    seen, found = set[Value](), dict[ops.Route, tuple[int, ...]]()
    while pending:
        value, changes = pending.popleft()
        op = value.op
        if op is None or value in seen:
            continue
        seen.add(value)
        if isinstance(op, ops.Route):
            numbers = range(sizes(op.logits.shape[-1:])[0])
            found.setdefault(op, tuple(_changed(number, changes) for number in numbers))
        elif isinstance(op, ops.If):
            at = op.results.index(value)
            pending += [(arm.terminator.operands[at], changes) for arm in op.regions.values()]
        elif isinstance(op, ops.Renumber):
            pending.append((op.index, (op, *changes)))
        else:
            same = [operand for operand in op.operands if operand.dtype == value.dtype]
            pending += [(operand, changes) for operand in same]
    return found


def _changed(number: int, changes: Sequence[ops.Renumber]) -> int:
    for op in changes:
        number = op.table[number]
    return number

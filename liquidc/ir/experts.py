"""Which layer the routers and experts of a function belong to, read off its result `experts`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from liquidc.ir import ops
from liquidc.ir.core import Function, Op, Value


def routers_by_layer(function: Function) -> dict[int, list[ops.Route]]:
    """The routers whose choices make each row of the result `experts`, the first one met first.

    A layer has several where its code stands in several arms. A state of the layer below is
    reached only through a router of this layer, so the search ends at the first on each way.
    """
    returned = dict(zip(function.result_names, function.returned, strict=True))
    if "experts" not in returned:
        return {}
    concat = returned["experts"].op
    rows = concat.operands if isinstance(concat, ops.Concat) else [returned["experts"]]
    found = {layer: _behind([row]) for layer, row in enumerate(rows)}
    return {layer: routers for layer, routers in found.items() if routers}


def layers_of_experts(function: Function) -> dict[Op, int]:
    """The layer of every router, and of every op that holds experts."""
    layers: dict[Op, int] = {
        route: layer for layer, routes in routers_by_layer(function).items() for route in routes
    }
    for op in function.body.walk():
        if isinstance(op, ops.GroupedExperts | ops.MapExperts):
            layer = next((layers[r] for r in _behind([op.index]) if r in layers), None)
            if layer is not None:
                layers[op] = layer
    return layers


def _behind(values: Sequence[Value]) -> list[ops.Route]:
    """The routers whose choice values are, through conditionals and what moves integers."""
    pending, seen = deque(values), set[Value]()
    found: list[ops.Route] = []
    while pending:
        value = pending.popleft()
        op = value.op
        if op is None or value in seen:
            continue
        seen.add(value)
        if isinstance(op, ops.Route):
            if op not in found:
                found.append(op)
        elif isinstance(op, ops.If):
            at = op.results.index(value)
            pending += [arm.terminator.operands[at] for arm in op.regions.values()]
        else:
            pending += [operand for operand in op.operands if operand.dtype == value.dtype]
    return found

"""What belongs to the routers of depth gates and of experts: decisions depend on it."""

from __future__ import annotations

from liquidc.ir import Module, Op, ops


def router_linears(module: Module) -> set[Op]:
    """The `linear` ops on the way from a layer's state to a decision."""
    found: set[Op] = set()
    seen: set[Op] = set()
    pending = [op.operands[0] for op in module.walk() if isinstance(op, ops.DepthGate | ops.Route)]
    while pending:
        op = pending.pop().op
        if op is None or op in seen or op.regions:
            continue
        seen.add(op)
        if isinstance(op, ops.Linear):
            found.add(op)
        if isinstance(op, ops.Binary) and not _residual(op):
            pending += op.operands
        elif isinstance(op, ops.RMSNorm | ops.LayerNorm) and not _narrow(op):
            continue
        elif isinstance(op, _ON_THE_WAY):
            pending += op.operands[:1]
    return found


_ON_THE_WAY = (
    ops.Unary,
    ops.Linear,
    ops.Reshape,
    ops.Slice,
    ops.Cast,
    ops.Softmax,
    ops.RMSNorm,
    ops.LayerNorm,
)


def _residual(op: ops.Binary) -> bool:
    """Whether an op adds a layer's output to the state: routers begin after it."""
    return isinstance(op, ops.Add) and op.a.type == op.b.type


def _narrow(op: Op) -> bool:
    """Whether a norm stands inside a router: what it normalises is a projection."""
    return isinstance(op.operands[0].op, ops.Linear)

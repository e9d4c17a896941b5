"""What a token reads, for the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liquidc.facts import main_function
from liquidc.ir import Module, ops
from liquidc.ir.cost import costs
from liquidc.manifest import CostInfo


def cost_info(module: Module) -> CostInfo:
    """Bytes of weights that one token reads, always and by gate."""
    function = main_function(module)
    found = (op for op in function.body.walk() if isinstance(op, ops.DepthGate | ops.FixedGate))
    gates = {op.gate for op in found}
    always, run, skip = 0, [0] * len(gates), [0] * len(gates)
    for place, cost in costs(module, function).items():
        if place.gate is None:
            always += cost.weights
        elif place.ran:
            run[place.gate] += cost.weights
        else:
            skip[place.gate] += cost.weights
    return CostInfo(always, tuple(run), tuple(skip))


def guard_info(module: Module, shares: Mapping[str, float]) -> dict[str, Any] | None:
    """What speculating on a depth path costs, in bytes of weights per token; None without paths.

    The host tries the most frequent path p first: with the share s of tokens that take it, a token
    reads bytes(p) + (1 - s) · bytes(masked), against bytes(masked) without trying.

    Args:
        module: with functions `@path_0110` beside @prefill.
        shares: by path, the share of tokens that take it.
    """
    read = {
        name: sum(cost.weights for cost in costs(module, function).values())
        for name, function in module.functions.items()
    }
    ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return None
    first, share = ordered[0]
    masked = read["prefill"]
    guarded = read[f"path_{first}"] + (1 - share) * masked
    return {
        "paths": [{"path": p, "share": s, "bytes": read[f"path_{p}"]} for p, s in ordered],
        "masked_bytes": masked,
        "guarded_bytes": guarded,
        "miss_rate": 1 - share,
        "speculate": guarded < masked,
    }

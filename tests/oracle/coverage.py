"""Which values of which config fields a case really uses, and which the grid has to use."""

from __future__ import annotations

from typing import Any

from tests.oracle.grid import (
    GATED_FIELDS,
    MODEL_FIELDS,
    POLICIES,
    SCALES,
    SCOPES,
    TARGETS,
    Case,
)

CHOSEN: dict[str, tuple[Any, ...]] = {
    "kv_policy": POLICIES,
    "scope": SCOPES,
    "scale_target": TARGETS,
    "exec_scale": SCALES,
    "skip_path": ("identity", "adapter"),
}
"""Values of the gate's fields that span the grid."""

SIZES = ("moe_intermediate_size", "shared_intermediate_size", "num_zero_experts")
FACTORS = ("n_group", "topk_group", "routed_scaling_factor")

MOE_VALUES: dict[str, tuple[Any, ...]] = {
    "layers": ("all", "some"),
    **dict.fromkeys(SIZES, ("none", "given")),
    **dict.fromkeys(FACTORS, ("one", "other")),
    "score": ("softmax", "sigmoid", "identity"),
    "post": ("renorm", "none", "softmax_k", "sigmoid"),
    "renorm_eps": (0.0, 1e-20, 0.5),
    "router_bias": (False, True),
    "selection_bias": (False, True),
    "group_score": ("max", "top2sum"),
    "group_fill": ("neg_inf", "zero"),
    "apply": ("output", "input"),
    "shared_gate": ("none", "sigmoid"),
}
"""Values of the router's and experts' fields."""


def used_values(case: Case) -> set[tuple[str, Any]]:
    """The (field, value) pairs that change what this case computes (unused fields left out)."""
    gate, moe = case.gate, case.moe
    used: set[tuple[str, Any]] = {(name, case.config.get(name)) for name in MODEL_FIELDS}
    if gate["layers"]:
        names = {*GATED_FIELDS, *CHOSEN}
        if gate["router_type"] == "linear":
            names -= {"router_hidden_size", "router_norm", "router_act"}
        if gate["router_num_logits"] == 1:
            names -= {"router_exec_index"}
        if gate["exec_scale"] == "none":
            names -= {"exec_scale_alpha"}
        if gate["skip_path"] == "identity":
            names -= {"adapter_intermediate_size", "skip_scale"}
        used |= {(f"depth_gate.{name}", gate[name]) for name in names}
    if moe["num_experts"]:
        names = set(MOE_VALUES) - {"layers", *SIZES, *FACTORS}
        if moe["post"] != "renorm":
            names -= {"renorm_eps"}
        if moe["n_group"] == 1:
            names -= {"group_score", "group_fill"}
        if not moe["shared_intermediate_size"]:
            names -= {"shared_gate"}
        used |= {(f"moe.{name}", moe[name]) for name in names}
        used |= {("moe.layers", "all" if moe["layers"] == "all" else "some")}
        used |= {(f"moe.{name}", "given" if moe[name] else "none") for name in SIZES}
        used |= {(f"moe.{name}", "one" if moe[name] == 1 else "other") for name in FACTORS}
    return used


def required_values() -> set[tuple[str, Any]]:
    """The (field, value) pairs that some case has to use."""
    sections = {"": MODEL_FIELDS, "depth_gate.": {**GATED_FIELDS, **CHOSEN}, "moe.": MOE_VALUES}
    return {
        (f"{section}{name}", value)
        for section, fields in sections.items()
        for name, values in fields.items()
        for value in values
    }

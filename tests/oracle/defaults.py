"""Defaults of the config fields, copied from the table of model-spec 5.2."""

from __future__ import annotations

from typing import Any

DEPTH_GATE_DEFAULTS: dict[str, Any] = {
    "layers": [],
    "block_size": 1,
    "scope": "layer",
    "level": "token",
    "input": "post_norm",
    "router_type": "bottleneck",
    "router_hidden_size": None,
    "router_norm": True,
    "router_act": "tanh",
    "router_bias": False,
    "router_num_logits": 1,
    "router_exec_index": 1,
    "threshold": 0.5,
    "compare": "gt",
    "router_dtype": "float32",
    "decision": "router",
    "exec_scale": "none",
    "exec_scale_alpha": 1.0,
    "scale_target": "ffn",
    "skip_path": "identity",
    "adapter_intermediate_size": None,
    "skip_scale": "one",
    "kv_policy": "own",
    "reserved_initial_tokens": 0,
    "phases": "both",
}

MOE_DEFAULTS: dict[str, Any] = {
    "num_experts": 0,
    "num_experts_per_tok": 2,
    "layers": "all",
    "moe_intermediate_size": None,
    "score": "softmax",
    "post": "renorm",
    "renorm_eps": 0.0,
    "router_bias": False,
    "selection_bias": False,
    "n_group": 1,
    "topk_group": 1,
    "group_score": "max",
    "group_fill": "neg_inf",
    "routed_scaling_factor": 1.0,
    "apply": "output",
    "shared_intermediate_size": 0,
    "shared_gate": "none",
    "num_zero_experts": 0,
    "expert_bias": False,
    "expert_act": "silu_glu",
}

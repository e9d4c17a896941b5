"""A config is read whole or refused by name: no field and no value is ignored."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidc.errors import ConfigError
from liquidc.frontend.config import FIXED, LiquidConfig

BASE = {
    "model_type": "liquid",
    "liquid_version": 1,
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "depth_gate": {"layers": [1, 2]},
    "moe": {"num_experts": 4},
}
SECTIONS = ("attention", "depth_gate", "moe", "training")


def config(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`BASE` with fields changed, named as in messages: "moe.layers"."""
    data: dict[str, Any] = copy.deepcopy(BASE)
    for name, value in changes.items():
        *section, field = name.split(".")
        (data.setdefault(section[0], {}) if section else data)[field] = value
    return data


def refused(changes: Mapping[str, Any]) -> str:
    """The error of a config that must be refused."""
    with pytest.raises(ConfigError) as caught:
        LiquidConfig.from_dict(config(changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by the names of messages."""
    fields = {name: value for name, value in data.items() if name not in SECTIONS}
    for section in SECTIONS:
        fields |= {f"{section}.{name}": value for name, value in data[section].items()}
    return fields


FIELDS = flat(LiquidConfig.from_dict(BASE).to_dict())
INTEGERS = {
    "vocab_size": 0,
    "hidden_size": 0,
    "num_hidden_layers": 0,
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
    "head_dim": 0,
    "intermediate_size": 0,
    "max_position_embeddings": 0,
    "bos_token_id": -1,
    "eos_token_id": 16,
    "pad_token_id": 16,
    "depth_gate.router_hidden_size": 0,
    "depth_gate.router_num_logits": 3,
    "depth_gate.router_exec_index": 2,
    "depth_gate.adapter_intermediate_size": 0,
    "depth_gate.reserved_initial_tokens": -1,
    "moe.num_experts": -1,
    "moe.num_zero_experts": -1,
    "moe.num_experts_per_tok": 0,
    "moe.moe_intermediate_size": 0,
    "moe.n_group": 0,
    "moe.topk_group": 0,
    "moe.shared_intermediate_size": -1,
    "attention.sliding_window": 0,
    "attention.chunk_size": 0,
    "attention.temperature_floor": -1,
}
NUMBERS = {
    "rms_norm_eps": 0.0,
    "rope_theta": 0.0,
    "embedding_multiplier": math.inf,
    "residual_multiplier": math.nan,
    "logits_scaling": 0.0,
    "attention.temperature_scale": -1.0,
    "initializer_range": 0.0,
    "depth_gate.threshold": 1.0,
    "depth_gate.exec_scale_alpha": math.inf,
    "moe.renorm_eps": -0.1,
    "moe.routed_scaling_factor": -math.inf,
    "training.depth_target": 1.1,
    "training.depth_coef": -1.0,
    "training.router_aux_coef": -1.0,
    "training.router_z_coef": -1.0,
}
"""Fields by their kind, each with a value out of range; the rest are choices."""
BOOLEANS = [name for name, value in FIELDS.items() if type(value) is bool]
OPTIONAL = [
    "attention.output_bias",
    "attention.scale",
    "attention.clip_qkv",
    "attention.chunk_layers",
]
LISTS = ["depth_gate.layers", "moe.layers"]
INDICES = ["attention.sliding_layers", "attention.no_rope_layers"]
SINGLE = ["model_type", "liquid_version"]
CHOICES = [
    n
    for n in FIELDS
    if n
    not in (*INTEGERS, *NUMBERS, *BOOLEANS, *OPTIONAL, *LISTS, *INDICES, *SINGLE, "rope_scaling")
]
WRONG = {
    **{name: ["x", True, 1.5, [], 2**31, low] for name, low in INTEGERS.items()},
    **{name: ["x", True, None, [], math.nan, 10**400, low] for name, low in NUMBERS.items()},
    **{name: ["x", 0, 1, None, []] for name in BOOLEANS},
    **{name: ["x", 1, None, [True], [-1], [1.0], [2, 1], [1, 1], [4]] for name in LISTS},
    **{name: ["x", None, [True], [-1], [1.0], [2, 1], [1, 1]] for name in INDICES},
    **{name: ["x", [], {}] for name in OPTIONAL},
    **{name: ["x", True, None, [], {}] for name in CHOICES},
    **{name: ["x", True, None, 2] for name in SINGLE},
    **{name: ["x", {}, []] for name in FIXED},
    "depth_gate.level": ["sequence"],
    "depth_gate.decision": ["predictor"],
    "depth_gate.phases": ["decode", "prefill"],
    "depth_gate.block_size": [2, True],
    "attention.clip_qkv": ["x", True, 0.0, -1.0],
    "attention.chunk_layers": ["x", {}, [-1], [2, 1]],
    "rope_scaling": ["x", "linear(x)", "yarn(2.0)"],
    "torch_dtype": ["float8"],
}


def test_the_tables_cover_every_field() -> None:
    assert FIELDS.keys() <= WRONG.keys()
    assert all(type(FIELDS[name]) is str for name in CHOICES)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name: str) -> None:
    for value in WRONG[name]:
        message = refused({name: value})
        assert message.startswith(f"{name} "), message
        assert repr(value)[:80] in message, message


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "num_attention_heads is 3; it must be a divisor of hidden_size (8)": {"num_attention_heads": 3},
    "num_key_value_heads is 3; it must be a divisor of num_att": {"num_key_value_heads": 3},
    "head_dim is 3; it must be even": {"head_dim": 3},
    "dtype is 'float32'; it must be float16": {"dtype": "float32", "torch_dtype": "float16"},
    "rope_parameters must be a JSON object": {"rope_parameters": 3},
    "rope_parameters.rope_type is 'longrope'": {"rope_parameters": {"rope_type": "longrope"}},
    "rope_parameters.factor is not given": {"rope_parameters": {"rope_type": "yarn"}},
    "attention.sliding_layers is [1]; it must be all": {"attention.sliding_layers": [1]},
    "attention.sliding_layers is [4]; with num_hidden_layers 4": {
        "attention.sliding_layers": [4],
        "attention.sliding_window": 2,
    },
    "attention.no_rope_layers is [7]; with num_hidden_layers 4": {"attention.no_rope_layers": [7]},
    "attention.chunk_size is 3; it must be null": {
        "attention.sliding_window": 2,
        "attention.chunk_size": 3,
    },
    "attention.chunk_layers is [1]; it must be null without": {"attention.chunk_layers": [1]},
    "attention.chunk_layers is [7]; with num_hidden_layers 4": {
        "attention.chunk_size": 3,
        "attention.chunk_layers": [7],
    },
    "rope_scaling is {'type': 'linear', 'factor': 2}; it must be null beside rope_par": {
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {},
    },
    "rope_scaling.factor is 1e+300; it must be at most 2.14748e+06": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 1e300,
            "original_max_position_embeddings": 1000,
        }
    },
    "rope_theta is 5.0; it must be 6.0": {
        "rope_theta": 5.0,
        "rope_parameters": {"rope_theta": 6.0},
    },
    "depth_gate.layers is [1, 4]; with num_hidden_layers 4": {"depth_gate.layers": [1, 4]},
    "moe.layers is [7]; with num_hidden_layers 4": {"moe.layers": [7]},
    "moe.layers is []; it must be all, or one layer": {"moe.layers": []},
    "moe.layers is [1]; it must be all": {"moe.num_experts": 0, "moe.layers": [1]},
    "moe.shared_intermediate_size is 8; it must be 0": {
        "moe.num_experts": 0,
        "moe.shared_intermediate_size": 8,
    },
    "moe.num_zero_experts is 2; it must be 0 with num_experts 0": {
        "moe.num_experts": 0,
        "moe.num_zero_experts": 2,
    },
    "intermediate_size is None; it must be given": {"intermediate_size": None},
    "max_position_embeddings is 3; it must be at least depth_gate.reserved": {
        "max_position_embeddings": 3,
        "depth_gate.reserved_initial_tokens": 4,
    },
    "depth_gate.router_norm is True; it must be false with router_type linear": {
        "depth_gate.router_type": "linear",
        "depth_gate.router_norm": True,
    },
    "depth_gate.router_hidden_size is 2; it must be null with router_type linear": {
        "depth_gate.router_type": "linear",
        "depth_gate.router_hidden_size": 2,
    },
    "depth_gate.router_act is 'tanh'; it must be none with router_type linear": {
        "depth_gate.router_type": "linear",
        "depth_gate.router_act": "tanh",
    },
    "depth_gate.router_act is 'none'; it must be one of": {"depth_gate.router_act": "none"},
    "depth_gate.router_exec_index is 0; it must be 1": {"depth_gate.router_exec_index": 0},
    "depth_gate.exec_scale_alpha is 2.0; it must be 1.0": {"depth_gate.exec_scale_alpha": 2.0},
    "depth_gate.adapter_intermediate_size is 4; it must be null with skip_path identity": {
        "depth_gate.adapter_intermediate_size": 4
    },
    "depth_gate.skip_scale is 'one_minus_prob'; it must be one with skip_path identity": {
        "depth_gate.skip_scale": "one_minus_prob"
    },
    "depth_gate.skip_path is 'adapter'; it must be identity with scope attn": {
        "depth_gate.skip_path": "adapter",
        "depth_gate.scope": "attn",
    },
    "moe.num_experts_per_tok is 5; it must be at most num_experts": {"moe.num_experts_per_tok": 5},
    "moe.num_experts_per_tok is 7; it must be at most num_experts + num_zero_experts (6)": {
        "moe.num_experts_per_tok": 7,
        "moe.num_zero_experts": 2,
    },
    "moe.n_group is 3; it must be a divisor of num_experts": {"moe.n_group": 3},
    "moe.n_group is 4; it must be a divisor of num_experts + num_zero_experts (6)": {
        "moe.n_group": 4,
        "moe.num_zero_experts": 2,
    },
    "moe.topk_group is 2; it must be at most n_group": {"moe.topk_group": 2},
    "moe.topk_group is not given; it must be enough groups": {"moe.n_group": 4},
    "moe.group_score is 'top2sum'; it must be max": {
        "moe.n_group": 4,
        "moe.topk_group": 2,
        "moe.group_score": "top2sum",
    },
    "moe.renorm_eps is 0.1; it must be 0.0": {"moe.renorm_eps": 0.1, "moe.post": "none"},
    "moe.shared_gate is 'sigmoid'; it must be none": {"moe.shared_gate": "sigmoid"},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_named(message: str) -> None:
    assert refused(CONTRADICTIONS[message]).startswith(message)


@pytest.mark.parametrize("section", ["", "depth_gate.", "moe.", "training."])
def test_unknown_fields_are_named(section: str) -> None:
    message = refused({f"{section}depth_gates": 1})
    assert message.startswith(f"unknown field {section}depth_gates; known here: ")


@pytest.mark.parametrize("name", [n for n in BASE if n not in ("liquid_version", *SECTIONS)])
def test_missing_fields_are_named(name: str) -> None:
    data = config({"intermediate_size": None, "moe.num_experts": 0})
    del data[name]
    with pytest.raises(ConfigError, match=f"^{name} is not given; it must be given"):
        LiquidConfig.from_dict(data)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_objects(section: str) -> None:
    assert refused({section: [1]}) == f"{section} must be a JSON object"


ROUND_TRIPS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "eos_token_id": [1, 2], "pad_token_id": 0, "qk_norm": "head"},
    {"depth_gate.router_type": "linear", "depth_gate.router_num_logits": 2},
    {"depth_gate.skip_path": "adapter", "depth_gate.skip_scale": "one_minus_prob"},
    {"depth_gate.exec_scale": "logit", "depth_gate.exec_scale_alpha": 0.1},
    {"moe.layers": [0, 3], "moe.n_group": 2, "moe.topk_group": 2, "moe.score": "sigmoid"},
    {
        "moe.num_zero_experts": 2,
        "moe.num_experts_per_tok": 5,
        "moe.n_group": 3,
        "moe.topk_group": 3,
    },
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 1.0}},
    {"attention_dropout": 0, "rms_norm_eps": 1, "attention.clip_qkv": 8.0},
    {"attention.chunk_size": 4, "attention.chunk_layers": [1, 3]},
    {"depth_gate.layers": [], "moe.num_experts": 0},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
def test_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    read = LiquidConfig.from_dict(config(changes))
    (tmp_path / "config.json").write_text(json.dumps(read.to_dict()))
    assert LiquidConfig.from_file(tmp_path) == read
    given = {n: v for n, v in flat(read.to_dict()).items() if n in changes}
    assert given == {n: changes[n] for n in given}


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.sampled_from([*CHOICES, "all", "drop", "linear", "adapter", "bfloat16"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, *FIXED]), VALUES, max_size=3))
def test_any_values(changes: dict[str, Any]) -> None:
    """Whatever the values, a config is refused by our error or survives its round trip."""
    try:
        read = LiquidConfig.from_dict(config(changes))
    except ConfigError:
        return
    assert LiquidConfig.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"model_type": "llama"}', "model_type is 'llama'; it must be 'liquid'"),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {message}')}"):
        LiquidConfig.from_file(path)

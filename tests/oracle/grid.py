"""Small random models that between them use every value of every field of the semantics.

`grid()` has one gated model for every cache policy x scope x scale target (36), in which the other
fields alternate, and a few without gates. `edge_cases()` are models whose decisions are exact ties
or that never run. Configs and weights are functions of the case's name and seed alone. Whatever
computes a model (PyTorch, interpreter, engine) is compared on `case.batches()` with
`tests.oracle.reference`.

The tests of the oracle assert the coverage, that both decisions occur in every gated model, and
that every decision has a margin far above the rounding of float32 (or is an exact tie).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors

from tests.oracle.defaults import DEPTH_GATE_DEFAULTS, MOE_DEFAULTS
from tests.oracle.liquid_numpy import Oracle
from tests.oracle.tensors import draw

VOCAB = 61

POLICIES = ("own", "drop", "inherit")
SCOPES = ("layer", "attn", "ffn", "attn_ffn")
TARGETS = ("ffn", "both", "delta")
SCALES = ("none", "prob", "logit")

GATED_FIELDS: dict[str, tuple[Any, ...]] = {
    "input": ("post_norm", "residual"),
    "router_type": ("bottleneck", "linear", "mlp"),
    "router_hidden_size": (None, 6, 9),
    "router_norm": (True, False),
    "router_act": ("tanh", "silu", "relu"),
    "router_bias": (False, True),
    "router_num_logits": (1, 2),
    "router_exec_index": (1, 0),
    "router_dtype": ("float32", "model"),
    "threshold": (0.5, 0.40625, 0.59375),
    "compare": ("gt", "ge"),
    "exec_scale_alpha": (1.0, 0.5, -0.75),
    "adapter_intermediate_size": (None, 12),
    "skip_scale": ("one", "one_minus_prob"),
    "reserved_initial_tokens": (0, 1, 3),
}
"""Values of the gate's fields that alternate over the grid."""

MODEL_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (4, 5),
    "num_key_value_heads": (2, 1, 4),
    "head_dim": (None, 16, 12),
    "rms_norm_eps": (1e-6, 1e-3),
    "rope_theta": (10000.0, 100.0),
    "tie_word_embeddings": (False, True),
    "attention_bias": (False, True),
    "qk_norm": ("none", "head", "full"),
}
"""Values of the Llama part's fields that alternate over the grid."""

EXPERTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixtral": {"num_experts": 6, "layers": "all"},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "post": "none"},
    "qwen2": {
        "num_experts": 5,
        "post": "none",
        "moe_intermediate_size": 20,
        "shared_intermediate_size": 40,
        "shared_gate": "sigmoid",
        "layers": [0, 2, 3],
    },
    "granite": {
        "num_experts": 4,
        "score": "identity",
        "post": "softmax_k",
        "shared_intermediate_size": 24,
    },
    "gpt_oss": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "score": "identity",
        "post": "softmax_k",
        "router_bias": True,
    },
    "llama4": {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "score": "identity",
        "post": "sigmoid",
        "apply": "input",
        "shared_intermediate_size": 48,
        "layers": [1, 3],
    },
    "deepseek_v2": {
        "num_experts": 8,
        "post": "none",
        "n_group": 4,
        "topk_group": 2,
        "group_fill": "zero",
        "routed_scaling_factor": 2.5,
        "shared_intermediate_size": 40,
        "layers": [1, 2, 3],
        "moe_intermediate_size": 12,
    },
    "deepseek_v3": {
        "num_experts": 9,
        "num_experts_per_tok": 4,
        "score": "sigmoid",
        "renorm_eps": 1e-20,
        "selection_bias": True,
        "n_group": 3,
        "topk_group": 2,
        "group_score": "top2sum",
        "routed_scaling_factor": 1.5,
        "shared_intermediate_size": 16,
    },
    "glm": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "score": "sigmoid",
        "selection_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2sum",
        "group_fill": "zero",
        "layers": [0, 1, 2],
    },
    "sigmoid_sum": {
        "num_experts": 5,
        "num_zero_experts": 2,
        "num_experts_per_tok": 3,
        "score": "sigmoid",
        "renorm_eps": 0.5,
        "apply": "input",
        "router_bias": True,
        "selection_bias": True,
    },
    "longcat": {
        "num_experts": 4,
        "num_zero_experts": 4,
        "num_experts_per_tok": 3,
        "post": "none",
        "selection_bias": True,
        "routed_scaling_factor": 6.0,
        "moe_intermediate_size": 20,
        "layers": [0, 2, 3],
    },
}
"""Feed-forwards: the router families of the generic router, each with something of its own."""
UNGATED = ("dense", "mixtral", "llama4", "deepseek_v2", "glm", "qwen2", "longcat")
"""Families of the models without gates; the last one is theirs alone."""

RESEEDED = {
    3: 4103,
    9: 1109,
    10: 1110,
    11: 13111,
    14: 1114,
    16: 5116,
    17: 1117,
    18: 5118,
    22: 5122,
    27: 1127,
    28: 1128,
}
"""Seeds of the points whose first one brought a close decision or an ill-conditioned model."""


@dataclass(frozen=True)
class Batch:
    """A ragged batch (right padding) with the controls of one forward.

    Attributes:
        name: What it is for.
        prompts: Token ids, one tuple per row.
        gate_force: Per gate [G] -1, 0 or 1; None leaves every decision to the router.
        gate_bias: Per row, added to the scores for the decision.
        min_depth: Per row, lowest number of executed layers.
        position_start: Per row, position of the first token.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    gate_force: tuple[int, ...] | None = None
    gate_bias: tuple[float, ...] | None = None
    min_depth: tuple[int, ...] | None = None
    position_start: tuple[int, ...] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row, i64[B]."""
        return np.array([len(prompt) for prompt in self.prompts], np.int64)

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """Tokens i64[B, T], padded on the right with token 0."""
        ids = np.zeros((len(self.prompts), max(map(len, self.prompts))), np.int64)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return ids

    @property
    def starts(self) -> NDArray[np.int64]:
        """Position of the first token of each row, i64[B]."""
        return np.array(self.position_start or [0] * len(self.prompts), np.int64)

    def chunks(self, size: int) -> list[Batch]:
        """The batch in pieces of `size` tokens, to be fed one after the other to one cache.

        A row whose prompt has ended has no token in the later pieces.
        """
        longest = max(map(len, self.prompts))
        return [
            replace(
                self,
                prompts=tuple(prompt[at : at + size] for prompt in self.prompts),
                position_start=tuple(int(start) + at for start in self.starts),
            )
            for at in range(0, longest, size)
        ]


@dataclass(frozen=True)
class Case:
    """One small model: `config` is the content of config.json; `zero` names weights (glob) at 0."""

    name: str
    config: dict[str, Any]
    seed: int
    zero: tuple[str, ...] = ()

    @property
    def gate(self) -> dict[str, Any]:
        """The depth_gate section with its defaults."""
        return {**DEPTH_GATE_DEFAULTS, **self.config.get("depth_gate", {})}

    @property
    def moe(self) -> dict[str, Any]:
        """The moe section with its defaults."""
        return {**MOE_DEFAULTS, **self.config.get("moe", {})}

    @property
    def num_gates(self) -> int:
        """G."""
        return len(self.gate["layers"]) * (2 if self.gate["scope"] == "attn_ffn" else 1)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Random float32 weights under their native names."""
        return draw(self.config, self.seed, self.zero)

    def save(self, directory: Path) -> Path:
        """Write config.json and model.safetensors; returns the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        writer: Any = safetensors
        writer.save_file(self.weights(), directory / "model.safetensors")
        return directory

    def oracle(self) -> Oracle:
        """The float64 model."""
        return Oracle(self.config, self.weights())

    def batches(self) -> list[Batch]:
        """Ragged prompts without and with every control (gate controls only in gated models)."""
        chance = random.Random(self.seed)

        def prompts(*lengths: int) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(chance.randrange(VOCAB) for _ in range(n)) for n in lengths)

        gates, layers = self.num_gates, self.config["num_hidden_layers"]
        batches = [
            Batch("plain", prompts(10)),
            Batch("ragged", prompts(7, 1, 9, 4)),
            Batch("offset", prompts(3, 5), position_start=(17, 2)),
        ]
        if gates:
            mixed = tuple(chance.choice((-1, 0, 1)) for _ in range(gates))
            batches += [
                Batch("bias", prompts(5, 6, 4), gate_bias=(0.75, -0.75, 0.0)),
                Batch("floor", prompts(4, 4, 4, 4), min_depth=(layers, layers - 1, 3, 1)),
                Batch("run", prompts(4, 2), gate_force=(1,) * gates),
                Batch("skip", prompts(4, 2), gate_force=(-1,) * gates),
                Batch("mixed", prompts(5, 3), mixed, (-0.5, 1.0), (1, layers - 1), (1, 0)),
            ]
        return batches


def grid() -> list[Case]:
    """The 36 gated models and seven without gates, in a fixed order with fixed seeds.

    The scale, the skip path and the place of the gates follow Latin squares, so that every pair
    of policy and scope, and of scope and target, meets each of them.
    """
    points = list(itertools.product(range(3), range(4), range(3)))
    fields = {
        name: _alternate(f"gate.{name}", values, len(points))
        for name, values in GATED_FIELDS.items()
    }
    models = {name: _alternate(name, values, len(points)) for name, values in MODEL_FIELDS.items()}
    families = tuple(name for name in EXPERTS if name != UNGATED[-1])
    experts = _alternate("experts", families, len(points))
    cases: list[Case] = []
    for i, (policy, scope, target) in enumerate(points):
        model = _model({name: values[i] for name, values in models.items()})
        last: int = model["num_hidden_layers"] - 1
        places = ([*range(1, last)], [0, *range(2, last + 1)], [*range(last + 1)])
        gate = {
            "layers": places[(policy + 2 * scope + target) % 3],
            "kv_policy": POLICIES[policy],
            "scope": SCOPES[scope],
            "scale_target": TARGETS[target],
            "exec_scale": SCALES[(policy + scope + target) % 3],
            "skip_path": "identity" if (2 * policy + scope + target) % 3 == 0 else "adapter",
            **{name: values[i] for name, values in fields.items()},
        }
        name = f"{POLICIES[policy]}-{SCOPES[scope]}-{TARGETS[target]}-{experts[i]}"
        config = {**model, "depth_gate": _consistent(gate), "moe": EXPERTS[experts[i]]}
        cases.append(Case(name, config, RESEEDED.get(i, 100 + i)))
    for i, family in enumerate(UNGATED):
        model = _model({name: values[i] for name, values in models.items()})
        cases.append(Case(f"ungated-{family}", {**model, "moe": EXPERTS[family]}, 200 + i))
    return cases


def edge_cases() -> list[Case]:
    """Models at the edges: exact ties at the threshold and between experts, never run, one layer.

    A zero router scores 0, so p is exactly 0.5 in every precision: `gt` skips, `ge` runs. A zero
    expert router ties all experts: the lowest indices win.
    """
    base = _model({name: values[0] for name, values in MODEL_FIELDS.items()})
    layers = list(range(base["num_hidden_layers"]))
    cases: list[Case] = []
    for i, (policy, compare) in enumerate(
        itertools.product(("own", "drop", "inherit"), ("gt", "ge"))
    ):
        gate = {"layers": layers, "kv_policy": policy, "compare": compare, "router_type": "linear"}
        config = {**base, "depth_gate": _consistent(gate), "moe": EXPERTS["mixtral"]}
        zero = ("*.depth_gate.*", "*.mlp.gate.*")
        cases.append(Case(f"tie-{policy}-{compare}", config, 300 + i, zero))
    one = {**base, "num_hidden_layers": 1, "depth_gate": {"layers": [0], "kv_policy": "drop"}}
    cases.append(Case("one-layer", one, 310))
    return cases


def _alternate(name: str, values: tuple[Any, ...], count: int) -> list[Any]:
    """`count` values, each as often as the others, in an order drawn from the name."""
    order = [values[i % len(values)] for i in range(count)]
    random.Random(name).shuffle(order)
    return order


def _model(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama part of a config."""
    return {
        "model_type": "liquid",
        "liquid_version": 1,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **chosen,
    }


def _consistent(gate: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that the others make meaningless, as a config must."""
    gate = dict(gate)
    if gate["router_type"] == "linear":
        for name in ("router_hidden_size", "router_norm", "router_act"):
            gate.pop(name, None)
    if gate.get("router_act") == "relu":
        gate["router_bias"] = True  # without a bias, a layer of dead units scores exactly 0
    if gate.get("router_num_logits", 1) == 1:
        gate.pop("router_exec_index", None)
    if gate.get("exec_scale", "none") == "none":
        gate.pop("exec_scale_alpha", None)
    if gate.get("scope") == "attn":
        gate.pop("skip_path", None)
    if gate.get("skip_path", "identity") == "identity":
        gate.pop("adapter_intermediate_size", None)
        gate.pop("skip_scale", None)
    return gate

"""The layer equations of the Liquid Transformer in float64 numpy, one token at a time.

A second implementation, written from the equations alone: it shares no code with the package,
holds no batch, no mask and no padding, and its caches are Python lists. What runs for a token is
an `if`. Everything that computes the same model (the PyTorch reference, the IR interpreter, the
engines) is compared with it.

The order of a token through a gated layer, with N1 and N2 the two norms:

    u = N1(x) or x;  s = Router(u);  p = sigmoid(s);  m = [sigmoid(s + bias) > tau]
    h = x + m_a * a                    a = Attn(N1(x))        (alpha * a under scale_target "both")
    y = h + m_f * alpha * F(N2(h)) + (1 - m_f) * beta * P(N2(h))
    y = x + m_a * alpha_a * a + m_f * alpha_f * F(N2(h)) + (1 - m_f) * beta_f * P(N2(h))   "delta"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle.defaults import DEPTH_GATE_DEFAULTS, MOE_DEFAULTS

Array = NDArray[np.float64]
Vector = Callable[[Array], Array]


def sigmoid(x: Array | float) -> Any:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def silu(x: Array) -> Array:
    """X * sigmoid(x)."""
    return x * sigmoid(x)


def softmax(x: Array) -> Array:
    """Softmax of one vector."""
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x: Array, position: int, theta: float) -> Array:
    """Rotate the halves of every head: x [heads, hd]."""
    half = x.shape[-1] // 2
    exponents = np.array([-2.0 * i / x.shape[-1] for i in range(half)])
    angle = position * theta**exponents
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )


ROUTER_ACTIVATIONS: dict[str, Vector] = {
    "tanh": np.tanh,
    "silu": silu,
    "relu": lambda x: np.maximum(x, 0.0),
}
SCORES: dict[str, Vector] = {"softmax": softmax, "sigmoid": sigmoid, "identity": lambda z: z}


def top(scores: Sequence[float], k: int) -> tuple[list[int], float]:
    """The k best indices in falling order, the lowest index first among equals.

    Returns:
        The indices, and the smallest gap between neighbours of the first k + 1 scores: a
        perturbation below half of it changes neither the choice nor its order. Exact ties, which
        are made and not met (filled groups, a zero router), don't count.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ranked = [scores[i] for i in order[: k + 1] if scores[i] > -math.inf]
    gaps = [a - b for a, b in pairwise(ranked) if a > b]
    return order[:k], min(gaps, default=math.inf)


def route(
    logits: Array, moe: Mapping[str, Any], selection_bias: Array | None
) -> tuple[list[int], list[float], float]:
    """The generic expert router: one token's logits [E] -> k experts, their weights, the margin."""
    score = SCORES[moe["score"]](logits)
    selection = score if selection_bias is None else score + selection_bias
    margin = math.inf
    if moe["n_group"] > 1:
        groups = selection.reshape(moe["n_group"], -1)
        best = [sorted(group, reverse=True) for group in groups]
        group_score = {
            "max": [float(group[0]) for group in best],
            "top2sum": [float(sum(group[:2])) for group in best],
        }[moe["group_score"]]
        kept, margin = top(group_score, moe["topk_group"])
        fill = {"zero": 0.0, "neg_inf": -math.inf}[moe["group_fill"]]
        selection = np.concatenate(
            [group if g in kept else np.full_like(group, fill) for g, group in enumerate(groups)]
        )
    experts, gap = top([float(value) for value in selection], moe["num_experts_per_tok"])
    chosen = score[experts]
    posts: dict[str, Vector] = {
        "none": lambda w: w,
        "renorm": lambda w: w / (w.sum() + moe["renorm_eps"]),
        "softmax_k": softmax,
        "sigmoid": sigmoid,
    }
    weights = posts[moe["post"]](chosen) * moe["routed_scaling_factor"]
    return experts, [float(w) for w in weights], min(margin, gap)


@dataclass(frozen=True)
class Gate:
    """One gate's decision for one token, with the factors that its layer applies."""

    run: bool
    p: float
    score: float
    margin: float
    alpha: float
    beta: float


@dataclass(frozen=True)
class TokenResult:
    """What one token gave.

    Attributes:
        logits: Next-token logits [V].
        gates: Final decision of every gate [G], in layer order (attention before feed-forward).
        gate_p: Unbiased sigmoid(score) [G].
        gate_score: Router score s [G].
        experts: Chosen experts per layer [L][k]; -1 where the feed-forward did not run or the
            layer has no experts. Empty lists when the model has none.
        gate_margin: |sigmoid(s + bias) - tau| per gate [G]; inf where the router did not decide.
        expert_margin: Smallest gap between neighbouring selection scores (of groups too) per
            layer [L]; inf where nothing was chosen.
    """

    logits: Array
    gates: list[bool]
    gate_p: list[float]
    gate_score: list[float]
    experts: list[list[int]]
    gate_margin: list[float]
    expert_margin: list[float]


class Oracle:
    """A liquid model: the dictionary of config.json and float64 weights under native names."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
        self.config = config
        self.gate: dict[str, Any] = {**DEPTH_GATE_DEFAULTS, **config.get("depth_gate", {})}
        self.moe: dict[str, Any] = {**MOE_DEFAULTS, **config.get("moe", {})}
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.num_layers: int = config["num_hidden_layers"]
        self.eps: float = config["rms_norm_eps"]
        names = {"attn_ffn": ["depth_gate", "depth_gate_ffn"]}.get(
            self.gate["scope"], ["depth_gate"]
        )
        self.gate_names = [(i, name) for i in sorted(self.gate["layers"]) for name in names]

    def sequence(self, position_start: int = 0) -> LiquidSequence:
        """An empty sequence whose first token stands at `position_start`."""
        return LiquidSequence(self, position_start)

    def linear(self, name: str, x: Array, bias: bool = False) -> Array:
        """W x (+ b)."""
        y: Array = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if bias else y

    def norm(self, name: str, x: Array) -> Array:
        """RMS norm with the weight of that name."""
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def swiglu(self, name: str, x: Array) -> Array:
        """down(silu(gate x) * up x)."""
        gate, up = (self.linear(f"{name}.{part}_proj", x) for part in ("gate", "up"))
        return self.linear(f"{name}.down_proj", silu(gate) * up)

    def router_score(self, name: str, u: Array) -> float:
        """The score s of the gate of that name."""
        gate, bias = self.gate, self.gate["router_bias"]
        z = self.linear(f"{name}.proj1", u, bias)
        if gate["router_type"] != "linear":
            if gate["router_norm"]:
                z = self.norm(f"{name}.norm", z)
            z = self.linear(f"{name}.proj2", ROUTER_ACTIVATIONS[gate["router_act"]](z), bias)
        if gate["router_num_logits"] == 1:
            return float(z[0])
        execute = gate["router_exec_index"]
        return float(z[execute] - z[1 - execute])

    def project(self, layer: int, part: str, heads: int, n: Array) -> Array:
        """One of q, k, v as [heads, hd], normalised as qk_norm says, not yet rotated."""
        name = f"model.layers.{layer}.self_attn.{part}"
        x = self.linear(f"{name}_proj", n, self.config.get("attention_bias", False))
        qk_norm = "none" if part == "v" else self.config.get("qk_norm", "none")
        if qk_norm == "full":
            x = self.norm(f"{name}_norm", x)
        x = x.reshape(heads, self.head_dim)
        return self.norm(f"{name}_norm", x) if qk_norm == "head" else x

    def feed_forward(self, layer: int, z: Array) -> tuple[Array, list[int], float]:
        """F(z): dense or routed. Returns F, the experts, their margin."""
        name = f"model.layers.{layer}.mlp"
        moe = self.moe
        sparse = moe["layers"] == "all" or layer in moe["layers"]
        if not moe["num_experts"] or not sparse:
            return self.swiglu(name, z), [-1] * moe["num_experts_per_tok"], math.inf
        logits = self.linear(f"{name}.gate", z, moe["router_bias"])
        selection_bias = (
            self.weights[f"{name}.gate.e_score_correction_bias"] if moe["selection_bias"] else None
        )
        experts, weights, margin = route(logits, moe, selection_bias)
        y = np.zeros_like(z)
        for expert, weight in zip(experts, weights, strict=True):
            if expert >= moe["num_experts"]:
                y = y + weight * z
                continue
            before, after = (weight, 1.0) if moe["apply"] == "input" else (1.0, weight)
            gate, up = np.split(
                self.weights[f"{name}.experts.gate_up_proj"][expert] @ (before * z), 2
            )
            down = self.weights[f"{name}.experts.down_proj"][expert]
            y = y + after * (down @ (silu(gate) * up))
        if moe["shared_intermediate_size"]:
            shared = self.swiglu(f"{name}.shared_expert", z)
            if moe["shared_gate"] == "sigmoid":
                shared = shared * sigmoid(self.linear(f"{name}.shared_expert_gate", z))
            y = y + shared
        return y, experts, margin


class LiquidSequence:
    """One sequence: `keys[layer]` and `values[layer]` are lists of [KV, hd] arrays."""

    def __init__(self, oracle: Oracle, position_start: int = 0) -> None:
        self.oracle = oracle
        self.position = position_start
        self.keys: list[list[Array]] = [[] for _ in range(oracle.num_layers)]
        self.values: list[list[Array]] = [[] for _ in range(oracle.num_layers)]

    def decide(self, name: str, u: Array, force: int, bias: float, floor: bool) -> Gate:
        """Decide one gate for the token at the current position; the strongest word is last."""
        gate, tau = self.oracle.gate, self.oracle.gate["threshold"]
        s = self.oracle.router_score(name, u)
        p = float(sigmoid(s))
        decision = float(sigmoid(s + bias))
        run = decision > tau if gate["compare"] == "gt" else decision >= tau
        margin = abs(decision - tau)
        if floor or self.position < gate["reserved_initial_tokens"]:
            run, margin = True, math.inf
        if force:
            run, margin = force > 0, math.inf
        c = gate["exec_scale_alpha"]
        alpha = {"none": 1.0, "prob": p * c, "logit": s * c}[gate["exec_scale"]]
        beta = {"one": 1.0, "one_minus_prob": 1.0 - p}[gate["skip_scale"]]
        return Gate(run, p, s, margin, alpha, beta)

    def attend(self, layer: int, q: Array) -> Array:
        """Attention of one token's q [H, hd] over everything in this layer's cache: [H * hd]."""
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        group = self.oracle.heads // self.oracle.kv_heads
        rows: list[Array] = []
        for head, query in enumerate(q):
            logits = keys[:, head // group] @ query / math.sqrt(self.oracle.head_dim)
            rows.append(softmax(logits) @ values[:, head // group])
        return np.concatenate(rows)

    def step(
        self,
        token_id: int,
        *,
        gate_force: Sequence[int] | None = None,
        gate_bias: float = 0.0,
        min_depth: int = 0,
    ) -> TokenResult:
        """Append one token.

        Args:
            token_id: The token.
            gate_force: Per gate [G]: -1 skip, 0 the router decides, 1 run.
            gate_bias: Added to every score for the decision alone.
            min_depth: Lowest number of layers to execute, ungated ones included.
        """
        oracle, gate = self.oracle, self.oracle.gate
        given = [0] * len(oracle.gate_names) if gate_force is None else gate_force
        forces = dict(zip(oracle.gate_names, given, strict=True))
        unit = Gate(True, 1.0, math.inf, math.inf, 1.0, 1.0)
        gates: list[Gate] = []
        experts: list[list[int]] = []
        expert_margin: list[float] = []
        executed = 0
        below: tuple[Array, Array] | None = None
        x = oracle.weights["model.embed_tokens.weight"][token_id]
        for layer in range(oracle.num_layers):
            name = f"model.layers.{layer}"
            n = oracle.norm(f"{name}.input_layernorm", x)

            # The gates, from what enters the layer.
            u = n if gate["input"] == "post_norm" else x
            floor = oracle.num_layers - layer <= min_depth - executed
            own = [
                self.decide(f"{name}.{g}", u, forces[i, g], gate_bias, floor)
                for i, g in oracle.gate_names
                if i == layer
            ]
            gates += own
            executed += all(g.run for g in own)
            first, last = (own[0], own[-1]) if own else (unit, unit)
            m_a = first.run or gate["scope"] == "ffn"
            m_f = last.run or gate["scope"] == "attn"

            # Keys and values, rotated at the original position.
            theta = oracle.config["rope_theta"]
            k = rope(oracle.project(layer, "k", oracle.kv_heads, n), self.position, theta)
            v = oracle.project(layer, "v", oracle.kv_heads, n)
            if gate["kv_policy"] == "inherit" and not m_a and below is not None:
                k, v = below
            below = k, v
            if m_a or gate["kv_policy"] != "drop":
                self.keys[layer].append(k)
                self.values[layer].append(v)

            # Attention of an executed token.
            a = np.zeros_like(x)
            if m_a:
                q = rope(oracle.project(layer, "q", oracle.heads, n), self.position, theta)
                bias = oracle.config.get("attention_bias", False)
                a = oracle.linear(f"{name}.self_attn.o_proj", self.attend(layer, q), bias)
            scaled = first.alpha * a
            h = x + (scaled if gate["scale_target"] == "both" else a)

            # Feed-forward of an executed token, skip path of a skipped one.
            z = oracle.norm(f"{name}.post_attention_layernorm", h)
            chosen, margin = [-1] * oracle.moe["num_experts_per_tok"], math.inf
            f = np.zeros_like(x)
            if m_f:
                f, chosen, margin = oracle.feed_forward(layer, z)
                f = last.alpha * f
            elif gate["skip_path"] == "adapter":
                f = last.beta * oracle.swiglu(f"{name}.depth_adapter", z)
            x = (x + scaled if gate["scale_target"] == "delta" else h) + f
            experts.append(chosen if oracle.moe["num_experts"] else [])
            expert_margin.append(margin)

        self.position += 1
        head = "model.embed_tokens" if oracle.config["tie_word_embeddings"] else "lm_head"
        return TokenResult(
            logits=oracle.linear(head, oracle.norm("model.norm", x)),
            gates=[g.run for g in gates],
            gate_p=[g.p for g in gates],
            gate_score=[g.score for g in gates],
            experts=experts,
            gate_margin=[g.margin for g in gates],
            expert_margin=expert_margin,
        )

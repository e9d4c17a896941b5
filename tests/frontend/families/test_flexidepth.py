"""FlexiDepth against its equations, written down once more in float64 numpy.

    n = N1(x);  w = sigmoid(head · dec · tanh(RMSNorm(enc · n)));  m = w > 0.5
    h = x + m · Attn(n), where keys and values are made of all tokens
    y = h + m · w · MLP(N2 h) + (1 - m) · (1 - w) · Adapter(N2 h)

With the gate mode "ste_hard" neither branch is scaled. In the adapter's names up and down are
exchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import liquidc
from liquidc.errors import ConfigError
from liquidc.frontend.families import open_model
from liquidc.frontend.model import LiquidForCausalLM
from tests.frontend.families.cases import SMALL

Array = NDArray[np.float64]
GATED, FACTOR = (1, 2), 4
CONFIG = {
    **SMALL,
    "model_type": "ddllama",
    "auto_map": {"AutoModelForCausalLM": "modeling_ddllama.DDLlamaForCausalLM"},
    "routing_layers": list(GATED),
    "router_reduction_factor": FACTOR,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "head_dim": 8,
}
IDS = np.random.default_rng(5).integers(0, 97, 24)


def tensors(qk_norm: bool) -> dict[str, torch.Tensor]:
    """Random weights by the names of the release."""
    numbers = torch.Generator().manual_seed(3)
    hidden, width, heads, kv, size = 32, 48, 4, 2, 8
    small, adapter = hidden // FACTOR, width // FACTOR
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (97, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (97, hidden),
    }
    for i in range(3):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * size, hidden),
            p + "self_attn.k_proj.weight": (kv * size, hidden),
            p + "self_attn.v_proj.weight": (kv * size, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * size),
            p + "mlp.gate_proj.weight": (width, hidden),
            p + "mlp.up_proj.weight": (width, hidden),
            p + "mlp.down_proj.weight": (hidden, width),
        }
        if qk_norm:
            shapes |= {p + f"self_attn.{x}_norm.weight": (size,) for x in "qk"}
        if i in GATED:
            shapes |= {
                p + "router.router_enc.weight": (small, hidden),
                p + "router.router_norm.weight": (small,),
                p + "router.router_dec.weight": (hidden, small),
                p + "router.router_head.weight": (1, hidden),
                p + "router_proj.gate_proj.weight": (adapter, hidden),
                p + "router_proj.down_proj.weight": (adapter, hidden),
                p + "router_proj.up_proj.weight": (hidden, adapter),
            }
    made = {n: 0.3 * torch.randn(shape, generator=numbers) for n, shape in shapes.items()}
    return {n: 1 + t / 3 if "norm" in n else t for n, t in made.items()}


def norm(x: Array, weight: Array) -> Array:
    """RMSNorm over the last dimension."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rotate(x: Array) -> Array:
    """Half rotation of x [T, H, hd] at positions 0, 1, …"""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def attention(w: dict[str, Array], p: str, n: Array) -> Array:
    """Causal attention of n [T, D] with 4 query and 2 key/value heads of 8."""
    q, k, v = (
        (n @ w[f"{p}self_attn.{x}_proj.weight"].T).reshape(len(n), -1, 8) for x in ("q", "k", "v")
    )
    if f"{p}self_attn.q_norm.weight" in w:
        q, k = norm(q, w[f"{p}self_attn.q_norm.weight"]), norm(k, w[f"{p}self_attn.k_norm.weight"])
    q, k = rotate(q), np.repeat(rotate(k), 2, 1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(8)
    scores = np.where(np.tri(len(n), dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", share, np.repeat(v, 2, 1)).reshape(len(n), -1)
    return mixed @ w[f"{p}self_attn.o_proj.weight"].T


def glu(gate: Array, up: Array, down: Array, x: Array) -> Array:
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def expected(w: dict[str, Array], hard: bool) -> tuple[Array, Array]:
    """Logits [T, V] and masks [2, T]."""
    x, masks = w["model.embed_tokens.weight"][IDS], []
    for i in range(3):
        p = f"model.layers.{i}."
        n = norm(x, w[p + "input_layernorm.weight"])
        chosen, run, skip = np.ones(len(x), bool), np.ones(len(x)), np.zeros(len(x))
        if i in GATED:
            z = norm(n @ w[p + "router.router_enc.weight"].T, w[p + "router.router_norm.weight"])
            z = np.tanh(z) @ w[p + "router.router_dec.weight"].T
            share = sigmoid(z @ w[p + "router.router_head.weight"].T)[:, 0]
            chosen = share > 0.5
            masks.append(chosen)
            run, skip = (np.ones(len(x)),) * 2 if hard else (share, 1 - share)
        h = x + chosen[:, None] * attention(w, p, n)
        n2 = norm(h, w[p + "post_attention_layernorm.weight"])
        full = glu(*(w[f"{p}mlp.{k}_proj.weight"] for k in ("gate", "up", "down")), n2)
        y = h + (chosen * run)[:, None] * full
        if i in GATED:
            cheap = glu(*(w[f"{p}router_proj.{k}_proj.weight"] for k in ("gate", "down", "up")), n2)
            y = y + (~chosen * skip)[:, None] * cheap
        x = y
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T, np.array(masks)


def write(directory: Path, qk_norm: bool = False, **changes: Any) -> dict[str, Array]:
    """The checkpoint; its weights in float64."""
    directory.mkdir(exist_ok=True)
    made = tensors(qk_norm)
    save_file(made, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return {name: tensor.double().numpy() for name, tensor in made.items()}


@pytest.mark.parametrize("form", ["ddllama", "ddqwen3"])
def test_the_equations(form: str, tmp_path: Path) -> None:
    hard = form == "ddqwen3"
    changes = {"router_gate_mode": "ste_hard"} if hard else {}
    weights = write(tmp_path / "model", qk_norm=hard, model_type=form, **changes)
    want, masks = expected(weights, hard)
    assert 0.2 < masks.mean() < 0.8
    model = LiquidForCausalLM.from_directory(tmp_path / "model").eval()
    with torch.no_grad():
        out = model(torch.from_numpy(IDS)[None])
    np.testing.assert_array_equal(out.gates[:, 0].numpy(), masks)
    assert np.abs(out.logits[0].numpy() - want).max() < 1e-5 * np.abs(want).max()
    with liquidc.compile(tmp_path / "model", tmp_path / "engine") as engine:
        session = engine.session(capacity=len(IDS))
        got = [session.prefill(IDS[:9].tolist(), every=True)]
        got += [session.step([int(token)]) for token in IDS[9:]]
        logits = np.concatenate([r.logits for r in got], 1)[0]
        gates = np.concatenate([r.gates for r in got], 2)[:, 0]
    np.testing.assert_array_equal(gates, masks)
    assert np.abs(logits - want).max() < 1e-5 * np.abs(want).max()


def test_layers_without_a_list_are_those_with_a_router(tmp_path: Path) -> None:
    write(tmp_path, routing_layers=None)
    assert open_model(tmp_path).config.gated_layers == GATED


def test_a_list_that_is_not_that_of_the_tensors(tmp_path: Path) -> None:
    write(tmp_path, routing_layers=[0, 1])
    with pytest.raises(ConfigError, match=r"routing_layers is \[0, 1\]; it must be \[1, 2\]"):
        open_model(tmp_path)

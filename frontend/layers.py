"""A decoder layer with depth gates: the equations of model spec 5.1, each in one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liquidc.frontend import protocol
from liquidc.frontend.attention import Attention
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.moe import FeedForward, MixtureOfExperts
from liquidc.frontend.protocol import LayerCache, Step, gated, keep
from liquidc.frontend.router import DepthRouter

Tensors = dict[str, Tensor]
"""Named tensors that go into an arm and come out of it."""


class Layer(nn.Module):
    """Attention and feed-forward, each run by the tokens that the layer's gates let through.

        h = x + m_a·a                       (scale_target both: m_a·alpha_a·a)
        y = h + m_f·alpha_f·F(N2 h) + (1 - m_f)·beta_f·P(N2 h)

    scale_target delta puts x + m_a·alpha_a·a in the place of h where y adds it, and keeps
    h = x + m_a·a for F and P. With scope layer m_a = m_f; an ungated sublayer has m = 1.
    """

    def __init__(self, config: LiquidConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        gates, policy = config.gates_per_layer(index), config.depth_gate.kv_policy
        self.gate = config.depth_gate
        self.scope = self.gate.scope if gates else "none"
        self.gates_attention = self.scope in ("layer", "attn", "attn_ffn")
        self.gates_ffn = self.scope in ("layer", "ffn", "attn_ffn")
        self.drops = policy == "drop" and self.gates_attention
        self.inherits = policy == "inherit" and self.gates_attention and index > 0
        self.records_kv = policy == "inherit" and config.num_gates > 0
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = Attention(config, index)
        self.residual_scale = config.residual_multiplier
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp: FeedForward | MixtureOfExperts
        if index in config.moe_layers:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(hidden, config.intermediate_size or 0)
        self.depth_gate = DepthRouter(config) if gates else None
        self.depth_gate_ffn = DepthRouter(config) if gates == 2 else None
        self.depth_adapter = None
        if gates and self.gate.skip_path == "adapter":
            self.depth_adapter = FeedForward(hidden, config.adapter_width)

    def forward(
        self, x: Tensor, step: Step, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        """Output [B, T, D] of x [B, T, D], and the new cache; `step` records the rest.

        Without a cache the tokens are a whole sequence from its start, as in training.
        """
        n = self.input_layernorm(x)
        t: Tensors = {"x": x, "n": n, "positions": step.positions, "valid": step.valid}
        t |= self._decide(n if self.gate.input == "post_norm" else x, step)
        if cache is not None:
            t |= {"key": cache.key, "value": cache.value, "length": cache.length}
        if self.inherits and step.below is not None:
            t |= {"below_k": step.below[0], "below_v": step.below[1]}

        def run_attention(t: Tensors) -> Tensors:
            return self._run_attention(t)

        def run_ffn(t: Tensors) -> Tensors:
            return self._run_ffn(t, step)

        def run_both(t: Tensors) -> Tensors:
            attention = self._run_attention(t)
            return _without_h({**attention, **self._run_ffn({**t, **attention}, step)})

        def skip_both(t: Tensors) -> Tensors:
            attention = self._skip_attention(t)
            return _without_h({**attention, **self._skip_ffn({**t, **attention})})

        if self.scope == "layer":
            out = gated(t["mask_a"], run_both, skip_both, t)
        else:
            if self.gates_attention:
                out = gated(t["mask_a"], run_attention, self._skip_attention, t)
            else:
                out = run_attention(t)
            t = {**t, **out}
            ffn = gated(t["mask_f"], run_ffn, self._skip_ffn, t) if self.gates_ffn else run_ffn(t)
            out = {**out, **ffn}
        step.experts = out.get("experts")
        step.kv = (out["k"], out["v"]) if self.records_kv else None
        if cache is None:
            return out["y"], None
        length = cache.length + self._written(t).to(torch.int64).sum(1)
        return out["y"], LayerCache(out["key"], out["value"], length)

    def _decide(self, u: Tensor, step: Step) -> Tensors:
        """The masks m and probabilities p of both sublayers and their scales alpha, beta."""
        t = {"mask_a": step.valid, "mask_f": step.valid}
        if self.depth_gate is None:
            return t
        mask, p, alpha = self._ask(self.depth_gate, u, step)
        t |= {"mask_a": mask} if self.gates_attention else {}
        t |= {"p_a": p, "p_f": p} | ({} if alpha is None else {"alpha_a": alpha, "alpha_f": alpha})
        if self.depth_gate_ffn is not None:
            mask, p, alpha = self._ask(self.depth_gate_ffn, u, step)
            t |= {"p_f": p} | ({} if alpha is None else {"alpha_f": alpha})
        t |= {"mask_f": mask} if self.gates_ffn else {}
        if self.gate.skip_scale == "one_minus_prob":
            t["beta"] = 1 - p
        return t

    def _ask(
        self, router: DepthRouter, u: Tensor, step: Step
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        gate = self.gate
        score = router(u)
        mask, p = step.depth_gate(
            score,
            threshold=gate.threshold,
            compare=gate.compare,
            reserved=gate.reserved_initial_tokens,
        )
        scales = {"none": None, "prob": p, "logit": score}
        base = scales[gate.exec_scale]
        return mask, p, None if base is None else base * gate.exec_scale_alpha

    def _run_attention(self, t: Tensors) -> Tensors:
        """The state h (and `base`, what y adds to), the cache, the new keys and values."""
        attn = self.self_attn
        q = attn.query(t["n"], t["positions"])
        k, v = attn.key_value(t["n"], t["positions"])
        if self.inherits:
            chosen = t["mask_a"][..., None, None]
            k, v = torch.where(chosen, k, t["below_k"]), torch.where(chosen, v, t["below_v"])
        written = self._written(t)
        out = self._recorded(k, v)
        if "key" in t:
            cache = LayerCache(t["key"], t["value"], t["length"])
            cache, limit = protocol.append(cache, k, v, written)
            mixed = attn.attend(q, cache, limit)
            out |= {"key": cache.key, "value": cache.value}
        else:
            visible = written if self.drops else None
            mixed = attn.attend_sequence(q, k, v, visible)
        a, alpha, target = (
            self._scaled(attn.output(mixed)),
            t.get("alpha_a"),
            self.gate.scale_target,
        )
        out["h"] = t["x"] + self._kept(t, _times(alpha, a) if target == "both" else a)
        if target == "delta" and alpha is not None:
            out["base"] = t["x"] + self._kept(t, _times(alpha, a))
        return out

    def _kept(self, t: Tensors, a: Tensor) -> Tensor:
        """What attention adds, of the tokens that run it: the mask stands outside of all scales."""
        return keep(t["mask_a"], a, t["p_a"]) if self.gates_attention else a

    def _skip_attention(self, t: Tensors) -> Tensors:
        """As `_run_attention` when no token runs: what the cache policy asks of skipped tokens."""
        out: Tensors = {}
        if self.drops:
            out |= {name: t[name].clone() for name in ("key", "value") if name in t}
        else:
            if self.inherits:
                k, v = t["below_k"], t["below_v"]
            else:
                k, v = self.self_attn.key_value(t["n"], t["positions"])
            out |= self._recorded(k, v)
            if "key" in t:
                cache = LayerCache(t["key"], t["value"], t["length"])
                cache, _ = protocol.append(cache, k, v, self._written(t))
                out |= {"key": cache.key, "value": cache.value}
        out["h"] = t["x"].clone()
        if self.gate.scale_target == "delta" and "alpha_a" in t:
            out["base"] = t["x"].clone()
        return out

    def _run_ffn(self, t: Tensors, step: Step) -> Tensors:
        """The layer's output y, and the experts of each token."""
        out: Tensors = {}
        n = self.post_attention_layernorm(t["h"])
        if isinstance(self.mlp, MixtureOfExperts):
            f, out["experts"] = self.mlp(n, t["mask_f"], step)
        else:
            f = self.mlp(n)
        f = _times(t.get("alpha_f"), self._scaled(f))
        if self.gates_ffn:
            f = keep(t["mask_f"], f, t["p_f"])
        out["y"] = t.get("base", t["h"]) + f
        if self.depth_adapter is not None:
            skipped = _times(t.get("beta"), self.depth_adapter(n))
            out["y"] = out["y"] + keep(~t["mask_f"], skipped, 1 - t["p_f"])
        return out

    def _skip_ffn(self, t: Tensors) -> Tensors:
        """As `_run_ffn` when no token runs: the adapter, or nothing."""
        out: Tensors = {}
        if isinstance(self.mlp, MixtureOfExperts):
            slots = self.mlp.config.num_experts_per_tok
            shape = (*t["x"].shape[:-1], slots)
            out["experts"] = t["x"].new_full(shape, -1, dtype=torch.int64)
        out["y"] = t.get("base", t["h"]).clone()
        if self.depth_adapter is not None:
            n = self.post_attention_layernorm(t["h"])
            out["y"] = out["y"] + _times(t.get("beta"), self.depth_adapter(n))
        return out

    def _scaled(self, branch: Tensor) -> Tensor:
        """What a sublayer adds to the state."""
        return branch if self.residual_scale == 1.0 else branch * self.residual_scale

    def _written(self, t: Tensors) -> Tensor:
        """Which tokens get a slot in the cache, bool[B, T]."""
        return t["mask_a"] if self.drops else t["valid"]

    def _recorded(self, k: Tensor, v: Tensor) -> Tensors:
        """The new keys and values for the layer above, where it may inherit them."""
        return {"k": k.clone(), "v": v.clone()} if self.records_kv else {}


def _times(scale: Tensor | None, x: Tensor) -> Tensor:
    """Scale f32[B, T] times x [B, T, D]; None is 1."""
    return x if scale is None else x * scale.unsqueeze(-1).to(x.dtype)


def _without_h(out: Tensors) -> Tensors:
    """What leaves a layer: not the state between its sublayers."""
    return {name: value for name, value in out.items() if name not in ("h", "base")}

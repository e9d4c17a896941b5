"""Grouped-query attention: projections, optional norms of q and k, rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend import protocol
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.protocol import LayerCache


class Attention(nn.Module):
    """H query heads and KV key/value heads of width hd; positions are the original ones."""

    def __init__(self, config: LiquidConfig, index: int) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        special = config.attention
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.eps = width, config.rms_norm_eps
        self.theta, self.scaling = config.rope_theta, config.rope_scaling
        self.rotates = index not in special.no_rope_layers
        self.l2_norm = special.l2_norm and self.rotates
        self.floor = 0 if self.rotates else special.temperature_floor
        self.temperature = special.temperature_scale
        self.window, self.chunk = special.window(index), special.chunk(index)
        self.clip = special.clip_qkv
        self.scale = width**-0.5 if special.scale is None else special.scale
        self.q_proj = nn.Linear(hidden, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        biased = bias if special.output_bias is None else special.output_bias
        self.o_proj = nn.Linear(self.heads * width, hidden, bias=biased)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(width * (self.heads if full else 1), eps=self.eps)
            self.k_norm = nn.RMSNorm(width * (self.kv_heads if full else 1), eps=self.eps)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if special.sinks else None

    def query(self, n: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [B, T, H, hd] of n [B, T, D]."""
        q = self._rotated(self.q_proj(n), self.q_norm, self.heads, positions)
        if not self.floor:
            return q
        step = torch.floor((positions + 1).to(torch.float32) / self.floor)
        warmth = torch.log1p(step) * self.temperature + 1.0
        return q * warmth[..., None, None].to(q.dtype)

    def key_value(self, n: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed and rotated as they are cached, and values: [B, T, KV, hd] each."""
        k = self._rotated(self.k_proj(n), self.k_norm, self.kv_heads, positions)
        v = self._clipped(self.v_proj(n))
        return k, v.unflatten(-1, (self.kv_heads, self.width))

    def attend(self, q: Tensor, cache: LayerCache, limit: Tensor) -> Tensor:
        """Queries [B, T, H, hd] over a cache, of which they see limit i64[B, T] slots."""
        return protocol.attend(
            q,
            cache.key,
            cache.value,
            limit,
            self.scale,
            window=self.window,
            chunk=self.chunk,
            sink=self.sinks,
        )

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Queries over the keys and values [B, T, KV, hd] of a whole sequence, for training."""
        return protocol.attend_sequence(
            q, k, v, visible, self.scale, window=self.window, chunk=self.chunk, sink=self.sinks
        )

    def output(self, mixed: Tensor) -> Tensor:
        """[B, T, H, hd] -> [B, T, D]."""
        return self.o_proj(mixed.flatten(-2))

    def _rotated(self, x: Tensor, norm: nn.RMSNorm | None, heads: int, positions: Tensor) -> Tensor:
        full = norm is not None and norm.weight.shape[0] == x.shape[-1] and heads > 1
        if norm is not None and full:
            x = F.rms_norm(x, (x.shape[-1],), norm.weight, self.eps)
        x = x.unflatten(-1, (heads, self.width))
        if norm is not None and not full:
            x = F.rms_norm(x, (self.width,), norm.weight, self.eps)
        x = self._clipped(x)
        if self.rotates:
            x = protocol.rope(x, positions, self.theta, self.scaling)
        return F.rms_norm(x, (self.width,), None, self.eps) if self.l2_norm else x

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

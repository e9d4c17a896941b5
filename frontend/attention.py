"""Grouped-query attention: projections, optional norms of q and k, rotary embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend import protocol
from liquidc.frontend.config import LiquidConfig


class Attention(nn.Module):
    """H query heads and KV key/value heads of width hd; positions are the original ones."""

    def __init__(self, config: LiquidConfig) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.theta, self.eps = width, config.rope_theta, config.rms_norm_eps
        self.scale = width**-0.5
        self.q_proj = nn.Linear(hidden, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(self.heads * width, hidden, bias=bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(width * (self.heads if full else 1), eps=self.eps)
            self.k_norm = nn.RMSNorm(width * (self.kv_heads if full else 1), eps=self.eps)

    def query(self, n: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [B, T, H, hd] of n [B, T, D]."""
        return self._rotated(self.q_proj(n), self.q_norm, self.heads, positions)

    def key_value(self, n: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed and rotated as they are cached, and values: [B, T, KV, hd] each."""
        k = self._rotated(self.k_proj(n), self.k_norm, self.kv_heads, positions)
        return k, self.v_proj(n).unflatten(-1, (self.kv_heads, self.width))

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
        return protocol.rope(x, positions, self.theta)

"""The model as a careful PyTorch user would write it: in-place caches, fused attention, real ifs.

`Plain` is what runs eagerly and under `torch.compile`; `Exportable` is what `torch.onnx.export`
takes: it can't follow a gate, so it computes every layer and every expert and selects. Both share
the weights of a `LiquidForCausalLM` and support what the bench's models have: gates of scope
`layer` without scales, the policies own and drop, SwiGLU feed-forwards and top-k experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend.model import LiquidForCausalLM

Caches = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, KV, S, hd]."""


class PlainLayer(nn.Module):
    """One decoder layer on the weights of ours."""

    def __init__(self, layer: Any, theta: float, width: int) -> None:
        super().__init__()
        self.layer, self.drops = layer, layer.drops
        self.gate = layer.depth_gate
        self.attn, self.mlp = layer.self_attn, layer.mlp
        self.is_moe = hasattr(layer.mlp, "experts")
        self.register_buffer("frequencies", theta ** (-torch.arange(0, width, 2) / width))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads [B, H, T, hd] turned by positions i64[T]."""
        angle = positions.unsqueeze(-1) * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def heads(self, x: Tensor, proj: Any, norm: Any) -> Tensor:
        """Projected and normed heads [B, H, T, hd]."""
        x = proj(x).unflatten(-1, (-1, self.attn.width))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def key_value(self, n: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [B, KV, T, hd]."""
        keys = self.rotate(self.heads(n, self.attn.k_proj, self.attn.k_norm), positions)
        return keys, self.heads(n, self.attn.v_proj, None)

    def attended(
        self, n: Tensor, keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Output of the attention, [B, T, D]; without a mask, of one token or of a whole prompt."""
        queries = self.rotate(self.heads(n, self.attn.q_proj, self.attn.q_norm), positions)
        causal = mask is None and n.shape[1] > 1
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.attn.o_proj(mixed.transpose(1, 2).flatten(2))

    def fed(self, h: Tensor) -> Tensor:
        """Output of the feed-forward; of experts, those that some token chose."""
        n = self.layer.post_attention_layernorm(h)
        if not self.is_moe:
            return self.mlp(n)
        flat = n.flatten(0, 1)
        index, weight = self.chosen(flat)
        out = torch.zeros_like(flat)
        experts = self.mlp.experts
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            gate, up = F.linear(flat[token], experts.gate_up_proj[expert]).chunk(2, -1)
            made = F.linear(F.silu(gate) * up, experts.down_proj[expert])
            out.index_add_(0, token, made * weight[token, slot, None])
        return out.view_as(h)

    def chosen(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token and their weights, which sum to 1."""
        scores = F.linear(flat, self.mlp.gate.weight).softmax(-1)
        weight, index = scores.topk(self.mlp.config.num_experts_per_tok, -1)
        return index, weight / weight.sum(-1, keepdim=True)

    def decide(self, n: Tensor, force: int) -> Tensor | None:
        """Which tokens run, bool[B, T]; None in a layer without gate."""
        if self.gate is None:
            return None
        mask = torch.sigmoid(self.gate(n)) > 0.5
        return mask if force == 0 else torch.full_like(mask, force > 0)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor], start: int, length: int, force: int
    ) -> tuple[Tensor, int]:
        """States after the layer, and how many slots are taken now."""
        n, count = self.layer.input_layernorm(x), x.shape[1]
        positions = torch.arange(start, start + count)
        mask = self.decide(n, force)
        if mask is not None and not mask.any():
            if self.drops:
                return x, length
            return x, self.append(cache, n, positions, length)
        if mask is None or mask.all():
            end = self.append(cache, n, positions, length)
            keys, values = cache[0][:, :, :end], cache[1][:, :, :end]
            sees = self.sees(end, length + torch.arange(count)) if length and count > 1 else None
            h = x + self.attended(n, keys, values, positions, sees)
            return h + self.fed(h), end
        rows = mask[0].nonzero().squeeze(1)  # prompts are of one row
        if self.drops:
            end = self.append(cache, n[:, rows], positions[rows], length)
            last = length + torch.arange(len(rows))
        else:
            end, last = self.append(cache, n, positions, length), length + rows
        keys, values = cache[0][:, :, :end], cache[1][:, :, :end]
        h = x[:, rows]
        sees = self.sees(end, last)
        h = h + self.attended(n[:, rows], keys, values, positions[rows], sees)
        out = x.clone()
        out[:, rows] = h + self.fed(h)
        return out, end

    def append(self, cache: tuple[Tensor, Tensor], n: Tensor, positions: Tensor, at: int) -> int:
        """Write new keys and values; how many slots are taken now."""
        keys, values = self.key_value(n, positions)
        end = at + keys.shape[2]
        cache[0][:, :, at:end], cache[1][:, :, at:end] = keys, values
        return end

    def sees(self, end: int, last: Tensor) -> Tensor:
        """Slots 0 to `last` of each query, bool[T, end]."""
        return torch.arange(end) <= last.unsqueeze(-1)


class Plain(nn.Module):
    """The model: tokens in, logits of the last one out, caches written in place."""

    def __init__(self, model: LiquidForCausalLM) -> None:
        super().__init__()
        self.model = model
        width, theta = model.config.head_dim, model.config.rope_theta
        self.layers = nn.ModuleList(PlainLayer(layer, theta, width) for layer in model.layers)
        gated = {layer: i for i, layer in enumerate(model.config.depth_gate.layers)}
        self.gates = [gated.get(index, -1) for index in range(len(self.layers))]

    def caches(self, batch: int, capacity: int) -> Caches:
        """Empty caches."""
        config = self.model.config
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    def forward(
        self, ids: Tensor, caches: Caches, start: int, lengths: list[int], force: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Logits [B, V] of the last of ids i64[B, T], and the slots taken in each layer.

        `lengths` are those taken before, `force` is -1, 0 or 1 for each gate.
        """
        x = self.model.model.embed_tokens(ids)
        after: list[int] = []
        for index, layer in enumerate(self.layers):
            gate = self.gates[index]
            asked = 0 if gate < 0 else force[gate]
            x, end = layer(x, caches[index], start, lengths[index], asked)
            after.append(end)
        return self.model.head(x[:, -1]), after


class Exportable(nn.Module):
    """The same without ifs: every layer and every expert is computed, masks select.

    Keys and values of all tokens are kept (the policy own), by concatenation.
    """

    def __init__(self, model: LiquidForCausalLM) -> None:
        super().__init__()
        self.plain = Plain(model)

    def forward(self, ids: Tensor, force: Tensor, past: list[Tensor]) -> list[Tensor]:
        """Logits [B, V] and the new caches, of ids i64[B, T], force i64[G] and the caches."""
        plain = self.plain
        x = plain.model.model.embed_tokens(ids)
        count, held = ids.shape[1], past[0].shape[2]
        positions = held + torch.arange(count)
        sees = torch.arange(held + count) <= positions.unsqueeze(-1)
        present: list[Tensor] = []
        for index, layer in enumerate(plain.layers):
            n = layer.layer.input_layernorm(x)
            keys, values = layer.key_value(n, positions)
            keys = torch.cat([past[2 * index], keys], 2)
            values = torch.cat([past[2 * index + 1], values], 2)
            present += [keys, values]
            h = x + layer.attended(n, keys, values, positions, sees)
            y = h + self.fed(layer, h)
            if layer.gate is not None:
                asked = force[plain.gates[index]]
                mask = (torch.sigmoid(layer.gate(n)) > 0.5) & (asked >= 0) | (asked > 0)
                y = torch.where(mask.unsqueeze(-1), y, x)
            x = y
        return [plain.model.head(x[:, -1]), *present]

    def fed(self, layer: Any, h: Tensor) -> Tensor:
        """The feed-forward; of experts, all."""
        n = layer.layer.post_attention_layernorm(h)
        if not layer.is_moe:
            return layer.mlp(n)
        index, weight = layer.chosen(n)
        out = torch.zeros_like(n)
        experts = layer.mlp.experts
        for expert in range(layer.mlp.config.num_experts):
            share = torch.where(index == expert, weight, 0.0).sum(-1, keepdim=True)
            gate, up = F.linear(n, experts.gate_up_proj[expert]).chunk(2, -1)
            out = out + share * F.linear(F.silu(gate) * up, experts.down_proj[expert])
        return out

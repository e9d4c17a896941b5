"""A decoder unlike the reference model, written with `liquidc.frontend.protocol` alone.

LayerNorm, learned positions, attention and feed-forward in parallel, GELU experts with biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend import protocol
from liquidc.frontend.protocol import LayerCache, Step

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, EXPERT_WIDTH = 50, 32, 4, 8, 48
EXPERTS, USED, LAYERS, CONTEXT = 4, 2, 3, 24
SCALE = HEAD_WIDTH**-0.5


@protocol.expert
def gelu_expert(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """One expert on its rows x [N, D]."""
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


class Expert(nn.Module):
    """The weights of one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, EXPERT_WIDTH), nn.Linear(EXPERT_WIDTH, WIDTH)

    def weights(self) -> tuple[Tensor, ...]:
        """What `gelu_expert` takes."""
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias


class ParallelLayer(nn.Module):
    """`x + m·(attention(n) + experts(n))` with n = norm(x), where the gate's m is 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 1)
        self.q = nn.Linear(WIDTH, HEADS * HEAD_WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * HEADS * HEAD_WIDTH)
        self.o = nn.Linear(HEADS * HEAD_WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def key_value(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, H, hd] of n [B, T, D]."""
        k, v = self.kv(n).unflatten(-1, (2, HEADS, HEAD_WIDTH)).unbind(2)
        return k, v

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """Output [B, T, D] of x [B, T, D], and the cache with the new keys and values."""
        mask, _ = step.depth_gate(self.gate(x).squeeze(-1))
        n = self.norm(x)
        cache, limit = protocol.append(cache, *self.key_value(n), step.valid)

        def run(
            x: Tensor, n: Tensor, mask: Tensor, key: Tensor, value: Tensor, limit: Tensor
        ) -> tuple[Tensor, Tensor]:
            q = self.q(n).unflatten(-1, (HEADS, HEAD_WIDTH))
            mixed = protocol.attend(q, key, value, limit, SCALE)
            index, weight = protocol.route(self.router(n), mask, USED)
            params = [expert.weights() for expert in self.experts]
            f = protocol.dispatch(n, index, weight, gelu_expert, params)
            return x + protocol.keep(mask, self.o(mixed.flatten(-2)) + f), index

        def skip(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            none = x.new_full((*x.shape[:-1], USED), -1, dtype=torch.int64)
            return x.clone(), none

        y, step.experts = protocol.gated(mask, run, skip, x, n, mask, cache.key, cache.value, limit)
        return y, cache

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole sequence without the protocol: y, gate_p [B, T] and experts [B, T, k]."""
        p = torch.sigmoid(self.gate(x).squeeze(-1))
        mask = p > 0.5
        n = self.norm(x)
        q = self.q(n).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.key_value(n))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        top = self.router(n).softmax(-1).topk(USED)
        share = top.values / top.values.sum(-1, keepdim=True)
        every = torch.stack([gelu_expert(n, *expert.weights()) for expert in self.experts], 2)
        chosen = every.gather(2, top.indices.unsqueeze(-1).expand(-1, -1, -1, WIDTH))
        f = (chosen * share.unsqueeze(-1)).sum(2)
        y = x + (self.o(mixed.flatten(-2)) + f) * mask.unsqueeze(-1)
        return y, p, top.indices.masked_fill(~mask.unsqueeze(-1), -1)


@dataclass
class Cache:
    """The caches of all layers."""

    layers: list[LayerCache]


class OtherModel(nn.Module):
    """What liquidc asks for: `embed`, `layers`, `head` and `new_cache`; and a plain `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(ParallelLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """States [B, T, D]; positions of padding may lie beyond the table."""
        return self.tokens(input_ids) + self.positions(positions.clamp(max=CONTEXT - 1))

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, P, V] of states [B, P, D]."""
        return F.linear(self.norm(x), self.tokens.weight)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""
        empty = self.norm.weight.new_zeros(batch, HEADS, capacity, HEAD_WIDTH)
        length = torch.zeros(batch, dtype=torch.int64)
        return Cache([LayerCache(empty, empty, length) for _ in self.layers])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences i64[B, T], plainly: logits, gate_p [L, B, T], experts [L, B, T, k]."""
        x = self.embed(input_ids, torch.arange(input_ids.shape[1]))
        gates: list[Tensor] = []
        experts: list[Tensor] = []
        for layer in self.layers:
            x, p, index = layer.plain(x)
            gates.append(p)
            experts.append(index)
        return self.head(x), torch.stack(gates), torch.stack(experts)

"""How much each decoder layer changes its input: block influence, by which layers are chosen.

BI_l = 1 - E_t[cos(x_l,t, x_l+1,t)] over the tokens t of a text, with x_l the input of layer l
(ShortGPT, Men et al. 2024, arXiv 2403.03853, equation 1). A layer of low influence is missed least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.families import Checkpoint
from liquidc.frontend.layers import Layer
from liquidc.frontend.protocol import Step
from liquidc.heldout import Report
from liquidc.ir.weights import materialize

ROWS = 16
"""Windows that go through a layer at a time."""


@torch.no_grad()
def block_influence(found: Checkpoint, windows: Tensor, report: Report) -> list[float]:
    """The influence of every layer, from 0 (it changes nothing) to 2.

    One layer's weights are in memory at a time, and the states of all windows.

    Args:
        found: a checkpoint without gates.
        windows: text, i64[N, T].
        report: told of each layer.
    """
    config = found.config
    embedding = materialize(found.weights["model.embed_tokens.weight"], found.source)
    x = F.embedding(windows, embedding).float() * config.embedding_multiplier
    del embedding
    influence: list[float] = []
    for index in range(config.num_hidden_layers):
        layer = _layer(found, index)
        similarity = 0.0
        for start in range(0, len(x), ROWS):
            before = x[start : start + ROWS]
            after, _ = layer(before, _step(config, index, before), None)
            similarity += float(F.cosine_similarity(before, after, dim=-1).double().sum())
            x[start : start + ROWS] = after
        influence.append(1 - similarity / windows.numel())
        report("layers", index + 1, config.num_hidden_layers)
    return influence


def _layer(found: Checkpoint, index: int) -> Layer:
    """A layer with its weights, in float32."""
    with torch.device("meta"):
        layer = Layer(found.config, index)
    layer.to_empty(device="cpu")
    for name, parameter in layer.state_dict().items():
        expr = found.weights[f"model.layers.{index}.{name}"]
        parameter.copy_(materialize(expr, found.source))
    return layer


def _step(config: LiquidConfig, index: int, x: Tensor) -> Step:
    """What a layer without gates is told of whole sequences x [B, T, D]."""
    batch, tokens, _ = x.shape
    zeros = torch.zeros(batch, dtype=torch.int64)
    positions = torch.arange(tokens).expand(batch, tokens)
    return Step(
        positions=positions,
        valid=torch.ones(batch, tokens, dtype=torch.bool),
        force=torch.zeros(0, dtype=torch.int8),
        bias=zeros.to(torch.float32),
        min_depth=zeros,
        executed=torch.zeros_like(positions),
        remaining=config.num_hidden_layers - index,
    )

"""Evaluate the tiny sample on held-out text and write its training report."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.frontend.model import LiquidForCausalLM


@torch.no_grad()
def quick(model: LiquidForCausalLM, windows: Tensor) -> tuple[float, list[float]]:
    """Bits per byte of windows i64[N, T+1], and the run rate of each gate."""
    out = model(windows[:, :-1])
    loss = F.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten())
    return float(loss) / math.log(2), out.gates.float().mean((1, 2)).tolist()

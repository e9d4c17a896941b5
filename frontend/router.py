"""The depth gate's router: a score for each token."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.semantic_ops import at_least_float32


class DepthRouter(nn.Module):
    """`score = proj2(act(norm(proj1 u)))`, or `proj1 u` for the linear router (spec 5.1, 5.2).

    Two logits give score = z[exec] - z[1 - exec]. With router_dtype float32 everything is
    computed in float32; the score always is.
    """

    def __init__(self, config: LiquidConfig) -> None:
        super().__init__()
        gate = config.depth_gate
        self.act = gate.router_act
        self.exec_index = gate.router_exec_index
        self.full_precision = gate.router_dtype == "float32"
        self.eps = config.rms_norm_eps
        linear = gate.router_type == "linear"
        width = gate.router_num_logits if linear else config.router_width
        self.proj1 = nn.Linear(config.hidden_size, width, bias=gate.router_bias)
        self.norm = nn.RMSNorm(width, eps=self.eps) if gate.router_norm else None
        self.proj2 = None
        if not linear:
            self.proj2 = nn.Linear(width, gate.router_num_logits, bias=gate.router_bias)

    def forward(self, u: Tensor) -> Tensor:
        """Scores f32[B, T] of u [B, T, D]."""
        if self.full_precision:
            u = at_least_float32(u)
        z = _linear(u, self.proj1)
        if self.norm is not None:
            z = F.rms_norm(z, (z.shape[-1],), _like(self.norm.weight, z), self.eps)
        if self.proj2 is not None:
            z = _linear(_ACTIVATIONS[self.act](z), self.proj2)
        z = at_least_float32(z)
        if z.shape[-1] == 1:
            return z.squeeze(-1)
        return z[..., self.exec_index] - z[..., 1 - self.exec_index]

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.proj1 if self.proj2 is None else self.proj2

    def favour_running(self, by: float = 2.0) -> None:
        """Initialise the last bias, where there is one, so that most tokens run at first."""
        bias = cast("Tensor | None", self.last.bias)
        if bias is not None:
            with torch.no_grad():
                bias.zero_()
                bias[self.exec_index if len(bias) == 2 else 0] = by


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = cast("Tensor | None", layer.bias)
    return F.linear(x, _like(layer.weight, x), None if bias is None else _like(bias, x))


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype of x; float32 models get no cast in their trace."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


_ACTIVATIONS = {"tanh": torch.tanh, "silu": F.silu, "relu": F.relu}

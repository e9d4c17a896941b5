"""Other scores for depth routers, while training or measuring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liquidc.frontend.router import DepthRouter


def depth_routers(model: nn.Module) -> list[DepthRouter]:
    """A model's routers in the order of its gates."""
    return [module for module in model.modules() if isinstance(module, DepthRouter)]


class ScoreNoise:
    """Adds logistic noise of `scale` to the scores while gradients are on.

    So a gate's decision is a draw from its probability (the binary Concrete of Maddison et al. 2017
    without temperature), and gates learn of what they would not have chosen.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self.scale = 0.0
        self.generator = generator
        for router in depth_routers(model):
            router.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: object, score: Tensor) -> Tensor:
        """Scores f32[B, T] with noise."""
        del module, args
        if not self.scale or not torch.is_grad_enabled():
            return score
        u = torch.rand(score.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        return score + self.scale * torch.logit(u)


@contextmanager
def random_gates(model: nn.Module, rates: Sequence[float], seed: int) -> Generator[None]:
    """Inside, each gate runs tokens at random, at its rate."""
    generator = torch.Generator().manual_seed(seed)

    def hook(rate: float) -> Callable[..., Tensor]:
        def forget(module: nn.Module, args: Any, score: Tensor) -> Tensor:
            del module, args
            run = torch.rand(score.shape, generator=generator) < rate
            return torch.where(run, 20.0, -20.0)

        return forget

    pairs = zip(depth_routers(model), rates, strict=True)
    handles = [router.register_forward_hook(hook(rate)) for router, rate in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

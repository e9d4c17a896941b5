"""From logits to a token: greedy, temperature, nucleus. Reproducible for a seed on any platform."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from liquidc.errors import EngineError, InputError


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithms of the probabilities over the last dimension, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


class Sampler:
    """Chooses tokens one after the other.

    Args:
        temperature: 0 takes the most probable token (the lowest id among equals); otherwise the
            logits are divided by it.
        top_p: draw from the smallest set of most probable tokens that together reach this
            probability; 1 draws from all.
        seed: of the random numbers; one number is drawn per token.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise InputError(f"temperature must be 0 or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: NDArray[np.float32]) -> tuple[int, float]:
        """The next token and its log-probability under the model (at temperature 1).

        Args:
            logits: [V].

        Raises:
            EngineError: a logit is not finite.
        """
        if not np.isfinite(logits).all():
            raise EngineError("the engine computed logits that are not finite; verify it")
        logprobs = log_softmax(logits)
        token = int(logits.argmax()) if self.temperature == 0 else self._draw(logits)
        return token, float(logprobs[token])

    def _draw(self, logits: NDArray[np.float32]) -> int:
        probs = np.exp(log_softmax(logits.astype(np.float64) / self.temperature))
        order = np.argsort(-probs, kind="stable")
        total = np.cumsum(probs[order])
        count = min(int(np.searchsorted(total, self.top_p)) + 1, len(order))
        point = self._random.random() * float(total[count - 1])
        return int(order[min(int(np.searchsorted(total, point, side="right")), count - 1)])

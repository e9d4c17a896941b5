"""From logits to a token: greedy, temperature, top-k, nucleus. Reproducible for a seed anywhere.

The order and the rules are those of transformers: repetition penalty, temperature, top-k, top-p,
min-p (`transformers/generation/logits_process.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquidc.errors import EngineError, InputError
from liquidc.values import integer, number


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
        top_k: draw from so many most probable tokens, and their equals; 0 draws from all.
        min_p: draw no token below this share of the largest probability.
        repetition_penalty: positive logits of tokens that were seen are divided by it, others
            multiplied (Keskar et al. 2019, arXiv 1909.05858, section 4.1); greedy too.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        temperature, top_p = number(temperature, "temperature"), number(top_p, "top_p")
        seed, top_k = integer(seed, "seed"), integer(top_k, "top_k")
        min_p = number(min_p, "min_p")
        repetition_penalty = number(repetition_penalty, "repetition_penalty")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise InputError(f"temperature must be 0 or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        if top_k < 0:
            raise InputError(f"top_k must be 0 or more, not {top_k}")
        if not 0 <= min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, not {min_p}")
        if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
            raise InputError(f"repetition_penalty must be above 0, not {repetition_penalty}")
        self.temperature = temperature
        self.top_p, self.top_k, self.min_p = top_p, top_k, min_p
        self.repetition_penalty = repetition_penalty
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: NDArray[np.float32], seen: Collection[int] = ()) -> tuple[int, float]:
        """The next token and its log-probability under the model (at temperature 1).

        Args:
            logits: [V].
            seen: tokens of the text so far.

        Raises:
            EngineError: a logit is not finite.
        """
        if not np.isfinite(logits).all():
            raise EngineError("the engine computed logits that are not finite; verify it")
        logprobs = log_softmax(logits)
        scores = self._penalised(logits, seen)
        token = int(scores.argmax()) if self.temperature == 0 else self._draw(scores)
        return token, float(logprobs[token])

    def probabilities(
        self, logits: NDArray[np.float32], seen: Collection[int] = ()
    ) -> NDArray[np.float64]:
        """The probabilities [V] with which tokens are drawn, at a temperature above 0."""
        order, total = self._kept(self._penalised(logits, seen))
        probs = np.zeros(len(logits))
        probs[order] = np.diff(total, prepend=0.0) / total[-1]
        return probs

    def _penalised(self, logits: NDArray[np.float32], seen: Collection[int]) -> NDArray[Any]:
        if self.repetition_penalty == 1 or not seen:
            return logits
        scores, ids = logits.astype(np.float64), np.fromiter(seen, np.int64)
        found = scores[ids]
        factor = self.repetition_penalty
        scores[ids] = np.where(found < 0, found * factor, found / factor)
        return scores

    def _kept(self, scores: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, most probable first, and sums of their probabilities."""
        scores = scores.astype(np.float64)
        with np.errstate(over="ignore"):  # to -inf, at a tiny temperature
            scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            least = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < least, -np.inf, scores)
        probs = np.exp(log_softmax(scores))
        order = np.argsort(-probs, kind="stable")
        total = np.cumsum(probs[order])
        count = min(int(np.searchsorted(total, self.top_p)) + 1, len(order))
        count = min(count, int((probs > 0).sum()), int((probs >= self.min_p * probs.max()).sum()))
        return order[:count], total[:count]

    def _draw(self, scores: NDArray[Any]) -> int:
        order, total = self._kept(scores)
        point = self._random.random() * float(total[-1])
        return int(order[min(int(np.searchsorted(total, point, side="right")), len(order) - 1)])

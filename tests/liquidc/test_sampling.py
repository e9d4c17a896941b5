"""The sampler against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from liquidc.errors import EngineError, InputError
from liquidc.sampling import Sampler, log_softmax

# eighths: a difference that float32 shows in the logits, it shows in the probabilities too
LOGITS = arrays(
    np.float32, st.integers(2, 30), elements=st.integers(-240, 240).map(lambda n: n / 8)
)


def test_greedy_takes_the_lowest_of_equals() -> None:
    token, logprob = Sampler().pick(np.array([0, 2, 2, 1], np.float32))
    assert token == 1
    assert logprob == pytest.approx(float(log_softmax(np.array([0.0, 2, 2, 1]))[1]))


def test_log_softmax_is_safe_far_out() -> None:
    assert np.exp(log_softmax(np.array([1e30, 0.0], np.float32))).tolist() == [1.0, 0.0]


@given(LOGITS, st.integers(0, 1000))
def test_a_tiny_nucleus_is_greedy(logits: np.ndarray, seed: int) -> None:
    token, _ = Sampler(temperature=1.0, top_p=1e-9, seed=seed).pick(logits)
    assert token == int(logits.argmax())


@given(LOGITS, st.floats(0.05, 1.0), st.integers(0, 1000))
def test_never_outside_the_nucleus(logits: np.ndarray, top_p: float, seed: int) -> None:
    token, logprob = Sampler(temperature=1.3, top_p=top_p, seed=seed).pick(logits)
    probs = np.exp(log_softmax(logits.astype(np.float64) / 1.3))
    # everything more probable than the token does not yet reach top_p
    assert probs[probs > probs[token]].sum() < top_p + 1e-12
    assert logprob == pytest.approx(float(log_softmax(logits)[token]))


def test_frequencies_follow_the_probabilities() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(temperature=1.0, seed=3)
    drawn = [sampler.pick(np.log(probs).astype(np.float32))[0] for _ in range(20000)]
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, probs, atol=0.012)


def test_a_known_sequence_stays_the_same() -> None:
    sampler = Sampler(temperature=0.8, top_p=0.9, seed=42)
    logits = np.linspace(-1, 1, 16, dtype=np.float32)
    assert [sampler.pick(logits)[0] for _ in range(8)] == [9, 13, 8, 10, 15, 5, 9, 9]


def test_not_finite_logits() -> None:
    with pytest.raises(EngineError, match="not finite"):
        Sampler().pick(np.array([0, np.nan], np.float32))


@pytest.mark.parametrize("arguments", [{"temperature": -0.1}, {"top_p": 0.0}, {"seed": -2}])
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Sampler(**arguments)  # pyright: ignore

"""generation_config.json, and the rules of sampling that it names, against transformers."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liquidc.errors import ConfigError, LiquidWarning
from liquidc.generation import GENERATION, Generation, read_generation
from liquidc.sampling import Sampler
from tests.liquidc.conftest import save_model
from tests.liquidc.test_cli import call, ok, refused


def read(directory: Path, **fields: Any) -> Generation:
    (directory / GENERATION).write_text(json.dumps(fields))
    return read_generation(directory)


def test_defaults(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == Generation()
    assert read(tmp_path, temperature=0.6, top_p=0.9) == Generation()
    sampled = read(tmp_path, do_sample=True)
    assert sampled == Generation(temperature=1.0, top_k=50)


def test_fields(tmp_path: Path) -> None:
    fields = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_new_tokens": 7,
        "max_length": 99,
        "eos_token_id": [1, 2],
        "transformers_version": "5.23.0",
    }
    want = Generation(frozenset({1, 2}), 0.6, 20, 0.95, 0.1, 1.1, 7, 99)
    assert read(tmp_path, **fields) == want
    nothing = dict.fromkeys(fields) | {"eos_token_id": 3}
    assert read(tmp_path, **nothing) == Generation(frozenset({3}))


def test_end_of_text_from_either_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert read_generation(tmp_path).eos == {5}
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [6]}}')
    assert read_generation(tmp_path).eos == {6}
    assert read(tmp_path, eos_token_id=[1, 2]).eos == {1, 2}


def test_what_is_not_followed_is_named(tmp_path: Path) -> None:
    found = read(tmp_path, num_beams=4, no_repeat_ngram_size=0, typical_p=None, stop_strings=["x"])
    assert found.unsupported == ("num_beams", "stop_strings")


ODD = {
    "temperature 0": ({"temperature": 0.0}, {"temperature": 0.0}, "temperature is 0, so the most"),
    "tiny": ({"temperature": 1e-6}, {"temperature": 1e-6}, ""),
    "top_k -1": ({"top_k": -1}, {"top_k": 0}, "top_k is -1, read as 0: all tokens"),
    "top_k 0.0": ({"top_k": 0.0}, {"top_k": 0}, "top_k is 0, read as an integer"),
    "top_k 50.0": ({"top_k": 50.0}, {"top_k": 50}, "top_k is 50, read as an integer"),
    "top_k large": ({"top_k": 10**12}, {"top_k": 2**31 - 1}, ""),
    "top_p 0": ({"top_p": 0}, {"temperature": 0.0}, "top_p is 0, so the most probable"),
    "top_p 1.5": ({"top_p": 1.5}, {"top_p": 1.0}, "top_p is 1.5, read as 1"),
    "integers": ({"repetition_penalty": 1, "top_p": 1, "min_p": 0}, {}, ""),
    "no limit": ({"max_length": 1e30}, {"max_length": 2**31 - 1}, "max_length is 1e+30, read as"),
    "ids as text": (
        {"eos_token_id": "2"},
        {"eos": frozenset({2})},
        "eos_token_id is '2', read as 2",
    ),
    "ids as numbers": ({"eos_token_id": [3, 2.0]}, {"eos": frozenset({2, 3})}, "is 2.0, read as 2"),
    "other ids": ({"eos_token_id": [2, -1], "pad_token_id": -1}, {"eos": frozenset({2, -1})}, ""),
    "no ids": ({"eos_token_id": []}, {}, ""),
    "unknown": ({"cache_implementation": "static", "unknown": {"a": [1]}, "_x": True}, {}, ""),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_values_are_read_and_told(kind: str, tmp_path: Path) -> None:
    fields, want, note = ODD[kind]
    found = read(tmp_path, do_sample=True, **fields)
    assert found == replace(Generation(temperature=1.0, top_k=50), **want)
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)


def test_what_is_left_over_without_sampling_is_told(tmp_path: Path) -> None:
    left = {"temperature": 0.0, "top_p": 0.6, "top_k": 1, "typical_p": "any", "min_p": None}
    for sampling in ({"do_sample": False}, {"do_sample": None}, {}):
        found = read(tmp_path, **sampling, **left)
        assert found == Generation()
        (note,) = found.notes
        assert (
            note == "do_sample is not true, so temperature, top_k, top_p, typical_p change nothing"
        )
    assert read(tmp_path, temperature=1, top_k=50, top_p=1.0).notes == ()
    assert read(tmp_path, do_sample=True, typical_p=0.9).unsupported == ("typical_p",)


WRONG = {
    "temperature": [-1.0, "x", True, [], 1e999],
    "top_k": [-2, 1.5, "x", True],
    "top_p": [-0.1, "x"],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, "x"],
    "max_new_tokens": [0, 1.5],
    "max_length": [0, "x"],
    "do_sample": [1, "x"],
    "eos_token_id": ["x", [1, "x"], [[1]], 1.5, {}, True, "-1", [None]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name: str, tmp_path: Path) -> None:
    for value in WRONG[name]:
        with pytest.raises(ConfigError, match=rf"{GENERATION}: {name} ") as caught:
            read(tmp_path, **{"do_sample": True, name: value})
        assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, message in (("{", "not valid JSON"), ("[]", "must be a JSON object")):
        (tmp_path / GENERATION).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_generation(tmp_path)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(sorted({*WRONG, "num_beams", "bad_words_ids", "x"})),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_anything_is_read_or_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with suppress(ConfigError):
        read(tmp_path, **fields)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.1, 0.8, 1.0]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
)
def test_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    from transformers.generation import logits_process as rules

    logits = np.random.default_rng(seed).normal(0, 2, 40).astype(np.float32)
    seen = [int(i) for i in np.random.default_rng(seed).integers(0, 40, 12)]
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.tensor([seen])
    chain: list[Any] = [
        rules.RepetitionPenaltyLogitsProcessor(penalty),
        rules.TemperatureLogitsWarper(temperature),
    ]
    chain += [rules.TopKLogitsWarper(top_k)] if top_k else []
    chain += [rules.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [rules.MinPLogitsWarper(min_p)] if min_p else []
    for rule in chain:
        scores = rule(ids, scores)
    want = torch.softmax(scores, -1)[0].numpy()
    sampler = Sampler(temperature, top_p, top_k=top_k, min_p=min_p, repetition_penalty=penalty)
    got = sampler.probabilities(logits, set(seen))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("generation") / "model")


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_a_tiny_temperature_takes_the_best(temperature: float) -> None:
    logits = np.array([1.0, 3.0, -2.0, 2.999], np.float32) * 1e4
    sampler = Sampler(temperature, top_k=3, top_p=0.9, min_p=0.1)
    np.testing.assert_array_equal(sampler.probabilities(logits), [0, 1, 0, 0])
    assert sampler.pick(logits)[0] == 1


def test_run_does_what_the_model_asks_for_unless_told(model: Path, tmp_path: Path) -> None:
    wants = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 9, "num_beams": 2}
    (model / GENERATION).write_text(json.dumps(wants))
    with pytest.warns(LiquidWarning, match=f"{GENERATION}: num_beams is not followed") as told:
        ok("compile", model, "-o", tmp_path / "e", "--target", "null")
    assert len(told) == 1
    ids = ("run", tmp_path / "e", "--ids", "65,66")
    texts = {tuple(t["id"] for t in ok(*ids, "--seed", seed)["tokens"]) for seed in range(4)}
    assert len(texts) > 1
    assert {len(text) for text in texts} == {9}
    greedy = [ok(*ids, "--temperature", 0, "--seed", s, "-n", 4)["tokens"] for s in range(2)]
    assert greedy[0] == greedy[1]
    assert len(greedy[0]) == 4
    result = call(*ids)
    assert "warning: num_beams of generation_config.json is not followed" in result.stderr


def test_a_damaged_one_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    (model / GENERATION).write_text('{"do_sample": true, "temperature": -1}')
    refused("temperature is -1", "compile", model, "-o", tmp_path / "e", "--target", "null")
    assert list(tmp_path.iterdir()) == []

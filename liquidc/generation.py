"""How a model wants to be sampled: generation_config.json.

Fields and defaults are those of transformers' `GenerationConfig`, and values that are common though
odd mean what they mean there, or what their authors mean where `generate` refuses them: they are
named in `notes`. What would change the result and can't be done here is named in `unsupported`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from liquidc.errors import ConfigError
from liquidc.frontend.fields import Fields
from liquidc.records import read_object

GENERATION = "generation_config.json"
TOP_K = 50
"""What transformers takes if a config samples and names no top_k."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "encoder_repetition_penalty": (1.0, 1),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({}, []),
    "guidance_scale": (1.0, 1),
    "watermarking_config": (),
    "dola_layers": (),
    "stop_strings": ([],),
}
"""Fields that change what is generated, with the values at which they do not; null never does."""
NEUTRAL_SAMPLING: dict[str, tuple[object, ...]] = {
    "typical_p": (1.0, 1),
    "top_h": (),
    "epsilon_cutoff": (0.0, 0),
    "eta_cutoff": (0.0, 0),
}
"""The same, of those that are read with `do_sample` alone."""
SAMPLING: dict[str, tuple[object, ...]] = {
    "temperature": (1.0, 1),
    "top_k": (TOP_K, 0),
    "top_p": (1.0, 1),
    "min_p": (0.0, 0),
    **NEUTRAL_SAMPLING,
}
"""Fields that are read with `do_sample` alone, with the values that need not be told without it."""
MOST = 2**31 - 1
"""Larger counts mean "no limit"."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model asks for; None leaves the choice to the caller.

    Attributes:
        eos: ids of tokens that end a text.
        temperature: of the sampling; 0 is greedy, as without `do_sample`.
        top_k: the most probable tokens that are drawn from; 0 is all.
        top_p: the probability that is drawn from.
        min_p: tokens below this share of the largest probability are not drawn.
        repetition_penalty: logits of tokens that were seen are divided by it, or multiplied.
        max_new_tokens: how many are generated at most.
        max_length: how many tokens a text has at most, with its prompt.
        unsupported: fields that ask for something else.
        notes: fields that are not taken literally, and how they are read.
    """

    eos: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    unsupported: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)


def read_generation(directory: Path) -> Generation:
    """What generation_config.json says; the end of a text also by config.json.

    Raises:
        ConfigError: a file is damaged, or a value of another type or out of range.
    """
    path = directory / GENERATION
    told = read_object(path, ConfigError) if os.path.lexists(path) else {}
    notes: list[str] = []
    try:
        found = _read(Fields("", told), notes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    eos = told.get("eos_token_id")
    if eos is None and os.path.lexists(directory / "config.json"):
        path = directory / "config.json"
        config = read_object(path, ConfigError)
        text = config.get("text_config")
        inner = cast("dict[str, Any]", text) if isinstance(text, dict) else {}
        eos = config.get("eos_token_id", inner.get("eos_token_id"))
    return Generation(eos=_ids(path, eos, notes), **found, notes=tuple(notes))


def _read(f: Fields, notes: list[str]) -> dict[str, Any]:
    samples = _given(f, "do_sample") and f.boolean("do_sample", False)
    found: dict[str, Any] = _sampling(f, notes) if samples else {}
    if not samples and (left := _unlike(f, SAMPLING)):
        notes.append(f"do_sample is not true, so {', '.join(left)} change nothing")
    found["repetition_penalty"] = _number(f, "repetition_penalty", 1.0, above=0.0)
    for name in ("max_new_tokens", "max_length"):
        found[name] = _whole(f, name, 1, notes) if _given(f, name) else None
    unlike = _unlike(f, NEUTRAL | NEUTRAL_SAMPLING if samples else NEUTRAL)
    found["unsupported"] = tuple(unlike)
    return found


def _sampling(f: Fields, notes: list[str]) -> dict[str, Any]:
    """The fields that count with `do_sample`."""
    temperature = _number(f, "temperature", 1.0, least=0.0)
    top_k = _whole(f, "top_k", -1, notes) if _given(f, "top_k") else TOP_K
    top_p = _number(f, "top_p", 1.0, least=0.0)
    if top_k == -1:
        notes.append("top_k is -1, read as 0: all tokens")
    if top_p > 1:
        notes.append(f"top_p is {top_p:g}, read as 1: all tokens")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value == 0:
            notes.append(f"{name} is 0, so the most probable token is taken")
    return {
        "temperature": temperature if top_p else 0.0,
        "top_k": max(top_k, 0),
        "top_p": min(top_p, 1.0) or 1.0,
        "min_p": _number(f, "min_p", 0.0, least=0.0, most=1.0),
    }


def _unlike(f: Fields, neutral: dict[str, tuple[object, ...]]) -> list[str]:
    """Fields that are given at a value other than null and these."""
    return [name for name, values in neutral.items() if f.get(name, None) not in (None, *values)]


def _given(f: Fields, name: str) -> bool:
    return f.get(name, None) is not None


def _number(f: Fields, name: str, default: float, **limits: float) -> float:
    return f.number(name, default, **limits) if _given(f, name) else default


def _whole(f: Fields, name: str, least: int, notes: list[str]) -> int:
    """An integer, which may be written as 50.0."""
    value = f.get(name)
    if type(value) is float and value.is_integer():
        notes.append(f"{name} is {value:g}, read as an integer")
        value = int(value)
    if type(value) is not int or value < least:
        f.refuse(name, f"an integer, {least} or more")
    return min(value, MOST)


def _ids(path: Path, value: object, notes: list[str]) -> frozenset[int]:
    """Token ids, which may be written as "2" or 2.0."""
    if value is None:
        return frozenset()
    ids: set[int] = set()
    for token in cast("list[Any]", value if isinstance(value, list) else [value]):
        text = isinstance(token, str) and token.isdecimal() and len(token) < 20
        if text or (type(token) is float and token.is_integer()):
            notes.append(f"eos_token_id is {token!r}, read as {int(token)}")
        elif type(token) is not int:
            raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids")
        ids.add(int(token))
    return frozenset(ids)

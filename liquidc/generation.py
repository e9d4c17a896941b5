"""How a model wants to be sampled: generation_config.json, read strictly.

Fields and defaults are those of transformers' `GenerationConfig`. What would change the result and
can't be done here is named in `unsupported`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    "typical_p": (1.0, 1),
    "top_h": (),
    "epsilon_cutoff": (0.0, 0),
    "eta_cutoff": (0.0, 0),
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


def read_generation(directory: Path) -> Generation:
    """What generation_config.json says; the end of a text also by config.json.

    Raises:
        ConfigError: a file is damaged, or a value of another type or out of range.
    """
    path = directory / GENERATION
    told = read_object(path, ConfigError) if path.exists() else {}
    try:
        found = _read(Fields("", told))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    eos = told.get("eos_token_id")
    if eos is None and (directory / "config.json").exists():
        path = directory / "config.json"
        config = read_object(path, ConfigError)
        text = config.get("text_config")
        inner = cast("dict[str, Any]", text) if isinstance(text, dict) else {}
        eos = config.get("eos_token_id", inner.get("eos_token_id"))
    return Generation(eos=_ids(path, eos), **found)


def _read(f: Fields) -> dict[str, Any]:
    samples = _given(f, "do_sample") and f.boolean("do_sample", False)
    found: dict[str, Any] = {}
    if samples:
        found["temperature"] = _number(f, "temperature", 1.0, above=0.0)
        found["top_k"] = f.integer("top_k", least=0) if _given(f, "top_k") else TOP_K
        found["top_p"] = _number(f, "top_p", 1.0, above=0.0, most=1.0)
        found["min_p"] = _number(f, "min_p", 0.0, least=0.0, most=1.0)
    found["repetition_penalty"] = _number(f, "repetition_penalty", 1.0, above=0.0)
    for name in ("max_new_tokens", "max_length"):
        found[name] = f.optional_integer(name)
    unlike = [name for name, values in NEUTRAL.items() if f.get(name, None) not in (None, *values)]
    found["unsupported"] = tuple(unlike)
    return found


def _given(f: Fields, name: str) -> bool:
    return f.get(name, None) is not None


def _number(f: Fields, name: str, default: float, **limits: float) -> float:
    return f.number(name, default, **limits) if _given(f, name) else default


def _ids(path: Path, value: object) -> frozenset[int]:
    ids = cast("list[Any]", value) if isinstance(value, list) else [value]
    if value is None:
        return frozenset()
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids")
    return frozenset(cast("list[int]", ids))

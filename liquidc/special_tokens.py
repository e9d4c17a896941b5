"""The special tokens that a model names, read from the files where transformers finds them.

`_from_pretrained` in `transformers/tokenization_utils_base.py`: tokenizer_config.json, over which
special_tokens_map.json takes precedence unless the former lists tokens in `added_tokens_decoder`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from liquidc.errors import InputError
from liquidc.records import read_object
from liquidc.text import is_text

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Those that every model may name, in the order in which they are added."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before anything else.

    Attributes:
        content: its text.
        flags: further arguments of `tokenizers.AddedToken`.
    """

    content: str
    flags: Mapping[str, bool] = field(default_factory=dict[str, bool])


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the files beside a tokenizer.json say about tokens.

    Attributes:
        named: texts by names such as `bos_token`; chat templates know them by these names.
        listed: tokens of `added_tokens_decoder`; their flags replace those in tokenizer.json.
        added: special tokens, to be found in text even if no file lists them with flags.
        config: the content of tokenizer_config.json.
    """

    named: Mapping[str, str]
    listed: tuple[AddedToken, ...]
    added: tuple[AddedToken, ...]
    config: Mapping[str, Any]


def read_special_tokens(directory: Path) -> SpecialTokens:
    """What tokenizer_config.json and special_tokens_map.json of a model or an engine say.

    Raises:
        InputError: a file is damaged.
    """
    path = directory / TOKENIZER_CONFIG
    config = read_object(path, InputError) if os.path.lexists(path) else {}
    found, listed = dict(config), list[AddedToken]()
    if "added_tokens_decoder" in config:
        listed = list(_listed(path, config["added_tokens_decoder"]))
    elif os.path.lexists(directory / SPECIAL_TOKENS_MAP):
        found |= read_object(directory / SPECIAL_TOKENS_MAP, InputError)
    names = dict.fromkeys((*NAMES, *(name for name in found if name.endswith("_token"))))
    more = found.get("extra_special_tokens") or found.get("additional_special_tokens")
    if isinstance(more, dict):
        names |= dict.fromkeys(cast("dict[str, Any]", more))
        found |= cast("dict[str, Any]", more)
    named = {name: token for name in names if (token := _special(found.get(name))) is not None}
    extra = cast("list[Any]", more) if isinstance(more, list) else []
    unnamed = [token for each in extra if (token := _special(each)) is not None]
    for token in (*listed, *named.values(), *unnamed):
        if not is_text(token.content):
            raise InputError(f"{directory}: the token {token.content!r:.80} is not valid Unicode")
    return SpecialTokens(
        {name: token.content for name, token in named.items()},
        tuple(listed),
        (*named.values(), *unnamed),
        config,
    )


def _listed(path: Path, told: object) -> Iterator[AddedToken]:
    """The tokens of `added_tokens_decoder`, an object from ids to tokens, in the order of ids."""
    items = cast("dict[str, Any]", told) if isinstance(told, dict) else {"": told}
    if not all(key.isdecimal() and len(key) < 20 for key in items):
        raise InputError(f"{path}: added_tokens_decoder must be an object from ids to tokens")
    for key in sorted(items, key=int):
        token = _token(items[key])
        if token is None:
            raise InputError(f"{path}: the token {key} of added_tokens_decoder has no content")
        yield token


def _special(told: object) -> AddedToken | None:
    """A special token, which is a text or an object with its `content`; None if it is neither."""
    token = AddedToken(told) if isinstance(told, str) else _token(told)
    return None if token is None else AddedToken(token.content, {**token.flags, "special": True})


def _token(told: object) -> AddedToken | None:
    fields = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
    content = fields.get("content")
    flags = {name: fields[name] for name in _FLAGS if isinstance(fields.get(name), bool)}
    return AddedToken(content, flags) if isinstance(content, str) else None

"""The one parser of names with options in text, of passes and of schemes: `int4{block=64}`.

A list is names with commas between them. Pairs `key=value` in braces may follow a name, with commas
between them too. Anything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from liquidc.errors import InputError

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_BETWEEN = re.compile(r",(?![^{]*\})")
"""A comma that is not inside of braces."""


@dataclass(frozen=True, slots=True)
class Named:
    """A name with options.

    Attributes:
        name: of a pass or a scheme.
        options: values by key, as they were written.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        pairs = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}{{{pairs}}}" if pairs else self.name


def parse_named(text: str, what: str) -> Named:
    """Read `name` or `name{key=value,key=value}`.

    Args:
        text: what was given.
        what: what the name stands for, `pass` or `scheme`, for messages.

    Raises:
        InputError: another form, a key without value, or a key that is given twice.
    """
    name, brace, rest = text.strip().partition("{")
    if not _NAME.fullmatch(name):
        raise InputError(f"{text!r} is not a {what}; write name or name{{option=value}}")
    if not brace:
        return Named(name)
    inner, closing = rest[:-1], rest[-1:]
    if closing != "}" or "{" in inner or "}" in inner:
        raise InputError(f"{text!r}: a brace is not closed; write {name}{{option=value}}")
    options: dict[str, str] = {}
    for pair in inner.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value) or "=" in value:
            raise InputError(f"{text!r}: {pair.strip()!r} is not option=value")
        if key in options:
            raise InputError(f"{text!r}: {key} is given twice")
        options[key] = value
    return Named(name, options)


def split_list(text: str) -> tuple[str, ...]:
    """The parts of `a,b{x=1,y=2}`; none of an empty text.

    Raises:
        InputError: a part is empty.
    """
    if not text.strip():
        return ()
    parts = tuple(part.strip() for part in _BETWEEN.split(text))
    if not all(parts):
        raise InputError(f"{text!r}: a name is missing between two commas, or at an end")
    return parts

"""Reading the fields of a JSON object strictly: every key is asked for, or it is an error."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

from liquidc.errors import ConfigError

_MISSING: Any = object()
_LARGEST = 2**31 - 1
"""Of any integer: a larger size is a mistake, and PyTorch may not hold it."""
MAX_TOKENS = 1000
"""Limit of a list of token ids."""


class Fields:
    """One JSON object whose keys are read one by one; `finish` refuses those nobody read.

    `prefix` ("moe.") is put before names in messages; `defaults` are values of keys that are not
    given, before those that a reader is told. Every reader raises `ConfigError`, naming the field,
    its value and what is allowed. Integers are accepted for floats.
    """

    def __init__(
        self, prefix: str, data: object, defaults: Mapping[str, object] | None = None
    ) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{prefix.rstrip('.') or 'the config'} must be a JSON object")
        self._prefix = prefix
        self._data = cast("dict[str, Any]", data)
        self._defaults = dict(defaults or {})
        self._read: set[str] = set()
        self._idle: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raise the error for the field `name`: its value and what is `allowed`."""
        known = {**self._defaults, **self._data}
        value = f"is {known[name]!r:.80}" if name in known else "is not given"
        raise ConfigError(f"{self._prefix}{name} {value}; it must be {allowed}")

    def refuse_if(self, wrong: bool, name: str, allowed: str) -> None:
        """`refuse`, when `wrong`."""
        if wrong:
            self.refuse(name, allowed)

    def skip(self, names: Iterable[str]) -> None:
        """Accept these keys with any value."""
        self._read.update(names)

    def idle(self, *names: str) -> None:
        """Remember keys whose values change nothing, for `without_effect`."""
        self._read.update(names)
        self._idle += names

    def without_effect(self) -> list[str]:
        """Keys that change nothing: those never read, and those given to `idle`."""
        return sorted({*(set(self._data) - self._read), *self._idle})

    def finish(self) -> None:
        """Refuse keys that were never read."""
        if unknown := sorted(set(self._data) - self._read):
            names = ", ".join(self._prefix + name for name in unknown)
            raise ConfigError(f"unknown field {names}; known here: {', '.join(sorted(self._read))}")

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The raw value."""
        self._read.add(name)
        if name in self._data:
            return self._data[name]
        value = self._defaults.get(name, default)
        if value is _MISSING:
            self.refuse(name, "given")
        return value

    def only(self, name: str, value: object) -> None:
        """Accept the field at `value` alone: other values are known to exist, not supported."""
        given = self.get(name, value)
        kinds = (int, float) if isinstance(value, float) else (type(value),)
        if type(given) not in kinds or given != value:
            self.refuse(name, f"{value!r}: other values are not supported")

    def require(self, name: str, value: object) -> None:
        """As `only`, and the field has to be there."""
        self.get(name)
        self.only(name, value)

    def choice(self, name: str, *allowed: str) -> str:
        """One of `allowed`; the first is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            self.refuse(name, "one of " + ", ".join(allowed))
        return value

    def boolean(self, name: str, default: bool = _MISSING) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def integer(
        self, name: str, default: int = _MISSING, *, least: int, most: int = _LARGEST
    ) -> int:
        """An integer from `least` to `most`."""
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, f"an integer from {least} to {most}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A positive integer, or null."""
        return None if self.get(name, None) is None else self.integer(name, least=1)

    def optional_choices(self, name: str, length: int, *allowed: str) -> list[str] | None:
        """A list of `length` texts, each one of `allowed`; or null."""
        found = self.get(name, None)
        if found is None:
            return None
        items = cast("list[Any]", found) if isinstance(found, list) else []
        if len(items) != length or not all(item in allowed for item in items):
            self.refuse(name, f"a list of {length} of {', '.join(allowed)}")
        return items

    def optional_integers(self, name: str) -> list[int] | None:
        """A list of integers in any order, or null."""
        found = self.get(name, None)
        if found is None:
            return None
        items = cast("list[Any]", found if isinstance(found, list) else [None])
        if not all(type(item) is int for item in items):
            self.refuse(name, "a list of integers")
        return items

    def optional_number(self, name: str, *, above: float = -math.inf) -> float | None:
        """A finite number above a bound, or null."""
        return None if self.get(name, None) is None else self.number(name, above=above)

    def number(
        self,
        name: str,
        default: float = _MISSING,
        *,
        least: float = -math.inf,
        most: float = math.inf,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> float:
        """A finite number in [least, most], (above, below)."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self.refuse(name, "a finite number")
        if not (least <= value <= most and above < value < below):
            bounds = {"at least": least, "at most": most, "above": above, "below": below}
            told = [f"{words} {b:g}" for words, b in bounds.items() if math.isfinite(b)]
            self.refuse(name, " and ".join(told))
        return float(value)

    def indices(self, name: str) -> tuple[int, ...]:
        """A list of distinct layer indices, in ascending order; default empty."""
        value = self.get(name, [])
        items: list[Any] = list(value) if isinstance(value, list | tuple) else [None]
        if not all(type(i) is int and i >= 0 for i in items):
            self.refuse(name, "a list of layer indices")
        if items != sorted(set(items)):
            self.refuse(name, "in ascending order without duplicates")
        return tuple(items)

    def token(self, name: str, vocab: int) -> int | None:
        """A token id, or null."""
        missing = self.get(name, None) is None
        return None if missing else self.integer(name, least=0, most=vocab - 1)

    def tokens(self, name: str, vocab: int) -> int | tuple[int, ...] | None:
        """A token id, a list of them, or null."""
        value = self.get(name, None)
        if not isinstance(value, list | tuple):
            return self.token(name, vocab)
        items = cast("list[Any]", value)
        if not 0 < len(items) <= MAX_TOKENS or not all(
            type(i) is int and 0 <= i < vocab for i in items
        ):
            self.refuse(name, f"at most {MAX_TOKENS} token ids from 0 to {vocab - 1}")
        return tuple(items)

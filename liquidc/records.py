"""Frozen dataclasses from JSON and back, checked field by field.

A record is a frozen dataclass of `int`, `float`, `str`, `bool`, `None`, other records, tuples,
dictionaries with string keys, unions of these, and `Any`. Nothing is converted silently: a field
that is missing, unknown or of another type is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

from liquidc.errors import InputError
from liquidc.files import read_file

T = TypeVar("T")

MAX_JSON_BYTES = 24 * 1024 * 1024
"""Limit of a JSON file: an index of 200,000 tensors. Parsed, it takes up to 10 times its size."""
MAX_DEPTH = 64
"""Limit of objects and lists within each other."""
MAX_CONTAINERS = 1_000_000
"""Limit of objects and lists: each takes up to 200 bytes, and as text only 2."""
MAX_INTEGER = 2**63 - 1
"""Limit of the size of an integer in a record."""


def to_json(value: Any) -> Any:
    """`value` as objects that `json` writes; fields that are None are left out of a record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_json(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in cast(list[Any], value)]
    return value


def canonical(value: Any) -> bytes:
    """The one way to write a JSON value: sorted keys, two spaces, UTF-8, a final newline.

    Bytes of a path that are not UTF-8 are written as the escapes that JSON has for them.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")


def loads(data: bytes | str) -> Any:
    """The value in JSON text, if it can be held in a few times the memory of the text.

    Raises:
        ValueError: it is not JSON, has over `MAX_CONTAINERS` objects and lists, or nests them
            deeper than `MAX_DEPTH`.
    """
    marks = ("[", "{") if isinstance(data, str) else (b"[", b"{")
    if sum(data.count(cast(Any, mark)) for mark in marks) > MAX_CONTAINERS:
        raise ValueError(f"over {MAX_CONTAINERS} objects and lists")
    try:
        value: Any = json.loads(data)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for outer in level:
            items: Any = outer.values() if isinstance(outer, dict) else outer
            if isinstance(outer, dict | list):
                inner += [item for item in items if isinstance(item, dict | list)]
        level, depth = inner, depth + 1
    return value


def parse_json(data: bytes | str, where: str, error: type[InputError]) -> Any:
    """The value in JSON text; see `loads`.

    Args:
        data: the text.
        where: its place, for messages.
        error: class of the error.

    Raises:
        error: it is not JSON, or too much.
    """
    try:
        return loads(data)
    except ValueError as problem:
        raise error(f"{where}: not valid JSON ({problem})") from None


def read_json(path: Path, error: type[InputError], most: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a regular file of at most `most` bytes.

    Raises:
        error: it can't be read, is too large, or is not JSON.
    """
    return parse_json(read_file(path, error, most), str(path), error)


def read_object(path: Path, error: type[InputError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: it can't be read, is too large, is not JSON, or no object.
    """
    data = read_json(path, error)
    if not isinstance(data, dict):
        raise error(f"{path}: must be a JSON object")
    return cast("dict[str, Any]", data)


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """A record of class `kind` from parsed JSON.

    Args:
        kind: a frozen dataclass.
        value: what `json.loads` gave.
        where: path of the value, for messages.

    Raises:
        ValueError: the value does not fit; the message names the field.
    """
    return cast(T, _read(kind, value, where))


def check_fields(record: Any) -> None:
    """Check the types of a dataclass's fields, whatever its caller passed.

    Args:
        record: its fields are of `str`, `bool`, `int`, `float` (which takes an `int`), `Path`,
            tuples of these, or None.

    Raises:
        ValueError: a value is of another type; the message names the field.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not _is(hints[field.name], value):
            wanted = str(getattr(hints[field.name], "__name__", hints[field.name]))
            kind = type(value).__name__
            wanted = wanted.replace("pathlib.", "")
            raise ValueError(f"{field.name} must be {wanted}, not {value!r:.40} of type {kind}")


def _is(kind: Any, value: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(option, value) for option in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        given = cast("tuple[Any, ...]", value)
        kinds = args[:1] * len(given) if args[-1] is Ellipsis else args
        return len(given) == len(kinds) and all(map(_is, kinds, given))
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    return isinstance(value, kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_record(cast(type[Any], kind), value, where)
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {key: _read(args[1], item, f"{where}.{key:.80}") for key, item in items}
    if origin is tuple:
        items = _expect(list, value, where)
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{where} must be a finite number, not {_shown(value)}")
        return float(value)
    if kind is int and type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise ValueError(f"{where} must be an integer of 64 bits, not {_shown(value)}")
    return _expect(kind, value, where)


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is type(value):
            return _read(option, value, where)
    rest = [o for o in options if o is not type(None) and o not in (int, str, bool, float)]
    if len(rest) != 1:
        raise ValueError(f"{where} can't be {_shown(value)}")
    return _read(rest[0], value, where)


def _read_record(kind: type[Any], value: Any, where: str) -> Any:
    items = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(items.keys() - fields.keys()):
        raise ValueError(f"{prefix}{unknown[0]:.80} is not a known field")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in items and not optional:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**{name: _read(hints[name], items[name], f"{prefix}{name}") for name in items})


def _expect(kind: type[Any], value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where or 'the value'} must be {_NAMES[kind]}, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


_NAMES: dict[type[Any], str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}

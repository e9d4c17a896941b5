"""Mutations of files, made by a seeded generator: of bytes, of JSON values, of lines."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

FORGED = "\n\x1b[31merror: forged"
"""A string that would look like a message of ours if it reached a terminal as it is."""


def nested(kind: str, depth: int = 10_000) -> str:
    """JSON text of lists or objects within each other."""
    return "[" * depth + "]" * depth if kind == "[" else '{"a":' * depth + "1" + "}" * depth


RAW = (
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "-0.0",
    "5e-324",
    "1e39",
    '"\\ud800"',
    '"\\u0000"',
    '{"a": 1, "a": {}}',
    nested("["),
    nested("{"),
)
"""JSON text of values that `json.dumps` does not write."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1000,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    0.5,
    -0.5,
    1.0,
    1e300,
    "",
    "x",
    "1",
    "../x",
    "/dev/zero",
    FORGED,
    "x" * 100_000,
    "%s{}$",
    "\x9b31m\x7f\u202e",
    [],
    {},
    [[]],
    [1, "x", None],
    {"a": 1},
    [0] * 10_000,
)
"""Values of other types, other sizes, and other contents."""


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One mutation that knows nothing about the format."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 64, 1000)))

    def flip() -> bytes:
        place = min(at, max(len(data) - 1, 0))
        return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]

    changes: tuple[Callable[[], bytes], ...] = (
        lambda: b"",
        lambda: data[:at],
        lambda: data[:at] + data[end:],
        lambda: data[:end] + data[at:],
        lambda: data[:at] + data[at:end] * 50 + data[end:],
        lambda: data[:at] + b"\xff\xc3(" + data[at:],
        lambda: data[:at] + b"\0" + data[at:],
        lambda: data[:at] + FORGED.encode() + data[at:],
        lambda: data[:at] + b"\xed\xa0\x80" + data[at:],
        lambda: data[:at] + random.randbytes(8) + data[end:],
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data + data,
    )
    return random.choice((flip, flip, flip, *changes))() if data else data


def mutate_json(random: Random, value: Any) -> bytes:
    """JSON text of a value in which one place was changed, sometimes two or three."""
    changed, raw = copy.deepcopy(value), random.choice(RAW)
    if random.random() < 0.3:
        with contextlib.suppress(ValueError, RecursionError):
            changed = json.loads(mutate_json(random, changed))
    hole = "a hole for raw text"
    holder, key = random.choice(list(_places(changed)) or [(changed, None)])
    inside = holder[key] if key is not None else holder
    new: Any = random.choice((hole, hole, *[random.choice(VALUES)] * 5))
    if type(inside) in (int, float) and random.random() < 0.4:
        new = random.choice((inside + 1, inside - 1, -inside, inside * 2, inside * 10**9))
    elif isinstance(inside, str) and random.random() < 0.3:
        new = random.choice((inside + FORGED, FORGED + inside, inside[:-1], inside.upper()))
    if key is None:
        changed = new
    elif random.random() < 0.7:
        holder[key] = new
    elif isinstance(holder, dict):
        way = random.randrange(4)
        moved = holder.pop(key)
        if way == 1:
            holder[f"{key}{FORGED}"] = moved
        elif way == 2:
            holder[str(random.choice(VALUES))] = moved
        elif way == 3:
            holder[key] = {key: moved, "more": [moved]}
    else:
        holder[key : key + 1] = random.choice(
            ([], [inside, inside], [inside] * 1000, [new, inside])
        )
    text = json.dumps(changed, ensure_ascii=random.random() < 0.5)
    return text.replace(f'"{hole}"', raw).encode(errors="surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """The objects and lists in a value, each with the keys of what is inside of it."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        if isinstance(holder, dict):
            keys: list[Any] = list(holder)
        elif isinstance(holder, list):
            keys = list(range(len(holder)))
        else:
            continue
        found += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys]
    return found


def mutate_text(random: Random, text: str) -> bytes:
    """One mutation of lines and of words between punctuation."""
    lines = text.splitlines(keepends=True)
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    words = text.split(" ")
    word = random.randrange(len(words))
    numbers = [i for i, w in enumerate(words) if any(c.isdigit() for c in w)] or [word]
    number = random.choice(numbers)
    large = random.choice(("10" * 200, "1e400", "-1", "0", "999999999999999999", "4294967296"))

    def digits(text: str) -> str:
        return "".join(large if c.isdigit() and random.random() < 0.5 else c for c in text)

    changes: tuple[Callable[[], str], ...] = (
        lambda: "".join(lines[:at] + lines[at + 1 :]),
        lambda: "".join([*lines[:at], lines[at], *lines[at:]]),
        lambda: "".join([*lines[:at], lines[other], *lines[at + 1 :]]),
        lambda: "".join([*lines[:at], *lines[at : at + 1] * 1000, *lines[at:]]),
        lambda: " ".join([*words[:word], *words[word + 1 :]]),
        lambda: " ".join([*words[:word], random.choice(words), *words[word + 1 :]]),
        lambda: " ".join([*words[:number], digits(words[number]), *words[number + 1 :]]),
        lambda: " ".join([*words[:number], digits(words[number]), *words[number + 1 :]]),
        lambda: " ".join([*words[:number], digits(words[number]), *words[number + 1 :]]),
        lambda: " ".join([*words[:word], f'"{FORGED}"', *words[word + 1 :]]),
        lambda: " ".join([*words[:word], f'"{"x" * 100_000}"', *words[word:]]),
        lambda: " ".join([*words[:word], random.choice(("[", "(", "{")) * 10_000, *words[word:]]),
        lambda: " ".join([*words[:word], random.choice((FORGED, "é", "\0")), *words[word:]]),
    )
    return random.choice(changes)().encode(errors="surrogatepass")

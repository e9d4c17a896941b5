"""What strings may hold: Python has strings that no encoding can write, and that forge output."""

from __future__ import annotations

import re


def is_text(text: str) -> bool:
    """Whether a string can be written in UTF-8: it holds no lone surrogate.

    Lone surrogates stand for bytes that are not UTF-8 in what comes from the command line, and JSON
    can spell them.
    """
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str, keep: str = "") -> str:
    r"""`text` with escapes such as `\n` and `\x1b` for what a terminal obeys or does not show.

    What comes from a file could otherwise forge lines, colours and the clipboard.

    Args:
        text: anything.
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def without_controls(text: str) -> str:
    """`text` with escapes for control characters; lines, tabs and all of Unicode's scripts stay."""
    return _CONTROLS.sub(lambda match: _escape(match[0]), text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()

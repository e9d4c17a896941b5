"""Strings that are text: Python also has strings that no encoding can write."""

from __future__ import annotations


def is_text(text: str) -> bool:
    """Whether a string can be written in UTF-8: it holds no lone surrogate.

    Lone surrogates stand for bytes that are not UTF-8 in what comes from the command line, and JSON
    can spell them.
    """
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)

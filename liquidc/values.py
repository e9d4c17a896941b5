"""Checks of what a caller passes from Python, where any object can come."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from liquidc.errors import InputError


def integer(value: Any, what: str) -> int:
    """An integer of Python, numpy or PyTorch; True and False are none.

    Args:
        value: what was given.
        what: it is, for messages.

    Raises:
        InputError: it is of another type.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{what} must be an integer, not {_shown(value)}")


def number(value: Any, what: str) -> float:
    """A real number, of Python or of numpy; True and False are none.

    Raises:
        InputError: it is of another type, or too large for a float.
    """
    real = isinstance(value, numbers.Real | np.integer | np.floating)
    if isinstance(value, bool) or not real:
        raise InputError(f"{what} must be a number, not {_shown(value)}")
    try:
        return float(cast(float, value))
    except OverflowError:
        raise InputError(f"{what} is too large") from None


def integers(values: Any, what: str) -> list[int]:
    """A list of integers, from any iterable but a text.

    Raises:
        InputError: it is not one.
    """
    return [integer(value, what) for value in items(values, what)]


def items(values: Any, what: str) -> list[Any]:
    """What an iterable holds that is not a text.

    Raises:
        InputError: it is not one.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list, not {_shown(values)}")
    try:
        return list(cast("Iterable[Any]", values))
    except TypeError:  # an array without dimensions
        raise InputError(f"{what} must be a list, not {_shown(values)}") from None


def path_of(value: Any, what: str) -> Path:
    """A path, from a text or a path.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, str | PathLike):
        raise InputError(f"{what} must be a path, not {_shown(value)}")
    return Path(cast("str | PathLike[str]", value))


def _shown(value: Any) -> str:
    """A value with its type, shortened."""
    return f"{value!r:.40} of type {type(value).__name__}"

"""The targets by name. A backend is imported when it is asked for; its vendor library is not."""

from __future__ import annotations

import importlib

from liquidc.backends.base import Backend
from liquidc.errors import InputError

TARGETS = {
    "onnxruntime": "liquidc.backends.onnxruntime.backend",
    "onnxruntime-fixed": "liquidc.backends.onnxruntime_fixed.backend",
    "null": "liquidc.backends.null.backend",
}
"""Module of each backend; it has a `BACKEND`. Importing it imports no vendor library."""


def get_backend(name: str) -> Backend:
    """The backend `name`.

    Raises:
        InputError: there is none.
    """
    if name not in TARGETS:
        raise InputError(f"no target {name!r}; there are {', '.join(sorted(TARGETS))}")
    backend = importlib.import_module(TARGETS[name]).BACKEND
    if not isinstance(backend, Backend):
        raise TypeError(f"{TARGETS[name]}.BACKEND is no Backend")
    return backend

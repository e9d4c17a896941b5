"""The line of a user's model that a traced operator or an error comes from."""

from __future__ import annotations

import re
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

from liquidc.ir import Location

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*'
    r'(?:\n[ \t]+(?!File ")(?P<code>[^\n]*))?'
)
_PACKAGE = Path(__file__).resolve().parent.parent
_TORCH = Path(torch.__file__).resolve().parent
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
_TYPED = ("<stdin>", "<string>", "<ipython-input")
"""What Python calls code that has no file, as it is typed into a shell; others are generated."""

MAX_CODE = 120
"""Characters of a line that a message shows."""

_PLUMBING = (
    "exporting.py",
    "functional.py",
    "importer.py",
    "parts.py",
    "prepare.py",
    "protocol.py",
    "semantic_import.py",
    "semantic_ops.py",
    "sizes.py",
    "trace.py",
)
"""Files of the frontend whose lines are never the user's."""


@lru_cache(maxsize=4096)  # the ops of a layer are imported again for every layer that is alike
def source_line(stack: str | None) -> tuple[Location, str] | None:
    """The innermost line of the model in a formatted stack, and its code, "" if that is unknown."""
    for frame in reversed(list(_FRAME.finditer(stack or ""))):
        name, line = frame["file"], int(frame["line"])
        if name.startswith("<"):
            if name.startswith(_TYPED):
                return Location(name, line), ""
            continue
        path = Path(name)
        if _is_library(path) or (path.name in _PLUMBING and path.parent.name == "frontend"):
            continue
        return Location(stable_path(path), line), (frame["code"] or "").strip()
    return None


def _is_library(path: Path) -> bool:
    """Whether a file is PyTorch's or Python's own."""
    if path.parts[:1] == ("torch",) or path.is_relative_to(_TORCH):
        return True
    return path.is_relative_to(_STANDARD) and "site-packages" not in path.parts


def place(stack: str | None) -> str:
    """`model.py:7: `x = y`` for the innermost line of the model in a stack; "" if there is none."""
    found = source_line(stack)
    if found is None:
        return ""
    location, code = found
    code = code if len(code) <= MAX_CODE else f"{code[:MAX_CODE]} …"
    return f"{location}: `{code}`" if code else str(location)


def stable_path(path: Path) -> str:
    """`path` without what differs between machines: from the package, else the file's name."""
    resolved = path.resolve()
    if resolved.is_relative_to(_PACKAGE):
        return resolved.relative_to(_PACKAGE).as_posix()
    return path.name

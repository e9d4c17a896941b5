"""Reading files of a model: a link is followed, and what is not a regular file is never opened.

Opening a FIFO waits for a writer, and opening a device can do anything. In the cache of the Hugging
Face hub every file of a model is a link to `../../blobs/HASH`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from liquidc.errors import InputError


def check_regular(path: Path, error: type[InputError]) -> None:
    """Check that `path` is a regular file or a link to one, without opening it.

    Raises:
        error: it is not, or it does not exist.
    """
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        broken = problem.errno == errno.ENOENT and path.is_symlink()
        reason = "the link leads to no file; download it again" if broken else problem.strerror
        raise error(f"{path}: can't be read ({reason})") from None
    if not stat.S_ISREG(mode):
        reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "not a regular file"
        raise error(f"{path}: can't be read ({reason})")


def read_file(path: Path, error: type[InputError]) -> bytes:
    """The bytes of a regular file, links followed.

    Raises:
        error: it can't be read.
    """
    check_regular(path, error)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: can't be read ({problem.strerror})") from None

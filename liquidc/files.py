"""Reading files that a user or a model names: regular files of a bounded size; links are followed.

Opening a FIFO waits for a writer, and opening a device can do anything. In the cache of the Hugging
Face hub every file of a model is a link to `../../blobs/HASH`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from liquidc.errors import InputError

MAX_BYTES = 64 * 1024 * 1024
"""Limit of a file that is read whole. The largest tokenizer.json of known models has 40 MB."""


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


def open_regular(path: Path, error: type[InputError]) -> BinaryIO:
    """Open a regular file, links followed.

    Raises:
        error: it is not one, or it can't be read.
    """
    check_regular(path, error)
    try:
        # A FIFO that has taken the file's place since then does not block, and is refused below.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as problem:
        raise error(f"{path}: can't be read ({problem.strerror})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise error(f"{path}: can't be read (not a regular file)")
    return file


def read_file(path: Path, error: type[InputError], most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file, links followed.

    Args:
        path: the file.
        error: class of the error.
        most: a larger file is refused unread.

    Raises:
        error: it can't be read, or is too large.
    """
    with open_regular(path, error) as file:
        try:
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
        except OSError as problem:
            raise error(f"{path}: can't be read ({problem.strerror})") from None
    if data is None or len(data) > most:
        raise error(f"{path}: larger than {most} bytes; it is not read")
    return data


def read_utf8(path: Path, error: type[InputError], most: int = MAX_BYTES) -> str:
    """The text in a UTF-8 file; arguments as for `read_file`.

    Raises:
        error: it can't be read, is too large, or is not UTF-8.
    """
    try:
        return read_file(path, error, most).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text (byte {problem.start}); convert it") from None

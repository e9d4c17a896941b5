"""Files that are there whole or not at all, and the places where outputs can be written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from liquidc.errors import InputError

PARTIAL = ".partial"
REPLACED = ".replaced"
RESERVED = (PARTIAL, REPLACED)
NEW = ".new"
"""Suffix of a file that is renamed to its place when it is whole."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def cannot_write(output: Path, error: OSError, end: str = "") -> InputError | None:
    """The one line that says why `output` can't be written, if that is what `error` means.

    Args:
        output: the file or directory to be.
        error: what writing it raised.
        end: what was kept; by default, that nothing was written.
    """
    if error.errno in _FULL:
        reason = f"{output}: {os.strerror(error.errno)}; free some space or write elsewhere"
        return InputError(f"{reason}; {end or 'nothing was written'}")
    if error.errno in _DENIED:
        reason = f"{output}: can't be written ({os.strerror(error.errno)})"
        return InputError(f"{reason}; {end}" if end else reason)
    return None


@contextmanager
def writing(output: Path) -> Generator[None]:
    """Say in one line that `output` can't be written, when that is what an OSError means.

    Raises:
        InputError: no space, no permission, a read-only file system.
    """
    try:
        yield
    except OSError as error:
        if (refusal := cannot_write(output, error)) is not None:
            raise refusal from None
        raise


def check_name(output: Path, noun: str) -> None:
    """Check that a path ends in the name of something that can be written.

    Args:
        output: the file or directory to be.
        noun: what it is, for messages: "an engine".

    Raises:
        InputError: it is the root, `.`, `..` or a name that is used while outputs are written.
    """
    if output.name in ("", "..") or "\0" in str(output) or output.name.endswith(RESERVED):
        shown = str(output).replace("\0", "\\0")
        raise InputError(f"{shown}: not a name for {noun}; choose another")


def check_parents(output: Path, beside: Iterable[str]) -> None:
    """Check that a file or directory can be made at a path.

    Args:
        output: the path, absolute.
        beside: suffixes of the names that are used beside it while it is written.

    Raises:
        InputError: a name is too long, or what is above is no directory or can't be written.
    """
    parent = next(path for path in output.parents if os.path.lexists(path))
    if not parent.is_dir():
        raise InputError(f"{parent}: not a directory; write elsewhere")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    *above, name = output.relative_to(parent).parts
    if any(len(os.fsencode(part)) > longest for part in above):
        raise InputError(f"{output}: the name of a directory is too long; write elsewhere")
    longest -= max(map(len, beside))
    if len(os.fsencode(name)) > longest:
        raise InputError(f"{output}: the name is too long; choose one of at most {longest} bytes")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent}: can't be written (permission denied)")


def check_file(output: Path, noun: str, *, force: bool, beside: Iterable[str] = (NEW,)) -> None:
    """Find out that a file can't be written, before any work is done.

    Args:
        output: the file to be, in a directory that exists.
        noun: what it is, for messages: "a profile".
        force: replace a file that is there.
        beside: suffixes of the names of the files that are used beside it.

    Raises:
        InputError: it can't.
    """
    check_name(output, noun)
    if os.path.lexists(output) and not force:
        raise InputError(f"{output}: exists already; --force replaces it")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such directory")
    with writing(output):
        check_parents(Path(os.path.abspath(output)), beside)
    for path in (output, *(output.with_name(output.name + suffix) for suffix in beside)):
        if os.path.lexists(path) and not is_kind(path, stat.S_IFREG):
            raise InputError(f"{path}: in the way and not a file; move it elsewhere")


def replace_file(output: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    aside = output.with_name(output.name + NEW)
    try:
        write_durably(aside, data)
        os.replace(aside, output)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def is_kind(path: Path, kind: int) -> bool:
    """Whether `path` itself, and not what a link there leads to, is of a kind such as S_IFREG."""
    try:
        return stat.S_IFMT(path.lstat().st_mode) == kind
    except OSError:
        return False


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

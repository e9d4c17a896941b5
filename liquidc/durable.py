"""Output directories that are there whole or not at all, whenever the process is killed.

`NAME` is filled as `NAME.partial`, made durable and renamed into its place; a directory that was
there waits as `NAME.replaced` between the two renames. A file in `NAME.partial` marks it as ours
until it is whole, and a lock tells a process that runs from one that was killed. Directories are
removed file by file in an order in which what a kill leaves is still recognised.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from liquidc.errors import InputError, LiquidError
from liquidc.interrupt import Interruptible

PARTIAL = ".partial"
REPLACED = ".replaced"
RESERVED = (PARTIAL, REPLACED)
NEW = ".new"
"""Suffix of a file that is renamed to its place when it is whole."""
MARK = ".liquidc-partial"
"""The file that marks an unfinished directory as ours; of an engine it is the journal."""

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


class DirectoryWriter(ABC):
    """Writes one directory: `with Writer(output) as w:` fill `w.path`, then call `w.place()`.

    Args:
        output: the directory to be; directories above it are made, and unmade on failure.
        force: replace one that is there.

    Attributes:
        path: the directory to fill.

    Raises:
        InputError: the output exists, is not ours, or can't be written.
    """

    noun: ClassVar[str]
    """What is written, for messages: "an engine"."""
    last: ClassVar[str]
    """The file by which `refuse_unless_ours` recognises a directory."""
    beside: ClassVar[tuple[str, ...]] = RESERVED
    """Suffixes of the names used beside the output."""

    def __init__(self, output: Path, *, force: bool = False) -> None:
        check_name(output, self.noun)
        self.output = Path(os.path.realpath(output))
        self.force = force
        self.path = self.output.with_name(self.output.name + PARTIAL)
        self._mark = self.path / MARK
        self._replaced = self.output.with_name(self.output.name + REPLACED)
        self._lock: int | None = None
        self._committed = False
        self._made: list[Path] = []
        """Directories above it that were made."""
        self._signals = Interruptible()

    @staticmethod
    @abstractmethod
    def refuse_unless_ours(path: Path) -> None:
        """Check that deleting `path` deletes such a directory and nothing else.

        Raises:
            InputError: it is something else, or holds a file that is not part of one.
        """

    def files_beside(self) -> tuple[tuple[Path, Path], ...]:
        """Files that are renamed together with the directory: from where, and to where."""
        return ()

    def continues(self) -> bool:
        """Whether to go on with what a killed process left in `path`."""
        return False

    def kept(self, error: BaseException | None) -> str:
        """What stays after an error and how to go on with it; empty if all is removed."""
        del error
        return ""

    def check(self) -> None:
        """Find out that the output can't be written before any work is done.

        What a killed process left between its renames is finished first.

        Raises:
            InputError: it can't.
        """
        with writing(self.output):
            self.check_places()
            self._recover()
            self.check_output()

    def check_places(self) -> None:
        """Check that nothing else is where the output and what is beside it are to be.

        Raises:
            InputError: something is.
        """
        check_name(self.output, self.noun)
        check_parents(self.output, self.beside)
        for path in (self.path, self._replaced):
            if os.path.lexists(path) and not self._removable(path):
                raise InputError(f"{path}: in the way and not ours; move it elsewhere")
        for path in (path for pair in self.files_beside() for path in pair):
            if os.path.lexists(path) and not is_kind(path, stat.S_IFREG):
                raise InputError(f"{path}: in the way and not a file; move it elsewhere")

    def check_output(self) -> None:
        """Check that the output is not there, or may be replaced.

        Raises:
            InputError: it is there and may not.
        """
        there = [path for path in (self.output, self._replaced) if os.path.lexists(path)]
        if not there:
            return
        if not self.force:
            raise InputError(f"{self.output}: exists already; --force replaces it")
        if os.path.ismount(self.output):
            raise InputError(f"{self.output}: not replaced, for it is a mount point")
        self.refuse_unless_ours(there[0])

    def _removable(self, path: Path) -> bool:
        """Whether a directory was left by a killed process: marked, empty, or whole."""
        if not is_kind(path, stat.S_IFDIR):
            return False
        if is_kind(path / MARK, stat.S_IFREG) or not os.listdir(path):
            return True
        return self.is_ours(path)

    def is_ours(self, path: Path) -> bool:
        """See `refuse_unless_ours`."""
        try:
            self.refuse_unless_ours(path)
        except InputError:
            return False
        return True

    def is_whole(self, path: Path) -> bool:
        """Whether it is ours and nothing of it was removed."""
        return self.is_ours(path)

    def _recover(self) -> None:
        """Finish what a killed process left between its renames, or while removing."""
        if not os.path.lexists(self._replaced):
            return
        for path in (self.path, self.output):
            if is_kind(path, stat.S_IFDIR):
                os.close(_lock(path))  # another process may be between its renames just now
        if not os.path.lexists(self.output):
            if not is_kind(self._mark, stat.S_IFREG) and self.is_whole(self.path):
                self._rename()
            elif self.is_whole(self._replaced):
                os.rename(self._replaced, self.output)
                return
        self._remove(self._replaced)

    def __enter__(self) -> Self:
        self._signals.__enter__()
        try:
            self._signals.hold()
            try:
                self.check()
                with writing(self.output):
                    self._create()
            except OSError as error:
                reason = f"{self.output}: can't be written ({error.strerror})"
                raise InputError(reason) from None
            self._signals.release()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _create(self) -> None:
        for parent in reversed(self.output.parents):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)
        if os.path.lexists(self.path):
            self.lock()
            if self.continues():
                return
            self._remove(self.path)
            self.unlock()
        self.path.mkdir()
        self.lock()
        self._mark.touch()
        sync(self.path)

    def place(self) -> None:
        """Make the names in the directory durable and rename it into its place.

        The mark goes last and comes back if a rename fails. From then on signals are held.
        """
        for directory, _, _ in os.walk(self.path):
            sync(Path(directory))
        self._signals.hold()
        marked = self._mark.read_bytes()
        try:
            self._mark.unlink()
            sync(self.path)
            if os.path.lexists(self.output):
                os.rename(self.output, self._replaced)
            self._rename()
        except OSError:
            if os.path.lexists(self._replaced) and not os.path.lexists(self.output):
                os.rename(self._replaced, self.output)
            with suppress(OSError):
                self._mark.write_bytes(marked)
            raise
        self._committed = True
        sync(self.output.parent)
        if os.path.lexists(self._replaced):
            self._remove(self._replaced)

    def _rename(self) -> None:
        for path, place in self.files_beside():
            if os.path.lexists(path):
                os.replace(path, place)
        os.rename(self.path, self.output)

    def _remove(self, path: Path) -> None:
        """Remove a directory of ours; `last` and the mark go last, so that it remains ours."""
        with suppress(FileNotFoundError):  # another process recovers too
            order = ["", self.last, MARK]
            for name in sorted(os.listdir(path), key=lambda n: order.index(n) if n in order else 0):
                if is_kind(path / name, stat.S_IFDIR):
                    shutil.rmtree(path / name)
                else:
                    (path / name).unlink()
            path.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.hold()
        kept = ""
        if self._lock is not None:
            if not self._committed:
                kept = self.kept(error)
                with suppress(OSError):
                    if not kept:
                        self._remove(self.path)
                    for path, _ in self.files_beside():
                        path.unlink(missing_ok=True)
            self.unlock()
        if not self._committed:
            for parent in reversed(self._made):
                with suppress(OSError):
                    parent.rmdir()
        self._signals.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            if (refusal := cannot_write(self.output, error, kept)) is not None:
                raise refusal from None
        if kept and not isinstance(error, LiquidError | None):
            error.add_note(kept)

    def lock(self) -> None:
        """Keep other processes from writing there, as long as this one lives.

        Raises:
            InputError: another process is writing there.
        """
        self._lock = _lock(self.path)

    def unlock(self) -> None:
        """Let other processes write there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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


def _lock(path: Path) -> int:
    """A lock on a directory, which ends with the process.

    Raises:
        InputError: another process holds it, or replaced the directory meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise InputError(f"{path}: another process is writing there")

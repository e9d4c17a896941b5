"""Output directories that are there whole or not at all, whenever the process is killed.

`NAME` is filled as `NAME.partial`, made durable and renamed into its place; a directory that was
there waits as `NAME.replaced` between the two renames. A file in `NAME.partial` marks it as ours
until it is whole, and a lock tells a process that runs from one that was killed. Directories are
removed file by file in an order in which what a kill leaves is still recognised.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from liquidc.durable import (
    PARTIAL,
    REPLACED,
    RESERVED,
    cannot_write,
    check_name,
    check_parents,
    is_kind,
    sync,
    writing,
)
from liquidc.errors import InputError, LiquidError
from liquidc.interrupt import Interruptible

MARK = ".liquidc-partial"
"""The file that marks an unfinished directory as ours; of an engine it is the journal."""


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
            for name in sorted(os.listdir(path), key=lambda n: (n == MARK, n == self.last)):
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

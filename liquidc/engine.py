"""The engine directory: written whole or not at all, checked whole before anything is read.

A compile writes to `ENGINE.partial/`, makes every byte durable, writes the manifest last and
renames the directory into place. Whatever goes wrong before, Ctrl-C included, removes it; but with
`resume` it stays if anything in it is complete. The directory is locked while it is written, so
what a killed compile left is told from one that runs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from liquidc.errors import EngineError, InputError
from liquidc.interrupt import Interruptible
from liquidc.journal import Journal
from liquidc.manifest import MANIFEST, MAX_BYTES, FileInfo, Manifest, parse_manifest

PARTIAL = ".partial"
REPLACED = ".replaced"
BUILD_LOG = ".build.json"
MARK = ".liquidc-partial"
"""The file that tells our unfinished directory from a user's: its journal."""
SCRATCH = "scratch.partial"
"""Directory in the unfinished one for what is no part of the engine."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def build_log_path(engine: Path) -> Path:
    """Where the build log of `engine` is: beside it."""
    return engine.with_name(engine.name + BUILD_LOG)


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(output: Path, *, resume: bool = False) -> Generator[None]:
    """Say in one line that `output` can't be written, when that is what an OSError means.

    Args:
        output: the engine.
        resume: what is complete will be kept.

    Raises:
        InputError: no space, no permission, a read-only file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = f"{output}: {os.strerror(error.errno)}; free some space or write elsewhere"
            end = "go on with --resume" if resume else "nothing was written"
            raise InputError(f"{reason}; {end}") from None
        if error.errno in _DENIED:
            raise InputError(f"{output}: can't be written ({os.strerror(error.errno)})") from None
        raise


class EngineWriter:
    """Writes one engine: `with EngineWriter(output) as w:` fill `w.path`, then `w.commit(…)`.

    Args:
        output: the engine directory to be; directories above it are made, and unmade on failure.
        force: replace an engine that is there.
        resume: go on where a killed compile stopped, and keep what is complete if this one stops.

    Attributes:
        path: the directory to fill.
        scratch: a directory to be, for files that are removed in the end.
        journal: what is complete; after a killed compile, what that one completed.

    Raises:
        InputError: the output exists, is no engine of ours, or can't be written.
    """

    def __init__(self, output: Path, *, force: bool = False, resume: bool = False) -> None:
        self.output = Path(os.path.realpath(output))
        self.force, self.resume = force, resume
        self.path = self.output.with_name(self.output.name + PARTIAL)
        self.scratch = self.path / SCRATCH
        self.journal = Journal(self.path / MARK)
        self._files: dict[str, FileInfo] | None = None
        self._replaced = self.output.with_name(self.output.name + REPLACED)
        self._log = build_log_path(self.output)
        self._partial_log = self._log.with_name(self._log.name + PARTIAL)
        self._lock: int | None = None
        self._committed = False
        self._made: list[Path] = []
        self._signals = Interruptible()

    def check(self) -> None:
        """Find out that the output can't be written before any work is done.

        Raises:
            InputError: it can't; nothing was changed.
        """
        parent = next(path for path in self.output.parents if os.path.lexists(path))
        if self.output.name.endswith((PARTIAL, REPLACED)) or not self.output.name:
            raise InputError(f"{self.output}: not a name for an engine; choose another")
        if not parent.is_dir():
            raise InputError(f"{parent}: not a directory; write elsewhere")
        if os.path.lexists(self.output):
            if not self.force:
                raise InputError(f"{self.output}: exists already; --force replaces it")
            refuse_unless_ours(self.output)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{parent}: can't be written (permission denied)")

    def look(self) -> Journal | None:
        """The journal of a killed compile that `resume` would continue; nothing is changed.

        Raises:
            InputError: the output can't be written, or another compile is writing there.
        """
        self.check()
        if not self.path.exists():
            return None
        left = os.listdir(self.path)
        if left and MARK not in left and not _is_engine(self.path):
            raise InputError(f"{self.path}: in the way and not ours; move it elsewhere")
        os.close(_lock(self.path))
        if not self.resume or MARK not in left:
            return None
        journal = Journal(self.path / MARK)
        journal.load(repair=False)
        return journal if journal.started else None

    def __enter__(self) -> Self:
        self._signals.__enter__()
        try:
            self.check()
            self._signals.hold()
            try:
                with writing(self.output):
                    self._recover()
                    self._create()
            except OSError as error:
                reason = f"{self.output}: can't be written ({error.strerror})"
                raise InputError(reason) from None
            self._signals.release()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _recover(self) -> None:
        """Finish what a killed compile left between its two renames."""
        if not self._replaced.exists():
            return
        refuse_unless_ours(self._replaced)
        if self.output.exists():
            shutil.rmtree(self._replaced)
        else:
            os.rename(self._replaced, self.output)
            self.check()

    def _create(self) -> None:
        for parent in reversed(self.output.parents):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)
        if self.path.exists():
            self._lock = _lock(self.path)
            left = os.listdir(self.path)
            if left and MARK not in left and not _is_engine(self.path):
                self._unlock()
                raise InputError(f"{self.path}: in the way and not ours; move it elsewhere")
            if self.resume and MARK in left:
                self.journal.load()
                if self.journal.started:
                    return
            shutil.rmtree(self.path)
            self._unlock()
        self.path.mkdir()
        self._lock = _lock(self.path)
        (self.path / MARK).touch()
        sync(self.path)

    def seal(self) -> None:
        """Make what was written durable and hash it; `commit` does it unless it was done."""
        with writing(self.output, resume=self.resume):
            names = [
                name
                for name in list_files(self.path)
                if name not in (MANIFEST, MARK) and not name.startswith(f"{SCRATCH}/")
            ]
            self._files = {name: self._file(name) for name in names}

    def commit(self, manifest: Manifest, log: bytes) -> Manifest:
        """Make the engine durable and rename it into place; the only way that one comes to be.

        Args:
            manifest: everything but `files`, which is filled in here.
            log: the build log, written beside the engine.

        Returns:
            The manifest as written.
        """
        if self._files is None:
            self.seal()
        with writing(self.output, resume=self.resume):
            manifest = replace(manifest, files=self._files or {})
            write_durably(self.path / MANIFEST, manifest.to_bytes())
            if self.scratch.exists():
                shutil.rmtree(self.scratch)
            (self.path / MARK).unlink()
            for directory, _, _ in os.walk(self.path):
                sync(Path(directory))
            write_durably(self._partial_log, log)
            self._signals.hold()
            if self.output.exists():
                os.rename(self.output, self._replaced)
            try:
                os.rename(self.path, self.output)
            except OSError:
                if self._replaced.exists():
                    os.rename(self._replaced, self.output)
                raise
            self._committed = True
            os.replace(self._partial_log, self._log)
            sync(self.output.parent)
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
        return manifest

    def _file(self, name: str) -> FileInfo:
        path = self.path / name
        sync(path)
        return FileInfo(path.stat().st_size, sha256_file(path))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.hold()
        if self._lock is not None:
            if not self._committed:
                if not (self.resume and self.journal.started and (self.path / MARK).exists()):
                    shutil.rmtree(self.path, ignore_errors=True)
                self._partial_log.unlink(missing_ok=True)
            self._unlock()
        if not self._committed:
            for parent in reversed(self._made):
                with suppress(OSError):
                    parent.rmdir()
        self._signals.__exit__(kind, error, trace)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def refuse_unless_ours(path: Path) -> None:
    """Check that deleting `path` deletes an engine and nothing else.

    Raises:
        InputError: it is something else, or holds a file that no compile wrote.
    """
    try:
        manifest = read_manifest(path)
        extra = sorted(set(list_files(path)) - manifest.files.keys() - {MANIFEST})
    except EngineError as error:
        raise InputError(
            f"{path}: not replaced, for it is no engine of liquidc ({error})"
        ) from None
    if extra:
        raise InputError(f"{path}: not replaced, for {extra[0]} is not part of the engine")


def _is_engine(path: Path) -> bool:
    """Whether a directory holds a whole engine and nothing else."""
    try:
        refuse_unless_ours(path)
    except InputError:
        return False
    return True


def read_manifest(path: Path) -> Manifest:
    """The manifest of the engine at `path`; no other file is looked at.

    Raises:
        EngineError: there is none, or it is damaged or too new.
    """
    if path.name.endswith(PARTIAL):
        raise EngineError(f"{path}: the unfinished engine of a compile that runs or was killed")
    if not path.is_dir():
        raise EngineError(f"{path}: {'not a directory' if path.exists() else 'no such engine'}")
    file = path / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > MAX_BYTES:
            raise EngineError(f"{file}: not a manifest")
        data = file.read_bytes()
    except FileNotFoundError:
        raise EngineError(f"{file}: missing; {path} is not an engine of liquidc") from None
    except OSError as error:
        raise EngineError(f"{file}: can't be read ({error.strerror})") from None
    return parse_manifest(data, str(file))


def check_files(path: Path, manifest: Manifest) -> None:
    """Compare the files of the engine at `path` with its manifest: names, sizes, hashes.

    Raises:
        EngineError: a file is missing, too much, changed, or not a plain file.
    """
    present = set(list_files(path)) - {MANIFEST}
    for name, info in sorted(manifest.files.items()):
        file = path / name
        if name not in present:
            raise EngineError(f"{file}: missing; compile the engine again")
        size = file.stat().st_size
        if size != info.bytes:
            raise EngineError(
                f"{file}: {size} bytes instead of {info.bytes}; copy or compile the engine again"
            )
    if extra := sorted(present - manifest.files.keys()):
        raise EngineError(f"{path / extra[0]}: not part of the engine; remove it")
    for name, info in sorted(manifest.files.items()):
        if sha256_file(path / name) != info.sha256:
            raise EngineError(
                f"{path / name}: changed after it was written (its sha256 is not the manifest's); "
                "copy or compile the engine again"
            )


def list_files(path: Path) -> list[str]:
    """Names of the files under `path`, in POSIX form, sorted.

    Raises:
        EngineError: there is something that is neither a file nor a directory.
    """
    names: list[str] = []
    pending = [path]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    names.append(Path(entry.path).relative_to(path).as_posix())
                else:
                    raise EngineError(f"{entry.path}: an engine holds plain files only")
    return sorted(names)


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
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{path}: another compile is writing there") from None
    return descriptor

"""The engine directory: written whole or not at all, checked whole before anything is read.

A compile fills `ENGINE.partial/`, makes every byte durable, writes the manifest last and renames
the directory into place. If it is interrupted or the disk is full, what its journal knows to be
complete stays there for `--resume`; if nothing is, the directory goes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from liquidc.directory_writer import MARK, DirectoryWriter
from liquidc.durable import PARTIAL, RESERVED, is_kind, sync, write_durably
from liquidc.errors import EngineError, InputError
from liquidc.journal import Journal
from liquidc.manifest import MANIFEST, MAX_BYTES, FileInfo, Manifest, parse_manifest

BUILD_LOG = ".build.json"
SCRATCH = "scratch.partial"
"""Directory in the unfinished one for what is no part of the engine."""


def build_log_path(engine: Path) -> Path:
    """Where the build log of `engine` is: beside it."""
    return engine.with_name(engine.name + BUILD_LOG)


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class EngineWriter(DirectoryWriter):
    """Writes one engine: `with EngineWriter(output) as w:` fill `w.path`, then `w.commit(…)`.

    Args:
        output: the engine directory to be; directories above it are made, and unmade on failure.
        force: replace an engine that is there.
        resume: go on where a compile stopped that was killed or interrupted.

    Attributes:
        path: the directory to fill.
        scratch: a directory to be, for files that are removed in the end.
        journal: what is complete, by this compile or by the one that it continues.

    Raises:
        InputError: the output exists, is no engine of ours, or can't be written.
    """

    noun: ClassVar[str] = "an engine"
    last: ClassVar[str] = MANIFEST
    beside: ClassVar[tuple[str, ...]] = (*RESERVED, BUILD_LOG + PARTIAL)

    def __init__(self, output: Path, *, force: bool = False, resume: bool = False) -> None:
        super().__init__(output, force=force)
        self.resume = resume
        self.scratch = self.path / SCRATCH
        self.journal = Journal(self.path / MARK)
        self._files: dict[str, FileInfo] | None = None
        self._log = build_log_path(self.output)
        self._partial_log = self._log.with_name(self._log.name + PARTIAL)

    def files_beside(self) -> tuple[tuple[Path, Path], ...]:
        """The build log."""
        return ((self._partial_log, self._log),)

    @staticmethod
    def refuse_unless_ours(path: Path) -> None:
        """See `refuse_unless_ours`."""
        refuse_unless_ours(path)

    def is_whole(self, path: Path) -> bool:
        """Whether it is an engine of which no file is missing."""
        if not self.is_ours(path):
            return False
        return all((path / name).exists() for name in _manifest_in(path).files)

    def look(self) -> Journal | None:
        """The journal of the compile that `resume` would continue; nothing is changed.

        Raises:
            InputError: the output can't be written, or another compile is writing there.
        """
        self.check_places()
        self.check_output()
        if os.path.lexists(self.path):
            self.lock()
            self.unlock()
        if not self.resume or not is_kind(self.path / MARK, stat.S_IFREG):
            return None
        self.journal.load(repair=False)
        return self.journal if self.journal.started else None

    def continues(self) -> bool:
        """Take up what the journal knows to be complete, and remove everything else."""
        if not self.resume or not is_kind(self.path / MARK, stat.S_IFREG):
            return False
        self.journal.load()
        if not self.journal.started:
            return False
        known = {self.path / name for name in (MARK, *self.journal.files)}
        above = {parent for path in known for parent in path.parents}
        for directory, inner, files in os.walk(self.path, topdown=False):
            for path in (Path(directory, name) for name in (*inner, *files)):
                if is_kind(path, stat.S_IFREG):
                    if path not in known:
                        path.unlink()
                elif not is_kind(path, stat.S_IFDIR):
                    path.unlink()
                elif path not in above:
                    path.rmdir()
        return True

    def kept(self, error: BaseException | None) -> str:
        """What the journal knows to be complete, if the compile can go on another time.

        Other errors come again, so that nothing is kept unless `resume` took it up.
        """
        passing = isinstance(error, KeyboardInterrupt | OSError | MemoryError)
        if not self.journal.started or not (passing or self.resume):
            return ""
        if not is_kind(self.path / MARK, stat.S_IFREG):
            return ""
        return f"{self.journal.noted:,} bytes are complete in {self.path}; go on with --resume"

    def seal(self) -> None:
        """Make what was written durable and hash it; `commit` does it unless it was done."""
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
        manifest = replace(manifest, files=self._files or {})
        write_durably(self.path / MANIFEST, manifest.to_bytes())
        write_durably(self._partial_log, log)
        if self.scratch.exists():
            shutil.rmtree(self.scratch)
        self.place()
        return manifest

    def _file(self, name: str) -> FileInfo:
        path = self.path / name
        sync(path)
        return FileInfo(path.stat().st_size, sha256_file(path))


def refuse_unless_ours(path: Path) -> None:
    """Check that deleting `path` deletes an engine and nothing else.

    Raises:
        InputError: it is something else, or holds a file that no compile wrote.
    """
    try:
        manifest = _manifest_in(path)
        extra = sorted(set(list_files(path)) - manifest.files.keys() - {MANIFEST})
    except EngineError as error:
        raise InputError(
            f"{path}: not replaced, for it is no engine of liquidc ({error})"
        ) from None
    if extra:
        raise InputError(f"{path}: not replaced, for {extra[0]} is not part of the engine")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the engine at `path`; no other file is looked at.

    Raises:
        EngineError: there is none, or it is damaged or too new.
    """
    if path.name.endswith(PARTIAL):
        raise EngineError(f"{path}: the unfinished engine of a compile that runs or was killed")
    return _manifest_in(path)


def _manifest_in(path: Path) -> Manifest:
    """See `read_manifest`; of a directory of any name."""
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

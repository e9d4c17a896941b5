"""What of an unfinished engine is complete, so that a stopped compile can be continued.

Each line is the CRC-32 of a JSON object in 8 hexadecimal digits, a space, and the object: first
what the engine's bytes depend on, then pieces of files with their hashes, in the order in which
they were completed. A line is written when its piece is on the disk. The journal ends before the
first damaged line, and a file before its first damaged piece, so nothing needs to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liquidc.errors import InputError
from liquidc.records import from_json

FORMAT = "liquidc-journal"
_BLOCK = 1 << 24
"""Bytes that are hashed at a time."""
_MAX_LINE = 1 << 20
"""Bytes of a line at most."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `end` of a file."""

    file: str
    start: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Header:
    """The first line: what the engine's bytes depend on."""

    format: str
    key: dict[str, str]


class Journal:
    """The journal of a directory in which an engine is written.

    Args:
        path: the journal, in that directory.

    Attributes:
        resumed: bytes of files that were taken up.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._directory = path, path.parent
        self._key: dict[str, str] | None = None
        self._pieces: dict[str, list[Piece]] = {}
        self.resumed = 0

    @property
    def files(self) -> list[str]:
        """Names of the files of which something is complete."""
        return [name for name, pieces in self._pieces.items() if pieces]

    @property
    def started(self) -> bool:
        """Whether something is complete."""
        return bool(self.files)

    @property
    def noted(self) -> int:
        """Bytes of files that are noted as complete; their hashes are not checked."""
        return sum(pieces[-1].end for pieces in self._pieces.values() if pieces)

    def load(self, *, repair: bool = True) -> None:
        """Read what a stopped compile wrote, as far as it is not damaged.

        Args:
            repair: cut off what follows.
        """
        valid = 0
        with self._path.open("rb") as file:
            while line := file.readline(_MAX_LINE):
                try:
                    self._take(_entry(line))
                except (ValueError, RecursionError):
                    break
                valid += len(line)
        if not self.started:
            self._key = None
        if repair:
            os.truncate(self._path, valid)

    def _take(self, entry: Any) -> None:
        if self._key is None:
            header = from_json(_Header, entry)
            if header.format != FORMAT:
                raise ValueError("not a journal")
            self._key = header.key
            return
        piece = from_json(Piece, entry)
        known = self._pieces.setdefault(piece.file, [])
        while known and known[-1].end > piece.start:
            known.pop()
        if piece.start == (known[-1].end if known else 0) < piece.end:
            known.append(piece)

    def begin(self, key: Mapping[str, str]) -> None:
        """Start, or go on if all that the engine's bytes depend on is what it was.

        Args:
            key: what they depend on, by the name to use in messages.

        Raises:
            InputError: something is not what it was.
        """
        if self._key is None:
            self._key = dict(key)
            self._append(_Header(FORMAT, self._key))
        self.check(key)

    def check(self, key: Mapping[str, str]) -> None:
        """Compare what the engine's bytes depend on with what was read.

        Raises:
            InputError: something is not what it was.
        """
        before = self._key or {}
        for name in sorted(before.keys() | key.keys()):
            was, now = (known.get(name, "none") for known in (before, key))
            if was != now:
                raise InputError(
                    f"{self._directory}: can't be continued, for {name} was {_short(was)} and is "
                    f"{_short(now)}; without --resume it is removed and all is compiled anew"
                )

    def held(self, path: Path) -> int:
        """How many bytes of a file are complete; what follows them is cut off."""
        name, end = self._name(path), 0
        sound: list[Piece] = []
        for piece in self._pieces.get(name, []):
            if not path.is_file() or _sha256(path, piece.start, piece.end) != piece.sha256:
                break
            sound.append(piece)
            end = piece.end
        self._pieces[name] = sound
        if path.exists():
            os.truncate(path, end)
        self.resumed += end
        return end

    def keep(self, path: Path) -> None:
        """All that is in a file now is complete: make it durable and note it."""
        known = self._pieces.setdefault(self._name(path), [])
        start, end = known[-1].end if known else 0, path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        piece = Piece(self._name(path), start, end, _sha256(path, start, end))
        self._append(piece)
        known.append(piece)

    def _append(self, entry: _Header | Piece) -> None:
        text = json.dumps(asdict(entry)).encode()
        with self._path.open("ab") as file:
            file.write(b"%08x %b\n" % (zlib.crc32(text), text))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()


def _entry(line: bytes) -> Any:
    """The object of a line.

    Raises:
        ValueError: the line is damaged or was not written to its end.
    """
    text = line[9:-1]
    if line != b"%08x %b\n" % (zlib.crc32(text), text):
        raise ValueError("not what was written")
    return json.loads(text)


def _sha256(path: Path, start: int, end: int) -> str:
    """Hash of some bytes of a file; of fewer if it is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(_BLOCK, end - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:12]}…"

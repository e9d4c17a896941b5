"""A text or JSON Lines file as token sequences, read piece by piece: memory does not grow with it.

A `.jsonl` file has one document a line: an object with `text` or with `ids` (token ids), or a
string. Any other file is one text. What is too long for a window goes on in the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from liquidc.errors import InputError
from liquidc.records import loads

BLOCK = 16 * 1024
"""Bytes of text that are encoded at a time; a block ends with a line if there is one."""
MAX_LINE = 64 * 1024 * 1024
"""A longer line of JSON Lines is refused."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences that lie between two places of the file.

    Attributes:
        sequences: token ids, none longer than a window.
        end: the byte after what they were made of.
    """

    sequences: tuple[tuple[int, ...], ...]
    end: int


class Corpus:
    """A file.

    Args:
        path: the file.
        encode: text to token ids; None if only ids can be used.

    Raises:
        InputError: there is no such file, or it is empty.
    """

    def __init__(self, path: Path, encode: Encode | None) -> None:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        self.path, self._encode = path, encode
        self.size = path.stat().st_size
        if not self.size:
            raise InputError(f"{path}: empty; give a text to measure on")
        self.lines = path.suffix in (".jsonl", ".ndjson")
        if encode is None and not self.lines:
            raise InputError(f"{path}: the model has no tokenizer; give a .jsonl file with ids")

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def blocks(self, window: int, start: int = 0) -> Iterator[Block]:
        """The sequences from byte `start` on, which must be the end of a block.

        Raises:
            InputError: the file is not UTF-8, or a line is not a document.
        """
        with self.path.open("rb") as file:
            file.seek(start)
            while True:
                at = file.tell()
                documents = self._documents(file, at)
                if documents is None:
                    return
                cut = [
                    tuple(ids[i : i + window])
                    for ids in documents
                    for i in range(0, len(ids), window)
                ]
                yield Block(tuple(cut), file.tell())

    def _documents(self, file: BinaryIO, at: int) -> list[list[int]] | None:
        """Token ids of what comes next; None at the end."""
        if self.lines:
            documents: list[list[int]] = []
            while file.tell() - at < BLOCK:
                begin = file.tell()
                line = file.readline(MAX_LINE)
                if len(line) == MAX_LINE:
                    place = f"{self.path}: the line at byte {begin}"
                    raise InputError(f"{place} is longer than {MAX_LINE} bytes")
                if not line:
                    break
                documents.append(self._document(line, begin))
            return documents or None
        data = file.read(BLOCK)
        data += file.readline(BLOCK) if data and not data.endswith(b"\n") else b""
        while data and _is_cut(data) and (more := file.read(1)):
            data += more
        return [self._encoded(self._text(data, at))] if data else None

    def _text(self, data: bytes, at: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            where = at + error.start
            raise InputError(f"{self.path}: not UTF-8 text (byte {where}); convert it") from None

    def _encoded(self, text: str) -> list[int]:
        if self._encode is None:
            raise InputError(f"{self.path}: the model has no tokenizer; give documents as ids")
        try:
            return self._encode(text) if text else []
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _document(self, line: bytes, at: int) -> list[int]:
        text = self._text(line, at)
        if not text.strip():
            return []
        try:
            value = loads(text)
        except ValueError as error:
            raise InputError(f"{self.path}: the line at byte {at} is not JSON ({error})") from None
        entries = cast(dict[str, Any], value) if isinstance(value, dict) else {"text": value}
        ids, words = entries.get("ids"), entries.get("text")
        if isinstance(ids, list) and all(type(i) is int for i in cast(list[Any], ids)):
            return cast(list[int], ids)
        if isinstance(words, str):
            return self._encoded(words)
        raise InputError(
            f'{self.path}: the line at byte {at} has neither "text" (a string) nor "ids" (a list '
            "of integers)"
        )


def _is_cut(data: bytes) -> bool:
    """Whether the last character of UTF-8 text is not whole."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        return byte >= 0xC0 and length > back
    return False

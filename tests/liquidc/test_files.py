"""Files that a user or a model names: regular files of a bounded size, JSON of bounded nesting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from liquidc import files, records
from liquidc.errors import ConfigError, InputError
from liquidc.files import check_regular, open_regular, read_file, read_utf8
from liquidc.heldout import held_out_text
from liquidc.machine import read_table
from liquidc.mixed import read_recipe
from liquidc.plan import CompileOptions
from liquidc.prepare import read_ir
from liquidc.profile import read_profile
from liquidc.records import MAX_DEPTH, loads, parse_json, read_json, read_object
from tests.liquidc.test_cli import refused


def make(place: Path, kind: str) -> Path:
    path = place / "file"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "link to nothing":
            path.symlink_to(place / "nothing")
        case "loop":
            path.symlink_to(path)
        case "large":
            path.touch()
            os.truncate(path, 1 << 40)
        case _:
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(path))
            server.close()
    return path


STRANGE = ("fifo", "device", "directory", "link to nothing", "loop", "large", "socket")
READERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: read_file(path, InputError),
    "text": lambda path: read_utf8(path, InputError),
    "json": lambda path: read_json(path, InputError),
    "object": lambda path: read_object(path, InputError),
    "profile": read_profile,
    "machine table": read_table,
    "recipe": read_recipe,
    "held-out text": held_out_text,
    "ir": read_ir,
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_read(kind: str, reader: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"file: (can't be read \(|larger than \d+ bytes)"
    ) as caught:
        READERS[reader](make(tmp_path, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", STRANGE[:-2])
def test_files_that_options_name(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path, kind)
    for name in ("profile", "machine", "calibration", "recipe", "data"):
        with pytest.raises(InputError, match="can't be read"):
            CompileOptions(**{name: path}).told()  # pyright: ignore[reportArgumentType]


def test_a_fifo_that_takes_a_file_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "check_regular", lambda path, error: None)
    with pytest.raises(InputError, match="not a regular file"):
        open_regular(make(tmp_path, "fifo"), InputError)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, InputError, 5) == b"12345"
    with pytest.raises(ConfigError, match="larger than 4 bytes"):
        read_file(path, ConfigError, 4)
    check_regular(path, InputError)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"file: not UTF-8 text \(byte 3\); convert it"):
        read_utf8(path, InputError)


@pytest.mark.parametrize(
    "text",
    ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 66 + "]" * 66],
    ids=["lists", "objects", "few"],
)
def test_deep_nesting(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(InputError, match=f"x: not valid JSON .nested deeper than {MAX_DEPTH}"):
            parse_json(data, "x", InputError)
    assert loads("[" * 60 + "]" * 60)


def test_many_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_CONTAINERS", 3)
    assert loads("[[], {}]") == [[], {}]
    for data in ("[[], {}, []]", b"[[], {}, []]"):
        with pytest.raises(ValueError, match="over 3 objects and lists"):
            loads(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "x", "--threads", "0"), "0 is not in the range"),
        (("run", "x", "--threads", "-1"), "-1 is not in the range"),
        (("run", "x", "-p", "a", "--threads", 10**9), "threads must be from 1 to"),
        (("bench", "x", "--threads", 10**30), "threads must be from 1 to"),
        (("bench", "x", "--depth-bias", "0", "--threads", 10**9), "threads must be from 1 to"),
        (("liquify", "x", "-o", "y", "--layers", "2-1000000000000"), "is no list such as"),
        (("liquify", "x", "-o", "y", "--seed", 10**30), "is not in the range"),
        (("compile", "x", "-o", "y", "--target-size", 10**400), "is not a size"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_numbers_without_sense(arguments: tuple[object, ...], message: str) -> None:
    refused(message, *arguments)

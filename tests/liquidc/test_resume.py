"""Compiles that are killed and continued: the same bytes, and nothing that is damaged is used."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liquidc.directory_writer import MARK
from liquidc.engine import SCRATCH
from liquidc.errors import InputError
from liquidc.journal import Journal
from liquidc.pipeline import CompileOptions, compile_model
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import call, refused

SHALLOW = {
    **CONFIG,
    "num_hidden_layers": 2,
    "depth_gate": {"layers": [1], "kv_policy": "drop"},
}
GPTQ = ("--quantize", "int4{block=16,method=gptq}", "--calibration", "ids.json")
KINDS: dict[str, tuple[str, ...]] = {
    "floats": ("--target", "null"),
    "gptq": ("--target", "onnxruntime", *GPTQ),
    "int8": ("--target", "onnxruntime", "--quantize", "int8"),
}
SCRIPT = """
import os, signal, sys
from liquidc.backends import weights_file
from liquidc.journal import Journal
left, number = int(sys.argv.pop(1)), getattr(signal, sys.argv.pop(1))
weights_file.KEPT, keep = 1, Journal.keep
def count(self, path):
    global left
    keep(self, path)
    left -= 1
    if not left:
        with path.open("ab") as file:
            file.write(b"a piece that is not complete")
            file.flush()
            os.kill(os.getpid(), number)
Journal.keep = count
sys.argv[0] = "liquidc"
from liquidc.cli.main import main
main()
"""
"""Runs liquidc until so many pieces are complete, then gets a signal."""


def arguments(model: Path, output: Path, kind: str) -> list[str]:
    given = [str(model.parent / a) if a == "ids.json" else a for a in KINDS[kind]]
    return ["compile", str(model), "-o", str(output), *given]


def stopped(pieces: int, signal: str, *command: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", SCRIPT, str(pieces), signal, *command]
    return subprocess.run(script, check=False, capture_output=True, text=True)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, and token ids to calibrate on beside them."""
    place = tmp_path_factory.mktemp("resume")
    (place / "ids.json").write_text(json.dumps([i * i % 256 for i in range(400)]))
    return save_model(place / "model", SHALLOW)


@pytest.fixture(scope="module")
def whole(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines that nothing stopped."""
    place = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        result = call(*arguments(model_directory, place / kind, kind))
        assert result.exit_code == 0, result.output
    return {kind: place / kind for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("floats", 3),
        ("gptq", 5),
        pytest.param("gptq", 60, marks=pytest.mark.slow),
        pytest.param("int8", 20, marks=pytest.mark.slow),
    ],
)
def test_a_killed_compile_continues_to_the_same_bytes(
    kind: str,
    pieces: int,
    whole: dict[str, Path],
    model_directory: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    command = arguments(model_directory, tmp_path / "engine", kind)
    if (kind, pieces) == ("floats", 3):
        request.getfixturevalue("partial")
    else:
        assert stopped(pieces, "SIGKILL", *command).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    result = call(*command, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes_resumed"] > 0
    assert contents(tmp_path / "engine") == contents(whole[kind])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "engine.build.json"]


@pytest.mark.usefixtures("partial")
def test_without_resume_all_is_compiled_anew(
    whole: dict[str, Path], model_directory: Path, tmp_path: Path
) -> None:
    command = arguments(model_directory, tmp_path / "engine", "floats")
    result = call(*command, "--json")
    assert json.loads(result.stdout)["bytes_resumed"] == 0
    assert contents(tmp_path / "engine") == contents(whole["floats"])


def test_an_interrupt_keeps_what_is_complete(
    whole: dict[str, Path], model_directory: Path, tmp_path: Path
) -> None:
    command = arguments(model_directory, tmp_path / "engine", "floats")
    first = stopped(3, "SIGTERM", *command, "--json")
    assert first.returncode == 143
    message = json.loads(first.stdout)["error"]
    told = r"interrupted; [\d,]+ bytes are complete in \S+/engine\.partial; go on with --resume"
    assert re.fullmatch(told, message)
    assert first.stderr == f"\nerror: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    result = call(*command, "--resume")
    assert "were there from a compile that was stopped" in result.stdout
    assert contents(tmp_path / "engine") == contents(whole["floats"])


def test_a_full_disk_keeps_what_is_complete(
    whole: dict[str, Path], model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liquidc.backends import weights_file

    evaluate, left = weights_file.evaluate, 5

    def full(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield from evaluate(*given)

    command = arguments(model_directory, tmp_path / "engine", "floats")
    with monkeypatch.context() as patched:
        patched.setattr(weights_file, "KEPT", 1)
        patched.setattr(weights_file, "evaluate", full)
        result = call(*command, "--resume")
    assert result.exit_code == 2
    assert "nothing to resume: compiling from the start" in result.stderr
    told = r"error: \S+: No space left on device; free some space or write elsewhere; [\d,]+ bytes "
    assert re.match(told + "are complete in ", result.stderr.splitlines()[-1])
    assert result.stderr.endswith("; go on with --resume\n")
    assert call(*command, "--resume").exit_code == 0
    assert contents(tmp_path / "engine") == contents(whole["floats"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "engine.build.json"]


@pytest.fixture(scope="module")
def left(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compile left that was killed after some weights."""
    place = tmp_path_factory.mktemp("left")
    command = arguments(model_directory, place / "engine", "floats")
    assert stopped(3, "SIGKILL", *command).returncode == -9
    assert [path.name for path in place.iterdir()] == ["engine.partial"]
    return place / "engine.partial"


@pytest.fixture
def partial(left: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(left, tmp_path / "engine.partial"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def line(text: str) -> bytes:
    """A line of a journal."""
    return b"%08x %b\n" % (zlib.crc32(text.encode()), text.encode())


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def link(file: Path) -> None:
    """The file is elsewhere, and what is there has other bytes at the end."""
    elsewhere = file.parent.with_name("elsewhere")
    file.rename(elsewhere)
    append(elsewhere, b"not ours")
    file.symlink_to(elsewhere)


def clutter(partial: Path) -> None:
    """Things that no compile writes."""
    (partial / "notes.txt").write_text("x")
    (partial / "empty" / "deep").mkdir(parents=True)
    (partial / "manifest.json").symlink_to("nowhere")
    os.mkfifo(partial / SCRATCH)


DAMAGES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "the last piece": (
        lambda p: flip(p / "weights.bin", -len(b"a piece that is not complete") - 1),
        True,
    ),
    "the first piece": (lambda p: flip(p / "weights.bin", 0), False),
    "a shorter file": (
        lambda p: os.truncate(p / "weights.bin", (p / "weights.bin").stat().st_size - 99),
        True,
    ),
    "no file": (lambda p: (p / "weights.bin").unlink(), False),
    "half a line": (lambda p: os.truncate(p / MARK, (p / MARK).stat().st_size - 3), True),
    "a line that is none": (lambda p: append(p / MARK, b"x\n"), True),
    "a piece of elsewhere": (
        lambda p: append(p / MARK, line('{"file": "../x", "start": 0, "end": 4, "sha256": ""}')),
        True,
    ),
    "nothing but garbage": (lambda p: (p / MARK).write_bytes(b"\0\xff{\n"), False),
    "the first line": (lambda p: flip(p / MARK, 12), False),
    "a link": (lambda p: link(p / "weights.bin"), False),
    "other files": (clutter, True),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_written_again(
    name: str, partial: Path, whole: dict[str, Path], model_directory: Path, tmp_path: Path
) -> None:
    damage, taken = DAMAGES[name]
    damage(partial)
    command = arguments(model_directory, tmp_path / "engine", "floats")
    result = call(*command, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["bytes_resumed"] > 0) == taken
    assert contents(tmp_path / "engine") == contents(whole["floats"])
    if name == "a link":
        assert (tmp_path / "elsewhere").read_bytes().endswith(b"not ours")


def test_another_compile_does_not_continue_it(
    partial: Path, model_directory: Path, tmp_path: Path
) -> None:
    before = contents(partial)
    command = arguments(model_directory, tmp_path / "engine", "floats")
    other = (*command, "--resume", "--quantize", "int8")
    refused("can't be continued, for the option quantize was", *other)
    assert contents(partial) == before


def test_a_dry_run_says_whether_it_can_be_continued(
    partial: Path, model_directory: Path, tmp_path: Path
) -> None:
    before = contents(partial)
    command = (*arguments(model_directory, tmp_path / "engine", "floats"), "--dry-run")
    told = call(*command, "--resume", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["bytes_to_resume"] > 0
    assert "that a stopped compile completed" in call(*command, "--resume").stdout
    assert json.loads(call(*command, "--json").stdout)["bytes_to_resume"] == 0
    refused("can't be continued", *command, "--resume", "--quantize", "int8")
    assert contents(partial) == before


def test_another_version_does_not_continue_it(
    partial: Path, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (partial / SCRATCH).exists() is False
    monkeypatch.setattr("liquidc.prepare.source_hash", lambda: "0" * 64)
    options = CompileOptions(target="null", resume=True)
    with pytest.raises(InputError, match="the version of liquidc was"):
        compile_model(model_directory, tmp_path / "engine", options)


def test_another_model_does_not_continue_it(partial: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", SHALLOW, seed=1)
    command = arguments(model, partial.with_suffix(""), "floats")
    refused("can't be continued, for the model was", *command, "--resume")


def test_pieces_lie_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    journal = Journal(tmp_path / "journal")
    journal.begin({"x": "1"})
    for data in (b"one", b"twotwo", b"three"):
        with path.open("ab") as file:
            file.write(data)
        journal.keep(path)
    again = Journal(tmp_path / "journal")
    again.load()
    again.begin({"x": "1"})
    assert again.held(path) == len(b"onetwotwothree")
    with path.open("ab") as file:
        file.write(b"more")
    assert again.held(path) == len(b"onetwotwothree")
    assert path.read_bytes() == b"onetwotwothree"


def started(path: Path) -> Journal:
    """A journal of a file with three pieces."""
    journal = Journal(path / "journal")
    journal.begin({"x": "1"})
    for data in (b"one", b"twotwo", b"three"):
        append(path / "file", data) if (path / "file").exists() else (path / "file").write_bytes(
            data
        )
        journal.keep(path / "file")
    return journal


def test_a_wrong_character_ends_a_journal_there(tmp_path: Path) -> None:
    started(tmp_path)
    path = tmp_path / "journal"
    whole = path.read_bytes()
    ends = [0, 3, 9, 14]
    for at in range(len(whole)):
        for bit in (1, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            journal = Journal(path)
            journal.load()
            before = whole[:at].count(b"\n")
            assert journal.noted == ends[max(before - 1, 0)]
            assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:before])
    path.write_bytes(whole)
    journal = Journal(path)
    journal.load()
    assert journal.noted == ends[-1]


FORGED = [
    "",
    "null",
    "1",
    "[]",
    "{}",
    '"x"',
    "[" * 10**5,
    "9" * 10**4,
    '{"format": "liquidc-journal"}',
    '{"format": "liquidc-journal", "key": null}',
    '{"format": "liquidc-journal", "key": {"x": 1}}',
    '{"format": "something", "key": {}}',
    '{"format": ["liquidc-journal"], "key": {"x": {}}}',
    '{"file": "file", "start": 0, "end": 1e400, "sha256": ""}',
    '{"file": "file", "start": "0", "end": 3, "sha256": ""}',
    '{"file": ["file"], "start": 0, "end": 3, "sha256": ""}',
    '{"file": "file", "start": -1, "end": 3, "sha256": ""}',
    '{"file": "file", "start": 0, "end": 3, "sha256": 7}',
    '{"file": "file", "start": 0, "end": 1180591620717411303424, "sha256": ""}',
    "x" * (1 << 20),
]


@pytest.mark.parametrize("text", FORGED, ids=lambda text: text[:70])
@pytest.mark.parametrize("first", [True, False])
def test_entries_of_wrong_types_are_no_entries(text: str, first: bool, tmp_path: Path) -> None:
    started(tmp_path)
    path = tmp_path / "journal"
    path.write_bytes(line(text) + path.read_bytes() if first else path.read_bytes() + line(text))
    journal = Journal(path)
    journal.load()
    journal.begin({"x": "1"})
    assert journal.held(tmp_path / "file") in ((0,) if first else (0, 14))


def test_a_journal_without_pieces_starts_anew(tmp_path: Path) -> None:
    Journal(tmp_path / "journal").begin({"x": "1"})
    journal = Journal(tmp_path / "journal")
    journal.load()
    assert not journal.started
    journal.begin({"x": "2"})

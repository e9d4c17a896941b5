"""Places where no output can be: each is refused in one line before any work is done."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from liquidc.directory_writer import MARK
from liquidc.durable import check_file
from liquidc.engine import EngineWriter
from liquidc.errors import InputError
from liquidc.interrupt import Interrupted
from liquidc.pipeline import CompileOptions, compile_model
from tests.liquidc.fakes import manifest
from tests.liquidc.test_cli import names, refused

NO_NAMES = ["/", ".", "..", "", "x/..", "x/../..", "./", "e.partial", "e.replaced"]
LONG_NAMES = ["é" * 127, "e" * 256, "e" * 5000, "d" * 256 + "/e"]
VERBS = {
    "compile": ("compile", "MODEL", "--target", "null"),
    "compile --force": ("compile", "MODEL", "--target", "null", "--force"),
    "dry run": ("compile", "MODEL", "--target", "null", "--dry-run"),
    "export-hf": ("export-hf", "MODEL", "--force"),
    "liquify": ("liquify", "MODEL", "--force"),
    "profile": ("profile", "MODEL", "--data", "MODEL/heldout.txt", "--force"),
    "merge": ("profile", "merge", "nothing.json", "--force"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, and the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("verb", VERBS)
def test_names_that_no_output_can_have(verb: str, here: Path, model_directory: Path) -> None:
    given = [word.replace("MODEL", str(model_directory)) for word in VERBS[verb]]
    for name in NO_NAMES:
        refused("not a name for a", *given, "-o", name)
    for name in LONG_NAMES:
        if "d/e" not in name or "profile" not in given:
            refused("too long", *given, "-o", name)
    assert names(here) == []


def test_the_longest_name_that_an_engine_can_have(here: Path) -> None:
    """`NAME.build.json.partial` has 19 bytes more, and a name at most 255."""
    with EngineWriter(Path("e" * 236 + "/")) as writer:
        (writer.path / "weights.bin").write_bytes(b"x")
        writer.commit(manifest(), b"{}")
    assert names(here) == ["e" * 236, "e" * 236 + ".build.json"]
    with pytest.raises(InputError, match="too long; choose one of at most 236 bytes"):
        EngineWriter(Path("e" * 237)).check()
    with pytest.raises(InputError, match=r"a\\0b: not a name"):
        EngineWriter(Path("a\0b"))


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_full_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def an_empty_directory(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.with_name("elsewhere").mkdir(exist_ok=True)
    (path.with_name("elsewhere") / MARK).touch()
    path.symlink_to("elsewhere")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


THINGS: list[Callable[[Path], object]] = [
    a_file,
    a_full_directory,
    an_empty_directory,
    a_link,
    a_broken_link,
    os.mkfifo,
]
IN_THE_WAY = [
    (name, thing)
    for name in ("e.partial", "e.replaced", "e.build.json", "e.build.json.partial")
    for thing in THINGS
    if (name[-5:] == ".json" or name[-13:] == ".json.partial", thing)
    not in ((True, a_file), (False, an_empty_directory))
]


@pytest.mark.parametrize(("name", "thing"), IN_THE_WAY)
def test_what_is_beside_an_engine_is_not_ours(
    name: str, thing: Callable[[Path], object], here: Path, model_directory: Path
) -> None:
    thing(here / name)
    before = sorted(here.rglob("*"))
    for force, resume in ((False, False), (True, True)):
        options = CompileOptions(target="null", force=force, resume=resume)
        with pytest.raises(InputError, match=rf"/{name}: in the way and not (ours|a file); move"):
            compile_model(model_directory, here / "e", options)
        with pytest.raises(InputError, match=rf"/{name}: in the way and not"):
            EngineWriter(here / "e", force=force, resume=resume).look()
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("thing", [a_full_directory, an_empty_directory, a_link, os.mkfifo])
def test_a_mark_that_is_no_file(thing: Callable[[Path], object], here: Path) -> None:
    (here / "e.partial").mkdir()
    thing(here / "e.partial" / MARK)
    for resume in (False, True):
        writer = EngineWriter(here / "e", resume=resume)
        with pytest.raises(InputError, match=r"e\.partial: in the way and not ours"), writer:
            pass
        with pytest.raises(InputError, match=r"e\.partial: in the way and not ours"):
            writer.look()


@pytest.mark.parametrize("suffix", ["", ".new", ".partial", ".partial.new"])
@pytest.mark.parametrize("thing", [an_empty_directory, a_link, a_broken_link, os.mkfifo])
def test_what_is_at_the_place_of_a_file(
    suffix: str, thing: Callable[[Path], object], here: Path
) -> None:
    thing(here / f"p.json{suffix}")
    beside = (".new", ".partial", ".partial.new")
    with pytest.raises(InputError, match=r"in the way and not a file"):
        check_file(here / "p.json", "a profile", force=True, beside=beside)
    with pytest.raises(InputError, match="no such directory"):
        check_file(here / "none" / "p.json", "a profile", force=True)


def stopped_by(output: Path, stop: Callable[[], object]) -> None:
    with EngineWriter(output) as writer:
        writer.journal.begin({})
        (writer.path / "weights.bin").write_bytes(b"x" * 1234)
        writer.journal.keep(writer.path / "weights.bin")
        stop()


def fails(error: BaseException) -> Callable[[], object]:
    def stop() -> None:
        raise error

    return stop


STOPS: dict[str, tuple[Callable[[], object], type[BaseException], str]] = {
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), Interrupted, "SIGINT"),
    "SIGHUP": (lambda: os.kill(os.getpid(), signal.SIGHUP), Interrupted, "SIGHUP"),
    "full": (fails(OSError(errno.ENOSPC, "")), InputError, "No space left on device; free some"),
    "denied": (fails(OSError(errno.EROFS, "")), InputError, "Read-only file system"),
    "broken": (fails(OSError(errno.EIO, "worn out")), OSError, "worn out"),
    "memory": (fails(MemoryError()), MemoryError, ""),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_is_complete_stays(name: str, here: Path) -> None:
    stop, kind, message = STOPS[name]
    told = "1,234 bytes are complete in .*/e.partial; go on with --resume"
    with pytest.raises(kind, match=f"(?s){message}.*{told}"):
        stopped_by(here / "e", stop)
    assert names(here) == ["e.partial"]
    assert names(here / "e.partial") == [MARK, "weights.bin"]


@pytest.mark.parametrize("error", [InputError("wrong"), RuntimeError("a fault")])
def test_what_fails_again_leaves_nothing(error: Exception, here: Path) -> None:
    with pytest.raises(type(error)) as caught:
        stopped_by(here / "e", fails(error))
    assert not hasattr(caught.value, "__notes__")
    assert names(here) == []


def test_a_rename_that_fails_keeps_what_is_complete(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, destination: Path) -> None:
        raise OSError(errno.EIO, "worn out")

    monkeypatch.setattr(os, "rename", fail)
    writer = EngineWriter(here / "e")

    def commit() -> None:
        with writer:
            writer.journal.begin({})
            (writer.path / "weights.bin").write_bytes(b"x")
            writer.journal.keep(writer.path / "weights.bin")
            writer.commit(manifest(), b"{}")

    with pytest.raises(OSError, match=r"(?s)worn out.*go on with --resume"):
        commit()
    again = EngineWriter(here / "e", resume=True)
    again.look()
    assert again.journal.noted == 1
    assert stat.S_ISREG((here / "e.partial" / MARK).lstat().st_mode)

"""The engine directory: whole or not at all; every change is noticed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from liquidc.directory_writer import MARK
from liquidc.engine import EngineWriter, build_log_path, check_files, read_manifest
from liquidc.errors import EngineError, InputError
from liquidc.interrupt import Interrupted
from tests.liquidc.fakes import manifest


def write(output: Path, *, force: bool = False, content: bytes = b"weights") -> Path:
    with EngineWriter(output, force=force) as writer:
        (writer.path / "weights.bin").write_bytes(content)
        (writer.path / "kernels").mkdir()
        (writer.path / "kernels" / "a.cubin").write_bytes(b"kernel")
        writer.commit(manifest(), b"{}\n")
    return output


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_written_engine_checks(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    found = read_manifest(engine)
    check_files(engine, found)
    assert sorted(found.files) == ["kernels/a.cubin", "weights.bin"]
    assert names(tmp_path) == ["engine", "engine.build.json"]
    assert names(engine) == ["kernels", "manifest.json", "weights.bin"]


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert (a / "manifest.json").read_bytes() == (b / "manifest.json").read_bytes()


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    with pytest.raises(InputError, match="exists already; --force replaces it"):
        write(engine)
    write(engine, force=True, content=b"other")
    assert (engine / "weights.bin").read_bytes() == b"other"
    assert names(tmp_path) == ["engine", "engine.build.json"]


def test_force_deletes_nothing_but_engines(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="not replaced, for it is no engine of liquidc"):
        write(mine, force=True)
    engine = write(tmp_path / "engine")
    (engine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not replaced, for notes\.txt is not part"):
        write(engine, force=True)
    assert (mine / "thesis.txt").exists()
    assert names(tmp_path) == ["engine", "engine.build.json", "mine"]


def test_force_replaces_a_damaged_engine(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    (engine / "weights.bin").unlink()
    write(engine, force=True)
    check_files(engine, read_manifest(engine))


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with EngineWriter(tmp_path / "engine") as writer:
            (writer.path / "weights.bin").write_bytes(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert names(tmp_path) == []


def test_an_error_keeps_the_old_engine(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    before = (engine / "manifest.json").read_bytes()
    with (
        pytest.raises(RuntimeError, match="boom"),
        EngineWriter(engine, force=True),
    ):
        raise RuntimeError("boom")
    assert (engine / "manifest.json").read_bytes() == before
    assert names(tmp_path) == ["engine", "engine.build.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupted() -> None:
        with EngineWriter(tmp_path / "engine") as writer:
            (writer.path / "weights.bin").write_bytes(b"half")
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stop:
        interrupted()
    assert stop.value.signum == number
    assert names(tmp_path) == []
    assert signal.getsignal(number) is before


def test_a_signal_during_the_renames_is_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def interrupted(source: Path, destination: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        rename(source, destination)

    monkeypatch.setattr(os, "rename", interrupted)
    engine = write(tmp_path / "engine")
    monkeypatch.undo()
    check_files(engine, read_manifest(engine))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    output = tmp_path / "engine"

    def fill() -> None:
        with EngineWriter(output) as writer:
            (writer.path / "weights.bin").write_bytes(b"half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(InputError, match="nothing was written"):
        fill()
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_while_the_manifest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path / "engine")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        write(old, force=True, content=b"other")
    monkeypatch.undo()
    assert (old / "weights.bin").read_bytes() == b"weights"
    assert names(tmp_path) == ["engine", "engine.build.json"]


def test_a_rename_that_fails_brings_the_old_engine_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write(tmp_path / "engine")
    rename = os.rename

    def fails_on_new(source: Path, destination: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_on_new)
    with pytest.raises(OSError, match="Input/output"):
        write(engine, force=True, content=b"other")
    monkeypatch.undo()
    assert (engine / "weights.bin").read_bytes() == b"weights"
    assert names(tmp_path) == ["engine", "engine.build.json"]


def test_what_a_killed_compile_left_is_removed(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from liquidc.engine import EngineWriter
        with EngineWriter(Path({str(tmp_path / "engine")!r})) as writer:
            (writer.path / "weights.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert names(tmp_path) == ["engine.partial"]
    with pytest.raises(EngineError, match="unfinished engine"):
        read_manifest(tmp_path / "engine.partial")
    write(tmp_path / "engine")
    assert names(tmp_path) == ["engine", "engine.build.json"]


def test_killed_between_the_renames_the_old_engine_comes_back(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    os.rename(engine, tmp_path / "engine.replaced")
    with pytest.raises(InputError, match="exists already"), EngineWriter(engine):
        pass
    check_files(engine, read_manifest(engine))


def test_killed_after_the_renames_the_old_engine_goes(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    os.rename(engine, tmp_path / "engine.replaced")
    (tmp_path / "engine.build.json").unlink()
    write(tmp_path / "other")
    os.rename(tmp_path / "other", engine)
    write(engine, force=True)
    assert names(tmp_path) == ["engine", "engine.build.json", "other.build.json"]


def test_two_compiles_to_one_output_don_t_mix(tmp_path: Path) -> None:
    with (
        EngineWriter(tmp_path / "engine"),
        pytest.raises(InputError, match="another process is writing there"),
        EngineWriter(tmp_path / "engine"),
    ):
        pass
    assert names(tmp_path) == []


def test_a_directory_of_someone_else_is_not_removed(tmp_path: Path) -> None:
    partial = tmp_path / "engine.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="in the way and not ours"):
        write(tmp_path / "engine")
    assert names(partial) == ["thesis.txt"]
    (partial / "thesis.txt").rename(partial / MARK)
    write(tmp_path / "engine")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("engine.partial", "not a name for an engine"),
        ("file/engine", "file: not a directory"),
        ("file/deeper/engine", "file: not a directory"),
    ],
)
def test_outputs_that_can_t_be(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        write(tmp_path / output)
    assert names(tmp_path) == ["file"]


def test_directories_above_are_made_and_unmade(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), EngineWriter(tmp_path / "a/b/engine"):
        raise RuntimeError("boom")
    assert names(tmp_path) == []
    engine = write(tmp_path / "a/b/engine")
    check_files(engine, read_manifest(engine))


def test_an_output_that_can_t_be_created() -> None:
    with pytest.raises(InputError, match="can't be written"):
        write(Path("/proc/liquidc-engine"))


def test_a_linked_output_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    write(tmp_path / "link" / "engine")
    assert names(real) == ["engine", "engine.build.json"]


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    for name in ("weights.bin", "kernels/a.cubin"):
        path = engine / name
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(EngineError, match=f"{name}: changed after it was written"):
            check_files(engine, read_manifest(engine))
        path.write_bytes(original)
    path = engine / "manifest.json"
    original = path.read_bytes()
    for place in range(0, len(original), 7):
        changed = original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :]
        path.write_bytes(changed)
        with pytest.raises(EngineError, match=r"manifest\.json"):
            read_manifest(engine)


def test_missing_and_extra_and_shortened_files(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    found = read_manifest(engine)
    (engine / "extra").touch()
    with pytest.raises(EngineError, match="extra: not part of the engine"):
        check_files(engine, found)
    (engine / "extra").unlink()
    (engine / "weights.bin").write_bytes(b"weight")
    with pytest.raises(EngineError, match=r"weights\.bin: 6 bytes instead of 7"):
        check_files(engine, found)
    (engine / "weights.bin").unlink()
    with pytest.raises(EngineError, match=r"weights\.bin: missing"):
        check_files(engine, found)
    (engine / "manifest.json").unlink()
    with pytest.raises(EngineError, match=r"manifest\.json: missing"):
        read_manifest(engine)


def test_links_in_an_engine_are_refused(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    (tmp_path / "outside").write_bytes(b"weights")
    (engine / "weights.bin").unlink()
    (engine / "weights.bin").symlink_to(tmp_path / "outside")
    with pytest.raises(EngineError, match="plain files only"):
        check_files(engine, read_manifest(engine))


def test_no_engine_at_all(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine"):
        read_manifest(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="not a directory"):
        read_manifest(tmp_path / "file")


def test_the_build_log_is_beside_it(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine")
    assert json.loads(build_log_path(engine).read_bytes()) == {}

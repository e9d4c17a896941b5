"""Kills a writer of directories before each of its system calls, and looks at what comes after.

Run as a process of its own, which has one thread and may fork: `python -m tests.liquidc.kills`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from liquidc.directory_writer import MARK
from liquidc.engine import EngineWriter, check_files, read_manifest
from liquidc.errors import InputError
from liquidc.journal import Journal
from tests.liquidc.fakes import manifest

NEW, OLD = b"new" * 100, b"old" * 100
CALLS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
"""Audit events of the calls that change a directory."""
WAYS = {
    "plain": (False, False),
    "resume": (False, True),
    "force": (True, False),
    "both": (True, True),
}
"""Values of `force` and `resume`."""
KILLED = 9


def write_engine(output: Path, *, force: bool, resume: bool, content: bytes = NEW) -> None:
    with EngineWriter(output, force=force, resume=resume) as writer:
        writer.journal.begin({"content": content.decode()})
        for name in ("scratch.partial/codes", "weights.bin", "deep/er/kernel"):
            path = writer.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not writer.journal.held(path):
                path.write_bytes(content)
                writer.journal.keep(path)
        (writer.path / "config.json").write_bytes(content)
        writer.commit(manifest(), content)


def write_checkpoint(output: Path, *, force: bool, resume: bool, content: bytes = NEW) -> None:
    from liquidc.directory import whole_directory

    del resume
    with whole_directory(output, force=force) as directory:
        (directory / "model.safetensors").write_bytes(content)
        (directory / "config.json").write_text('{"model_type": "liquid"}')


Write = Callable[..., None]
WRITERS: dict[str, Write] = {"engine": write_engine, "checkpoint": write_checkpoint}


def killed(work: Callable[[], None], before: int) -> bool:
    """Do some work in a process that is killed before its n-th call; False if it had fewer."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), code
        return code == KILLED
    left = before

    def count(event: str, args: Any) -> None:
        nonlocal left
        if event in CALLS:
            left -= 1
            if not left:
                os._exit(KILLED)

    os.fsync = lambda fd: count("open", fd)
    sys.addaudithook(count)
    try:
        work()
    except InputError:
        pass
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def nothing(write: Write, output: Path) -> None:
    del write, output


def old(write: Write, output: Path) -> None:
    write(output, force=False, resume=False, content=OLD)


def half(write: Write, output: Path) -> None:
    """What a process left that was killed when some files were complete."""
    partial = output.with_name("out.partial")
    partial.mkdir()
    (partial / MARK).touch()
    (partial / "model.safetensors").write_bytes(NEW)
    for name in ("manifest.json", "config.json"):
        (partial / name).write_bytes(b"{")
    if write is write_engine:
        journal = Journal(partial / MARK)
        journal.begin({"content": NEW.decode()})
        journal.keep(partial / "model.safetensors")


def both(write: Write, output: Path) -> None:
    """What a process left that was killed between its renames."""
    write(output, force=False, resume=False, content=NEW)
    os.rename(output, output.with_name("out.partial"))
    old(write, output)
    os.rename(output, output.with_name("out.replaced"))


STATES: dict[str, Callable[[Write, Path], None]] = {
    f.__name__: f for f in (nothing, old, half, both)
}
THERE = ("old", "both")
"""States with an output, which no kill may lose."""


def content(output: Path) -> bytes:
    """What the output holds, which is whole."""
    files = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert MARK not in files
    if "manifest.json" in files:
        check_files(output, read_manifest(output))
        return files["weights.bin"]
    assert sorted(files) == ["config.json", "model.safetensors"]
    return files["model.safetensors"]


def look_after(write: Write, place: Path, state: str, way: str) -> None:
    """Run again after a kill in `state`: the new bytes, or a refusal that leaves a whole output."""
    force, resume = WAYS[way]
    output = place / "out"
    refusal = ""
    try:
        write(output, force=force, resume=resume)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert not force, refusal
        assert refusal == f"{output}: exists already; --force replaces it"
        assert content(output) in (OLD, NEW)
        assert not output.with_name("out.replaced").exists()
        write(output, force=True, resume=resume)
    assert refusal or force or state not in THERE
    assert content(output) == NEW
    beside = set(os.listdir(place)) - {"out"}
    assert beside <= {"out.build.json"}, beside
    assert all((place / name).read_bytes() == NEW for name in beside)


FEW = (
    ("half", "plain"),
    ("half", "resume"),
    ("old", "force"),
    ("both", "force"),
)
"""Runs that differ most."""
ALL = tuple((state, way) for state in STATES for way in WAYS)


def sweep(kind: str, place: Path, runs: Iterable[tuple[str, str]], after_each: int) -> int:
    """Kill before every call of some runs; returns how often.

    Args:
        kind: of the output.
        place: an empty directory.
        runs: what is there and how it is run.
        after_each: ways to run again that are tried after a kill, in turn.
    """
    write, kills = WRITERS[kind], 0
    turn = itertools.cycle(WAYS)
    for state, way in runs:
        start = place / "start"
        start.mkdir()
        STATES[state](write, start / "out")
        force, resume = WAYS[way]
        for before in itertools.count(1):
            here = Path(shutil.copytree(start, place / "here"))
            writer = partial(write, place / "here/out", force=force, resume=resume)
            if not killed(writer, before):
                shutil.rmtree(here)
                break
            kills += 1
            for after in itertools.islice(turn, after_each):
                copy = Path(shutil.copytree(here, place / "copy"))
                try:
                    look_after(write, copy, state, after)
                except BaseException:
                    print(f"{kind}: {state}, {way}, call {before}, then {after}", flush=True)
                    raise
                shutil.rmtree(copy)
            shutil.rmtree(here)
        shutil.rmtree(start)
    return kills


def chains(kind: str, place: Path, count: int) -> int:
    """Kill several processes one after the other, each before some call; returns how often."""
    write, chance, kills = WRITERS[kind], random.Random(0), 0
    for _ in range(count):
        here = place / "here"
        here.mkdir()
        state = chance.choice(list(STATES))
        STATES[state](write, here / "out")
        for _ in range(chance.randint(2, 6)):
            force, resume = WAYS[chance.choice(list(WAYS))]
            before = chance.randint(1, 70)
            writer = partial(write, place / "here/out", force=force, resume=resume)
            kills += killed(writer, before)
        look_after(write, here, state, chance.choice(list(WAYS)))
        shutil.rmtree(here)
    return kills


def compiles(model: str, place: Path, count: int) -> int:
    """Kill so many compiles of a model at random times."""
    from liquidc.backends import weights_file
    from liquidc.pipeline import CompileOptions, compile_model

    traces = place / "traces"
    start = None

    def compiled(output: Path, **options: Any) -> None:
        compile_model(model, output, CompileOptions(target="null", start=start, **options))

    def read(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    chance, kills, longest = random.Random(0), 0, 0.0
    weights_file.KEPT = 20_000
    compiled(place / "old", passes=(), dump=traces)
    start = ("trace", traces / "00-trace.ir")  # most of the time would be spent on the trace
    for _ in range(2):  # the first one imports
        began = time.monotonic()
        compiled(place / "new", force=(place / "new").exists())
        longest = time.monotonic() - began
    new, old = read(place / "new"), read(place / "old")
    while kills < count:
        here = place / "here"
        here.mkdir()
        there = chance.random() < 0.5
        if there:
            shutil.copytree(place / "old", here / "out")
        child = os.fork()
        if not child:
            os.close(2)
            compiled(here / "out", force=there)
            os._exit(0)
        time.sleep(longest * chance.random())
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        force, resume = WAYS[chance.choice(list(WAYS))]
        refusal = ""
        try:
            compiled(here / "out", force=force, resume=resume)
        except InputError as error:
            refusal = str(error)
        if refusal:
            assert refusal == f"{here}/out: exists already; --force replaces it"
            assert read(here / "out") in (old, new)
            compiled(here / "out", force=True, resume=resume)
        assert read(here / "out") == new
        assert {path.name for path in here.iterdir()} <= {"out", "out.build.json"}
        shutil.rmtree(here)
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kills


def main(mode: str, kind: str, place: Path) -> int:
    if mode == "compiles":
        return compiles(kind, place, 200)
    os.fsync = os.fdatasync = lambda fd: None  # a kill loses nothing that was written
    if mode == "few":
        return sweep(kind, place, FEW, 1)
    if mode == "all":
        return sweep(kind, place, ALL, len(WAYS))
    return chains(kind, place, 300)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))

"""Honest files, made once, and the command run in this process as `liquidc` itself runs it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from click.testing import CliRunner

from liquidc.cli import main as entry
from liquidc.engine import PARTIAL
from liquidc.errors import LiquidWarning
from liquidc.journal import Journal
from liquidc.manifest import MANIFEST
from liquidc.records import canonical
from tests.liquidc.conftest import CONFIG, save_model

MAX_SECONDS = 10
SMALL = {
    **CONFIG,
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "depth_gate": {"layers": [1], "kv_policy": "drop"},
    "moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "eos_token_id": [2],
    "max_new_tokens": 3,
}
TOKENIZER_CONFIG = {
    "bos_token": {"content": "<s>", "lstrip": False},
    "eos_token": "</s>",
    "add_bos_token": False,
    "additional_special_tokens": ["<a>"],
}


@dataclass(frozen=True)
class Outcome:
    """What one command did.

    Attributes:
        case: kind and number.
        args: of the command.
        code: its exit code; None if it did not end.
        output: standard output and standard error.
        trace: of an internal error.
        seconds: that it took.
        peak: memory of the process at its largest so far, in bytes.
    """

    case: str
    args: list[str]
    code: int | None
    output: str
    trace: str
    seconds: float
    peak: int

    @property
    def wrong(self) -> str:
        """Why this outcome is a fault; empty if it is none."""
        if self.code is None:
            return f"takes over {MAX_SECONDS} seconds"
        if self.code not in (0, 1, 2, 3) or "Traceback" in self.output or self.trace:
            return f"ends with {self.code}"
        return ""


class TooLong(BaseException):
    """A command takes longer than it may."""


def _too_long(signum: int, frame: FrameType | None) -> NoReturn:
    del signum, frame
    raise TooLong


def run(case: str, *args: object) -> Outcome:
    """Run the command in this process, as `liquidc` itself runs it."""
    given, code, trace = [str(arg) for arg in args], None, ""
    begin = time.monotonic()
    before = signal.signal(signal.SIGALRM, _too_long)
    report, shown = entry.report, warnings.showwarning

    def reported(error: BaseException, **rest: Any) -> int:
        nonlocal trace
        if (code := report(error, **rest)) == 4:
            trace = "".join(traceback.format_exception(error))
        return code

    with CliRunner().isolation() as (out, _, mixed), warnings.catch_warnings():
        del out
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LiquidWarning)
        warnings.showwarning = entry._warn  # pyright: ignore[reportPrivateUsage]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        entry.report = reported
        try:
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            entry.cli.main(given)
        except SystemExit as end:
            code = int(end.code or 0)
        except TooLong as end:
            trace = "".join(traceback.format_exception(end))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            entry.report, warnings.showwarning = report, shown
        sys.stdout.flush()
        sys.stderr.flush()
        output = mixed.getvalue().decode(errors="replace")
    return Outcome(case, given, code, output, trace, time.monotonic() - begin, peak())


def peak() -> int:
    """Memory of this process at its largest so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class World:
    """Honest files, and commands that read them with one of them mutated.

    Args:
        place: a directory of its own.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.scratch = place, place / "scratch"
        self.scratch.mkdir()
        self.model = save_model(place / "model", SMALL)
        (self.model / "generation_config.json").write_text(json.dumps(GENERATION))
        (self.model / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        self.engine, self.profile = place / "engine", place / "profile.json"
        self.sharded, self.partial = place / "sharded", place / f"out{PARTIAL}"
        data = place / "profiled.txt"
        data.write_text("Another text, which is not held out: 1, 2, 3. " * 8)
        profiled = ("--window", 16, "--max-tokens", 64)
        self._honest("profile", self.model, "--data", data, "-o", self.profile, *profiled)
        dump = ("--dump-dir", place / "dump", "--profile", self.profile)
        self._honest("compile", self.model, "-o", self.engine, "--target", "null", *dump)
        self._shard()
        self._interrupt()

    def _honest(self, *args: object) -> None:
        found = run("honest", *args)
        assert found.code == 0, found.output + found.trace

    def _shard(self) -> None:
        from safetensors.torch import load_file, save_file

        self.sharded.mkdir()
        tensors, places = load_file(self.model / "model.safetensors"), dict[str, str]()
        for number, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
            name = f"model-{number}.safetensors"
            save_file({key: tensors[key] for key in half}, self.sharded / name)
            places |= dict.fromkeys(half, name)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (self.sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(self.model / name, self.sharded / name)

    def _interrupt(self) -> None:
        """Leave what an interrupted compile leaves."""
        from liquidc.backends import weights_file

        keep, kept, left = Journal.keep, weights_file.KEPT, 3

        def stop(journal: Journal, path: Path) -> None:
            nonlocal left
            keep(journal, path)
            left -= 1
            if not left:
                raise KeyboardInterrupt

        Journal.keep, weights_file.KEPT = stop, 1
        try:
            found = run("honest", *self.resuming(self.place / "out"))
        finally:
            Journal.keep, weights_file.KEPT = keep, kept
        assert found.code == 130, found.output + found.trace

    def resuming(self, output: Path) -> tuple[object, ...]:
        return "compile", self.model, "-o", output, "--target", "null", "--resume"

    def directory(self, source: Path, name: str, data: bytes) -> Path:
        """A directory with one file replaced, the others hard links."""
        made = self.scratch / source.name
        made.mkdir()
        for path in source.iterdir():
            if path.name != name:
                os.link(path, made / path.name)
        (made / name).write_bytes(data)
        return made

    def checkpoint(self, source: Path, name: str, data: bytes) -> tuple[object, ...]:
        """A compile of a checkpoint with one file replaced."""
        model = self.directory(source, name, data)
        return "compile", model, "-o", self.scratch / "out", "--target", "null"

    @cached_property
    def onnx(self) -> Path:
        """An engine of another target, whose passes had much to say."""
        asked = ("--profile", self.profile, "--specialize", "exact", "--quantize", "int8")
        self._honest("compile", self.model, "-o", self.place / "onnx", *asked)
        return self.place / "onnx"

    def resealed(self, name: str, data: bytes, engine: Path | None = None) -> Path:
        """An engine with one file replaced, and a manifest that says so."""
        made = self.directory(engine or self.engine, name, data)
        body = json.loads((made / MANIFEST).read_bytes())
        body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (made / MANIFEST).unlink()
        (made / MANIFEST).write_bytes(sealed(canonical(body)))
        return made


def sealed(manifest: bytes) -> bytes:
    """A manifest with a seal that fits, if a manifest with any seal can be read from it."""
    try:
        body = json.loads(manifest)
        body.pop("seal", None)
        return canonical({**body, "seal": hashlib.sha256(canonical(body)).hexdigest()})
    except (ValueError, AttributeError, RecursionError):
        return manifest


@contextmanager
def kept_traces() -> Iterator[None]:
    """Exports are made once."""
    from liquidc.frontend.parts import PartTracer
    from tests import traces

    PartTracer.export = traces.kept
    try:
        yield
    finally:
        PartTracer.export = traces.export

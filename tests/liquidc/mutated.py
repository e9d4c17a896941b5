"""Runs the command on mutated files and says what came out; also as a program of its own.

    python -m tests.liquidc.mutated KIND FIRST COUNT

A case is a kind of file and a number, from which everything about it follows.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn

from click.testing import CliRunner

from liquidc.backends.onnxruntime.backend import NODES
from liquidc.cli import main as entry
from liquidc.engine import MARK, PARTIAL
from liquidc.errors import LiquidWarning
from liquidc.inputs import TEMPLATE
from liquidc.journal import Journal
from liquidc.machine import DEFAULT
from liquidc.manifest import MANIFEST
from liquidc.records import canonical
from liquidc.report import REPORT
from liquidc.report.parts import DATA
from liquidc.special_tokens import SPECIAL_TOKENS_MAP
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.mutator import mutate_bytes, mutate_json, mutate_text

MAX_SECONDS = 10
VERIFY = ("--windows", 1, "--window", 8, "--prompts", 1, "--new-tokens", 2)
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
CHAT = """{% for m in messages %}
{%- if m['role'] == 'system' %}<s>{{ m.content | trim }}{% else %}[{{ m.role }}] {{ m.content }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}
"""
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
            found = run("honest", *self._resuming(self.place / "out"))
        finally:
            Journal.keep, weights_file.KEPT = keep, kept
        assert found.code == 130, found.output + found.trace

    def _resuming(self, output: Path) -> tuple[object, ...]:
        return "compile", self.model, "-o", output, "--target", "null", "--resume"

    def cases(self, kind: str, numbers: range) -> Iterator[Outcome]:
        """What the commands of some cases do."""
        for number in numbers:
            shutil.rmtree(self.scratch)
            self.scratch.mkdir()
            case = f"{kind} {number}"
            for args in (KINDS | MORE)[kind](self, Random(case)):
                yield run(case, *args)

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


Commands = Callable[[World, Random], list[tuple[object, ...]]]


def sealed(manifest: bytes) -> bytes:
    """A manifest with a seal that fits, if a manifest with any seal can be read from it."""
    try:
        body = json.loads(manifest)
        body.pop("seal", None)
        return canonical({**body, "seal": hashlib.sha256(canonical(body)).hexdigest()})
    except (ValueError, AttributeError, RecursionError):
        return manifest


def _mutated(random: Random, data: bytes) -> bytes:
    """A JSON file with one mutation, mostly of its value."""
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    return mutate_json(random, json.loads(data))


def _config(world: World, random: Random) -> list[tuple[object, ...]]:
    data = _mutated(random, (world.model / "config.json").read_bytes())
    return [world.checkpoint(world.model, "config.json", data)]


def _header(world: World, random: Random) -> list[tuple[object, ...]]:
    data = (world.model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, length = _mutated(random, data[8:end]), random.random()
    size = len(header) if length < 0.9 else random.choice((0, 2**63, 2**64 - 1, len(data)))
    changed = size.to_bytes(8, "little") + header + data[end:]
    if random.random() < 0.1:
        changed = mutate_bytes(random, data)
    return [world.checkpoint(world.model, "model.safetensors", changed)]


def _index(world: World, random: Random) -> list[tuple[object, ...]]:
    name = "model.safetensors.index.json"
    data = _mutated(random, (world.sharded / name).read_bytes())
    return [world.checkpoint(world.sharded, name, data)]


def _beside(name: str) -> Commands:
    """A file that is copied into the engine: both compile and run read it.

    Of templates only what is written wrong: what one computes has a process with limits of its own.
    """

    def commands(world: World, random: Random) -> list[tuple[object, ...]]:
        template = name == TEMPLATE
        if template:
            data = mutate_text(random, CHAT)
        else:
            data = _mutated(random, (world.model / name).read_bytes())
        engine, chat = world.resealed(name, data), ("--chat",) * template
        return [
            (*world.checkpoint(world.model, name, data), "--dry-run"),
            ("run", engine, "-p", "a <s> b", "-n", 2, "--json", *chat),
        ]

    return commands


def _manifest(world: World, random: Random) -> list[tuple[object, ...]]:
    data = (world.engine / MANIFEST).read_bytes()
    changed = mutate_bytes(random, data)
    if random.random() < 0.9:
        changed = sealed(mutate_json(random, json.loads(data)))
    engine = world.directory(world.engine, MANIFEST, changed)
    return [
        ("inspect", engine, *random.choice(((), ("--json",), ("--explain",)))),
        random.choice(
            (
                ("run", engine, "-p", "ab", "-n", 2, "--json"),
                ("run", engine, "-p", "ab", "-n", 2, "--min-depth", 1, "--json"),
                ("verify", engine, "--model", world.model, *VERIFY),
            )
        ),
    ]


def _journal(world: World, random: Random) -> list[tuple[object, ...]]:
    shutil.copytree(world.partial, world.scratch / f"out{PARTIAL}")
    journal = world.scratch / f"out{PARTIAL}" / MARK
    lines = journal.read_bytes().splitlines(keepends=True)
    at = random.randrange(len(lines))
    text = _mutated(random, lines[at].partition(b" ")[2].strip())
    lines[at] = b"%08x %b" % (zlib.crc32(text), text) + b"\n" * (random.random() < 0.9)
    data = b"".join(lines)
    journal.write_bytes(mutate_bytes(random, data) if random.random() < 0.2 else data)
    output = world.scratch / "out"
    return [
        (*world._resuming(output), "--dry-run"),  # pyright: ignore[reportPrivateUsage]
        world._resuming(output),  # pyright: ignore[reportPrivateUsage]
    ]


def _profile(world: World, random: Random) -> list[tuple[object, ...]]:
    changed = world.scratch / "profile.json"
    changed.write_bytes(_mutated(random, world.profile.read_bytes()))
    compiling = ("compile", world.model, "-o", world.scratch / "out", "--target", "null")
    return [
        random.choice(
            (
                ("profile", "show", changed),
                ("profile", "merge", world.profile, changed, "-o", world.scratch / "merged"),
            )
        ),
        (*compiling, "--profile", changed, *random.choice(((), ("--specialize", "exact")))),
    ]


def _recipe(world: World, random: Random) -> list[tuple[object, ...]]:
    ir = next((world.place / "dump").glob("*fuse-linear.ir")).read_text()
    names = [line.split()[1][1:] for line in ir.splitlines() if line.startswith("weight @")]
    lines = [f'"{name}" = "{random.choice(("int8", "float"))}"' for name in names if "proj" in name]
    data = ("[weights]\n" + "\n".join(lines) + "\n").encode()
    text = data.decode()
    recipe = world.scratch / "recipe.toml"
    ways = (mutate_bytes(random, data), mutate_text(random, text), mutate_text(random, text))
    recipe.write_bytes(random.choice(ways))
    compiling = ("compile", world.model, "-o", world.scratch / "out", "--target", "null")
    return [(*compiling, "--quantize", "mixed", "--recipe", recipe)]


def _ir(world: World, random: Random) -> list[tuple[object, ...]]:
    files = sorted((world.place / "dump").glob("*.ir"))
    text = random.choice(files).read_text()
    file = world.scratch / "module.ir"
    ways = (mutate_bytes(random, text.encode()), *[mutate_text(random, text)] * 3)
    file.write_bytes(random.choice(ways))
    passes = "fold-constants,eliminate-common,fuse-linear,compact-tokens,eliminate-dead"
    return [("opt", file, *random.choice(((), ("--passes", passes))))]


def _special(world: World, random: Random) -> list[tuple[object, ...]]:
    told = {"bos_token": {"content": "<s>"}, "pad_token": "<p>", "extra_special_tokens": ["<x>"]}
    engine = world.resealed(SPECIAL_TOKENS_MAP, mutate_json(random, told))
    return [("run", engine, "-p", "a <s> b", "-n", 2, "--json")]


def _report(world: World, random: Random) -> list[tuple[object, ...]]:
    before, script, rest = (world.engine / REPORT).read_text().partition(DATA)
    data, after = rest.split("</script>", 1)
    changed = mutate_json(random, json.loads(data)).decode(errors="replace")
    page = f"{before}{script}{changed}</script>{after}"
    engine = world.resealed(REPORT, page.encode())
    return [("inspect", engine, *random.choice(((), ("--json",))))]


def _nodes(world: World, random: Random) -> list[tuple[object, ...]]:
    engine = world.resealed(NODES, _mutated(random, (world.onnx / NODES).read_bytes()), world.onnx)
    return [("verify", engine, "--model", world.model, *VERIFY)]


def _onnx_manifest(world: World, random: Random) -> list[tuple[object, ...]]:
    changed = sealed(mutate_json(random, json.loads((world.onnx / MANIFEST).read_bytes())))
    engine = world.directory(world.onnx, MANIFEST, changed)
    return [
        ("inspect", engine, *random.choice(((), ("--json",), ("--explain",)))),
        random.choice(
            (
                ("run", engine, "-p", "ab", "-n", 2, "--json"),
                ("verify", engine, "--model", world.model, *VERIFY),
            )
        ),
    ]


def _data(world: World, random: Random) -> list[tuple[object, ...]]:
    data = b'{"ids": [1, 2, 3, 4]}\n{"text": "Ein Text"}\n"another"\n'
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    lines[at] = mutate_json(random, json.loads(lines[at])) + b"\n"
    changed = mutate_bytes(random, data) if random.random() < 0.3 else b"".join(lines)
    file, ids = world.scratch / "data.jsonl", world.scratch / "data.json"
    file.write_bytes(changed)
    ids.write_bytes(mutate_json(random, [index % 256 for index in range(80)]))
    return [
        ("profile", world.engine, "--data", file, "-o", world.scratch / "p.json", "--window", 8),
        ("verify", world.engine, "--model", world.model, *VERIFY, "--data", ids),
    ]


def _machine(world: World, random: Random) -> list[tuple[object, ...]]:
    file = world.scratch / "machine.json"
    file.write_bytes(_mutated(random, DEFAULT.read_bytes()))
    compiling = ("compile", world.model, "-o", world.scratch / "out", "--target", "onnxruntime")
    return [(*compiling, "--profile", world.profile, "--machine", file, "--dry-run")]


KINDS: dict[str, Commands] = {
    "config": _config,
    "header": _header,
    "index": _index,
    "tokenizer": _beside("tokenizer.json"),
    "tokenizer config": _beside("tokenizer_config.json"),
    "template": _beside(TEMPLATE),
    "generation": _beside("generation_config.json"),
    "manifest": _manifest,
    "journal": _journal,
    "profile": _profile,
    "recipe": _recipe,
    "ir": _ir,
}
MORE: dict[str, Commands] = {
    "special tokens": _special,
    "report": _report,
    "nodes": _nodes,
    "manifest for ONNX Runtime": _onnx_manifest,
    "data": _data,
    "machine table": _machine,
}
"""Kinds that the slow run adds."""


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


def program(kind: str, first: str, count: str) -> None:
    """Print what the cases of a kind do, one JSON object a line, after the peak before them."""
    import torch

    torch.set_num_threads(1)
    print(peak(), flush=True)
    with tempfile.TemporaryDirectory() as place, kept_traces():
        world = World(Path(place))
        for outcome in world.cases(kind, range(int(first), int(first) + int(count))):
            # Ends the process if a library hangs, which no signal handler of Python interrupts.
            faulthandler.dump_traceback_later(6 * MAX_SECONDS, exit=True)
            print(json.dumps(asdict(outcome)), flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    program(*sys.argv[1:])

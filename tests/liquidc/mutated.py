"""Runs the command on mutated files and says what came out; also as a program of its own.

    python -m tests.liquidc.mutated KIND FIRST COUNT

A case is a kind of file and a number, from which everything about it follows.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

from liquidc.backends.onnxruntime.backend import NODES
from liquidc.engine import MARK, PARTIAL
from liquidc.inputs import TEMPLATE
from liquidc.machine import DEFAULT
from liquidc.manifest import MANIFEST
from liquidc.report import REPORT
from liquidc.report.parts import DATA
from liquidc.special_tokens import SPECIAL_TOKENS_MAP
from tests.liquidc.mutated_world import MAX_SECONDS, Outcome, World, kept_traces, peak, run, sealed
from tests.liquidc.mutator import mutate_bytes, mutate_json, mutate_text

VERIFY = ("--windows", 1, "--window", 8, "--prompts", 1, "--new-tokens", 2)
CHAT = """{% for m in messages %}
{%- if m['role'] == 'system' %}<s>{{ m.content | trim }}{% else %}[{{ m.role }}] {{ m.content }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}
"""

Commands = Callable[[World, Random], list[tuple[object, ...]]]


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
        (*world.resuming(output), "--dry-run"),
        world.resuming(output),
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
    file.write_bytes(changed[:5000])  # a long text is not hostile, and takes its time
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


def cases(world: World, kind: str, numbers: range) -> Iterator[Outcome]:
    """What the commands of some cases do."""
    for number in numbers:
        shutil.rmtree(world.scratch)
        world.scratch.mkdir()
        case = f"{kind} {number}"
        for args in (KINDS | MORE)[kind](world, Random(case)):
            yield run(case, *args)


def program(kind: str, first: str, count: str) -> None:
    """Print what the cases of a kind do, one JSON object a line, after the peak before them."""
    import torch

    torch.set_num_threads(1)
    print(peak(), flush=True)
    with tempfile.TemporaryDirectory() as place, kept_traces():
        world = World(Path(place))
        for outcome in cases(world, kind, range(int(first), int(first) + int(count))):
            # Ends the process if a library hangs, which no signal handler of Python interrupts.
            faulthandler.dump_traceback_later(6 * MAX_SECONDS, exit=True)
            print(json.dumps(asdict(outcome)), flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    program(*sys.argv[1:])

"""Bytes that are no text, and outputs that take none, at every edge of the command line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from liquidc.cli.main import VERBS, cli
from liquidc.corpus import Corpus
from liquidc.errors import InputError
from liquidc.inputs import DirectoryInput
from liquidc.records import canonical
from liquidc.runtime import load
from liquidc.tokenizer import Tokenizer
from tests.liquidc.test_cli import call, names, ok

BAD = os.fsdecode(b"caf\xe9")
"""As Python gives what is not UTF-8 on the command line."""


def process(
    *args: object, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "liquidc.cli.main", *map(str, args)]
    options = {"capture_output": True, "timeout": 120, "check": False} | options
    return subprocess.run(command, env={**os.environ, **(env or {})}, **options)


def one_line(stderr: bytes, message: str) -> None:
    (line,) = stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert message in line


TEXTS = [
    (verb, option.opts[0])
    for verb in VERBS
    for option in cli.get_command(click.Context(cli), verb).params  # pyright: ignore
    if isinstance(option, click.Option) and option.type.name == "text"
]


@pytest.mark.parametrize(("verb", "option"), TEXTS)
def test_every_text_option_takes_text_alone(verb: str, option: str, tmp_path: Path) -> None:
    result = call(verb, tmp_path, option, BAD)
    assert result.exit_code == 2
    one_line(result.stderr_bytes, r"'caf\udce9' is not UTF-8 text")


@pytest.mark.parametrize(
    "arguments", [("run", "ENGINE"), ("run", "ENGINE", "--chat"), ("opt", "-")], ids=" ".join
)
def test_standard_input_that_is_not_text(arguments: tuple[str, ...], null_engine: Path) -> None:
    given = [str(null_engine) if argument == "ENGINE" else argument for argument in arguments]
    done = CliRunner().invoke(cli, given, input=b"caf\xe9 ol\xe9\n")
    assert (done.exit_code, done.stdout) == (2, "")
    one_line(done.stderr_bytes, "standard input: not UTF-8 text")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_standard_input_in_any_locale(locale: str, null_engine: Path) -> None:
    """In C, Python reads what is not UTF-8 as lone surrogates, unless it is told otherwise."""
    done = process("run", null_engine, env={"LC_ALL": locale}, input=b"caf\xe9\n")
    assert (done.returncode, done.stdout) == (2, b"")
    one_line(done.stderr, "standard input: not UTF-8 text")


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_json_in_the_encoding_of_the_locale(charset: str, null_engine: Path) -> None:
    text = "café → ü" if charset == "ascii" else "café\0"
    given = ["run", str(null_engine), "-n", "2", "--json"]
    runner = CliRunner(charset=charset)
    if charset == "ascii":
        done = runner.invoke(cli, [*given, "-p", text])
        wrong = runner.invoke(cli, given, input=text.encode())
        one_line(wrong.stderr_bytes, "standard input: not ASCII text")
    else:
        done = runner.invoke(cli, given, input=text.encode(charset))
    assert json.loads(done.stdout_bytes.decode(charset))["prompt"] == text


def test_an_output_that_lacks_characters(null_engine: Path) -> None:
    run = ("run", null_engine, "-p", "é → ü", "-n", 8, "--temperature", 3, "--show-depth")
    done = process(*run, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "of 4 over 8 tokens" in done.stdout.decode("ascii")


OUTPUTS = {
    "run ENGINE -p x -n 3": "No space left on device",
    "inspect ENGINE": "No space left on device",
    "inspect ENGINE --json": "No space left on device",
    "run ENGINE --ids x --json": "is not a list of numbers",
}


@pytest.mark.parametrize("line", OUTPUTS)
def test_outputs_that_take_nothing(line: str, null_engine: Path) -> None:
    given = [null_engine if word == "ENGINE" else word for word in line.split()]
    with open("/dev/full", "wb") as full:
        done = process(*given, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    one_line(done.stderr, OUTPUTS[line])


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect ENGINE", 0),
        ("run ENGINE --ids 999", 2),
        ("compile MODEL --target null --dry-run", 0),
    ],
)
def test_errors_that_can_t_be_said(
    line: str, code: int, null_engine: Path, model_directory: Path, tmp_path: Path
) -> None:
    """What can't be written to standard error changes no exit code."""
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    (model / "generation_config.json").write_text('{"num_beams": 4}')
    known = {"ENGINE": null_engine, "MODEL": model}
    given = [known.get(word, word) for word in line.split()]
    with open("/dev/full", "wb") as full:
        done = process(*given, capture_output=False, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == code


def test_files_that_a_full_disk_does_not_take(null_engine: Path, tmp_path: Path) -> None:
    ir = null_engine / "module.ir"
    done = process("opt", ir, "-o", "/dev/full")
    assert (done.returncode, done.stdout) == (2, b"")
    one_line(done.stderr, "No space left on device")
    data = tmp_path / "ids.jsonl"
    data.write_text('{"ids": [1, 2, 3]}')
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))}
    done = process("profile", null_engine, "--data", data, "-o", tmp_path / "p.json", **full)
    assert (done.returncode, done.stdout) == (2, b"")
    error = done.stderr.splitlines(keepends=True)[-1]
    one_line(error, "p.json: File too large; free some space or write elsewhere")
    assert names(tmp_path) == ["ids.jsonl"]


@pytest.mark.parametrize("verb", VERBS)
def test_traceback_before_and_after_the_verb(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*rest: object, **more: object) -> None:
        raise ZeroDivisionError

    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    inner = command.commands["merge"] if isinstance(command, click.Group) else command
    words = [verb, *(["merge"] if command is not inner else [])]
    monkeypatch.setattr(inner, "params", [p for p in inner.params if p.name == "traceback"])
    monkeypatch.setattr(inner, "callback", fault)
    for given in (["--traceback", *words], [*words, "--traceback"]):
        result = call(*given)
        assert result.exit_code == 4
        assert "in fault\n" in result.stderr
    assert call(*words).stderr.splitlines() == [
        "error: ZeroDivisionError:  (a fault of liquidc; --traceback shows where)"
    ]


@pytest.mark.parametrize(
    ("closed", "line", "code"),
    [(0, "run ENGINE", 2), (1, "inspect ENGINE", 0), (2, "inspect ENGINE --bogus", 2)],
)
def test_closed_streams(closed: int, line: str, code: int, null_engine: Path) -> None:
    given = [null_engine if word == "ENGINE" else word for word in line.split()]
    done = process(*given, preexec_fn=lambda: os.close(closed))
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    if closed == 0:
        one_line(done.stderr, "the prompt is empty")


def test_paths_that_are_not_text(model_directory: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_directory, tmp_path / BAD))
    engine = tmp_path / os.fsdecode(b"engine\xff")
    told = ok("compile", model, "-o", engine, "--target", "null")
    assert told["engine"] == str(engine)
    assert ok("verify", engine, "--windows", 2, "--window", 8, "--prompts", 1)["passed"]
    done = process("compile", tmp_path / f"{BAD}2", "-o", tmp_path / "none")
    assert done.returncode == 2
    one_line(done.stderr, "no such directory")
    assert len(names(tmp_path)) == 3


def test_paths_that_onnx_runtime_does_not_open(tmp_path: Path) -> None:
    from liquidc.backends.base import RunnerOptions
    from liquidc.backends.onnxruntime.runner import OrtRunner
    from tests.liquidc.fakes import manifest

    told = manifest(artifact={"model": "model.onnx"})
    with pytest.raises(InputError, match="ONNX Runtime opens UTF-8 paths alone"):
        OrtRunner(tmp_path / BAD, told, RunnerOptions())


def test_surrogates_in_the_python_interface(null_engine: Path, model_directory: Path) -> None:
    with load(null_engine) as engine:
        for arguments in ({"prompt": BAD}, {"prompt": "x", "stop": [BAD]}):
            with pytest.raises(InputError, match="not valid Unicode text"):
                engine.generate(**arguments)  # pyright: ignore
    with pytest.raises(InputError, match="lone surrogate"):
        Tokenizer(model_directory / "tokenizer.json").spans(BAD)
    assert json.loads(canonical({"a": BAD})) == {"a": BAD}


def test_surrogates_in_data(model_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "\\ud800"}\n')
    encode = Tokenizer(model_directory / "tokenizer.json").encode
    with pytest.raises(InputError, match=r"data\.jsonl: .* is not valid Unicode text"):
        list(Corpus(data, encode).blocks(8))
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    (model / "tokenizer_config.json").write_text('{"bos_token": "\\udc00"}')
    with pytest.raises(InputError, match=r"the token .* is not valid Unicode"):
        DirectoryInput(model).check()

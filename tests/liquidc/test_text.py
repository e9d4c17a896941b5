"""What comes from files is printed, not obeyed by a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import warnings
from pathlib import Path

from liquidc.errors import LiquidWarning
from liquidc.text import printable, without_controls
from tests.liquidc.test_cli import call

FORGED = "x\n\x1b[31merror: forged\r\x9b2J\u202e\u2028"


def test_printable() -> None:
    assert printable(FORGED) == r"x\n\x1b[31merror: forged\r\x9b2J\u202e\u2028"
    assert printable("à côté, 日本 🙂") == "à côté, 日本 🙂"
    assert printable("\ud800\0") == r"\ud800\x00"
    assert printable("a\tb\n", keep="\t") == r"a" "\t" r"b\n"


def test_without_controls() -> None:
    assert (
        without_controls("a\n\tb\x1b[31m\r\x9bé👩\u200d🔬") == "a\n\tb\\x1b[31m\\r\\x9bé👩\u200d🔬"
    )


def test_an_error_in_ir_shows_the_line_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "f\nerror: forged"
    path.write_text("module @m\n\x1b[31merror: forged\x9b")
    result = call("opt", path)
    assert result.exit_code == 2
    first, source, caret = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert r"f\nerror: forged:2:1: unexpected character" in first
    assert source == r"  \x1b[31merror: forged\x9b"
    assert caret == "  ^"


def test_names_of_files_and_fields(tmp_path: Path) -> None:
    model = tmp_path / "x\n\x1b[31merror: forged"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": FORGED}))
    for arguments in (
        ("compile", model, "-o", tmp_path / "engine"),
        ("compile", tmp_path / FORGED.replace("\u2028", ""), "-o", tmp_path / "engine"),
        ("inspect", model),
        ("run", model, "-p", "x"),
    ):
        for more in ((), ("--json",)):
            result = call(*arguments, *more)
            assert result.exit_code == 2
            (line,) = result.stderr.splitlines()
            assert line.startswith("error: ")
            assert "\x1b" not in result.output
            assert "\x9b" not in result.output


def test_warnings() -> None:
    code = (
        f"import warnings; from liquidc.cli import main as m; m._warn(m.LiquidWarning({FORGED!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == f"warning: {printable(FORGED)}\n"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn(FORGED, LiquidWarning, stacklevel=1)
    assert str(seen[0].message) == FORGED, "in Python it is as it was said"


def test_text_of_a_model_on_a_terminal(null_engine: Path) -> None:
    """Bytes of a random model hold control characters; a pipe gets them, a terminal does not."""
    command = [sys.executable, "-m", "liquidc.cli.main", "run", str(null_engine), "-p", "abc"]
    command += ["-n", "120", "--temperature", "5", "--seed", "3"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    assert any(byte < 32 and byte not in b"\n\t" for byte in piped)
    leader, follower = pty.openpty()
    shown = b""
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None or select.select([leader], [], [], 0)[0]:
            if select.select([leader], [], [], 0.1)[0]:
                shown += os.read(leader, 1 << 16)
    os.close(leader)
    os.close(follower)
    text = shown.decode().replace("\r\n", "\n")
    assert not [c for c in text if ord(c) < 32 and c not in "\n\t"]
    assert "\\x" in text

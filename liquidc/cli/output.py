"""What verbs share: JSON for machines, tables for people, progress for those who wait.

Results go to standard output; progress and errors to standard error.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from liquidc.errors import InputError
from liquidc.files import MAX_BYTES
from liquidc.text import is_text, printable
from liquidc.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SCHEMA = 1
"""Version of the JSON results."""

_RAW = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What JSON leaves as it is and a terminal obeys."""
F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Adds `--json`; the verb gets it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        function
    )


def emit_json(result: dict[str, Any]) -> None:
    """Print a result as JSON, with the versions that every result carries."""
    complete = {"schema": SCHEMA, "liquidc": __version__, **result}
    text = json.dumps(complete, indent=2, ensure_ascii=False)
    text = _RAW.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(complete, indent=2)
    click.echo(text)


def say(text: str, *, err: bool = False) -> None:
    """Print one line, which can hold what comes from a file."""
    click.echo(printable(text), err=err)


def emit_error(message: str, code: int, *, as_json: bool) -> None:
    """Print an error, where anything can be printed; nothing for an empty message."""
    if not message:
        return
    with contextlib.suppress(OSError):
        click.echo(f"error: {message}", err=True)
    with contextlib.suppress(OSError):
        if as_json:
            emit_json({"error": message, "exit_code": code})


def read_stdin(most: int = MAX_BYTES) -> str:
    """All of standard input.

    Raises:
        InputError: it is not text in the encoding of the locale, or has over `most` characters.
    """
    with decoding("standard input"):
        text = sys.stdin.read(most + 1)
    if len(text) > most:
        raise InputError(f"standard input: over {most} characters; they are not read")
    return text


@contextlib.contextmanager
def decoding(source: str) -> Generator[None]:
    """Say in one line that standard input can't be decoded.

    Raises:
        InputError: the block read bytes that are not text in the encoding of the locale.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not {error.encoding.upper()} text; convert it") from None


class Text(click.types.StringParamType):
    """A text on the command line, which must be valid in the encoding of the locale."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See the base class."""
        text = super().convert(value, param, ctx)
        if not is_text(text):
            self.fail(f"{text!r:.80} is not UTF-8 text.", param, ctx)
        return text


def console(*, stderr: bool = False) -> Console:
    """A rich console; plain and wide when the output is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    return Console(
        file=stream, width=None if terminal else 200, highlight=False, soft_wrap=not terminal
    )


def table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    right: int = 1,
    stderr: bool = False,
) -> None:
    """Print a table; columns from number `right` on are aligned to the right."""
    from rich.table import Table
    from rich.text import Text as Cell

    heading = Cell(printable(title)) if title else None
    shown = Table(title=heading, title_justify="left", box=_box(), pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index >= right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Cell(printable(cell)) for cell in row))
    console(stderr=stderr).print(shown)


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def bytes_text(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return ""


def fidelity_text(found: dict[str, Any]) -> str:
    """What a lossy compile changed, as a manifest tells it, without what does not apply."""
    told = [f"KL {found['kl_nats']:.3g} nats", f"top-1 {found['top1_agreement']:.2%}"]
    if found["bits_per_byte"] is not None:
        told.append(
            f"bits per byte {found['bits_per_byte']:.4f} against "
            f"{found['bits_per_byte_original']:.4f}"
        )
    if found["gate_flips"] is not None:
        told.append(f"gates decide otherwise {found['gate_flips']:.2%} of the time")
    return ", ".join(told)


def parse_bytes(text: str, option: str) -> int:
    """What an option says, as bytes: 1 kB is 1000 of them.

    Raises:
        BadParameter: it is no size.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*(B|kB|KB|MB|GB)?", text.strip())
    if match is None:
        raise click.BadParameter(
            f"{text!r} is not a size such as 400MB",
            click.get_current_context(),
            param_hint=option,
        )
    units = {None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(match[1]) * units[match[2]])


class StageProgress:
    """Progress of a compile: a bar on a terminal, else one line for each finished stage."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._name, self._told = "", 0.0
        self._done = self._total = 0

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""
        self._name, self._told = name, time.monotonic()
        self._done, self._total = 0, total
        if not self._terminal:
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
        )
        from rich.progress import Progress as Bar

        columns = [SpinnerColumn(), TextColumn("{task.description:10s}")]
        if total:
            columns += [BarColumn(), TaskProgressColumn(), DownloadColumn()]
        self._bar = Bar(*columns, console=console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(name, total=total or None)

    def advance(self, amount: int) -> None:
        """So many bytes more were written."""
        self._done += amount
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)
        elif self._total:
            share = f"{bytes_text(self._done)} of {bytes_text(self._total)}"
            self._tell(f"{self._name}: {share}, {self._done / self._total:.0%}")

    def part(self, what: str, done: int, total: int) -> None:
        """Of `total` parts of a stage that writes nothing, so many are done."""
        text = f"{self._name}: {done} of {total} {what}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)
        else:
            self._tell(text)

    def _tell(self, text: str) -> None:
        """A line now and then, where there is no terminal."""
        if not self._quiet and time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            say(text, err=True)

    def note(self, text: str) -> None:
        """Something that who waits should know."""
        if not self._quiet:
            say(text, err=True)

    def done(self, name: str, seconds: float) -> None:
        """The stage is over."""
        self.stop()
        if not self._quiet:
            click.echo(f"{name:10s} {seconds:8.2f} s", err=True)

    def stop(self) -> None:
        """Remove the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


@contextlib.contextmanager
def counting(*, quiet: bool = False) -> Generator[Callable[[str, int, int], None]]:
    """A function that is told (what, done, total): bars on a terminal, else lines now and then."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        from rich.progress import Progress as Bar

        tasks: dict[str, TaskID] = {}
        with Bar(console=console(stderr=True), transient=True) as bar:

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

            yield show
    else:
        last: dict[str, tuple[float, int]] = {}

        def tell(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            when, told = last.get(what, (0.0, -1))
            if now - when > 10 or told != done == total:
                last[what] = now, done
                click.echo(f"{what}: {done} of {total}", err=True)

        yield tell

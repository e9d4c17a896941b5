"""The `liquidc` command: finds the verb, runs it, turns every outcome into an exit code.

0 done · 1 a check ran and failed · 2 bad input or usage · 3 target not available here ·
4 internal error · 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, cast

import click

from liquidc.cli.output import Text, emit_error, say
from liquidc.errors import IRError, LiquidError, LiquidWarning
from liquidc.knobs import debug
from liquidc.text import printable
from liquidc.version import __version__

VERBS = {
    "compile": "Compile a model into an engine directory.",
    "run": "Generate text with an engine.",
    "verify": "Compare an engine with its PyTorch reference.",
    "liquify": "Give a model without gates depth gates.",
    "export-hf": "Write a model as a Liquid checkpoint for transformers.",
    "profile": "Measure what a model's gates and experts decide on a corpus.",
    "bench": "Time an engine at several depths.",
    "inspect": "Show what an engine consists of.",
    "opt": "Run passes over IR text.",
    "targets": "List what this machine can build and run.",
}
MAX_LINE = 2000
"""Characters of a line of an error, which can repeat what stands in a file."""


class LazyGroup(click.Group):
    """Imports `liquidc.cli.VERB` when a verb is called, and reports every error in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order in which one meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb `cmd_name`."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"liquidc.cli.{cmd_name.replace('-', '_')}")
        command = cast(click.Command, module.command)
        for parameter in command.params:
            if type(parameter.type) is click.types.StringParamType:
                parameter.type = Text()
        _add_traceback(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, written without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run and exit."""
        given = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        trace = debug() or "--traceback" in given
        as_json = "--json" in given
        try:
            code: int | None = super().main(given, *rest, **extra)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):
            # click itself leaves by SystemExit when, and only when, the pipe is broken
            _silence_stdout()
            code = 128 + signal.SIGPIPE
        except (Exception, KeyboardInterrupt) as error:
            code = report(error, trace=trace, as_json=as_json)
            try:
                sys.stdout.flush()
            except OSError:
                _silence_stdout()
        sys.exit(code or 0)


def report(error: BaseException, *, trace: bool, as_json: bool) -> int:
    """Say what went wrong, on one line, and give the exit code."""
    code, message = explain(error)
    if code == 4 and trace:
        import traceback

        traceback.print_exception(error)
    elif code == 4:
        message += " (a fault of liquidc; --traceback shows where)"
    emit_error(message, code, as_json=as_json)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception; the message is one line, and three of an IRError."""
    code, message = _explain(error)
    lines = error.lines if isinstance(error, IRError) else (message,)
    return code, "\n".join(_shortened(printable(line, keep="\t")) for line in lines)


def _shortened(line: str) -> str:
    if len(line) <= MAX_LINE:
        return line
    return f"{line[: MAX_LINE // 2]}…{line[-MAX_LINE // 2 :]}"


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, LiquidError):
        return error.exit_code, str(error)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        signum = getattr(cause, "signum", signal.SIGINT)
        return 128 + int(signum), "; ".join(["interrupted", *notes(cause)])
    if isinstance(error, click.UsageError):
        hint = f"; try '{error.ctx.command_path} --help'" if error.ctx is not None else ""
        return 2, error.format_message().rstrip(".") + hint
    if isinstance(error, click.ClickException):
        return 2, error.format_message()
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return 2, "; ".join([f"{place}{error.strerror}", *notes(error)])
    return 4, f"{type(error).__name__}: {error}".replace("\n", " ")


def notes(error: BaseException | None) -> list[str]:
    """What was added to an exception by `add_note`: how to go on after it."""
    return getattr(error, "__notes__", [])


def _silence_stdout() -> None:
    """Keep Python from failing again when it flushes at exit what can't be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _traceback() -> click.Option:
    """The option; `LazyGroup.main` looks for it itself, since errors are reported there."""
    help = "Show the traceback of an internal error."
    return click.Option(["--traceback"], is_flag=True, expose_value=False, help=help)


def _add_traceback(command: click.Command) -> None:
    """Let a verb and its own verbs take `--traceback` too, once."""
    if not any(parameter.name == "traceback" for parameter in command.params):
        command.params.append(_traceback())
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _add_traceback(inner)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 a check failed, 2 bad input or usage, 3 the target is not "
    "available here, 4 internal error. Every verb takes --json.",
)
@click.version_option(__version__, prog_name="liquidc")
@click.pass_context
def cli(ctx: click.Context) -> None:
    r"""Compile decoder LLMs with dynamic depth and sparse experts, run and verify the engines.

    \b
    Examples:
      liquidc compile samples/tiny-liquid -o engine --target onnxruntime
      liquidc run engine -p "The with statement" --show-depth
      liquidc verify engine
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


_add_traceback(cli)


def main() -> None:
    """Entry point of the console script."""
    # Threads that spin while they wait for work take the cores from other processes. `liquidc
    # profile` of the sample, beside two busy processes on 2 cores of an AMD EPYC, two runs: 79 and
    # 22 s with spinning, 23 and 19 s without. PyTorch reads it when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Tracing makes millions of small objects that live on. With fewer collections, and none at
    # exit, a compile of the sample takes 4.8 s instead of 6.6 (2 cores of an AMD EPYC).
    gc.set_threshold(20_000, 10, 10)
    atexit.register(gc.freeze)
    for name, mode, errors in (
        ("stdin", "r", "strict"),
        ("stdout", "w", "replace"),
        ("stderr", "w", "replace"),
    ):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if not debug() and "--traceback" not in sys.argv:
        _own_stderr()
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", LiquidWarning)
    warnings.showwarning = _warn
    cli.main()


class _BestEffort(io.FileIO):
    """What can't be written is lost: there is no other place to say so."""

    def write(self, data: Any, /) -> int:
        """See the base class."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _own_stderr() -> None:
    """Leave standard error to this program alone.

    Libraries that are not Python print there too: panics of `tokenizers` with a stack and with
    text of the file, raw.
    """
    try:
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # it was closed
        return
    os.dup2(nothing, 2)
    os.close(nothing)
    raw = io.BufferedWriter(_BestEffort(kept, "w"))
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=True)


def _warn(message: Warning | str, *rest: Any) -> None:
    """Say it on one line; libraries' own warnings are for developers and stay quiet."""
    del rest
    say(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()

"""`liquidc opt [FILE]`: passes over IR text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from liquidc.cli.compile import show_statistics
from liquidc.cli.output import emit_json, json_option, read_stdin, say

if TYPE_CHECKING:
    from liquidc.ir.rewriter import Statistics


@click.command(
    epilog="""\b
Examples:
  liquidc opt module.ir --passes fold-constants,eliminate-dead
  liquidc compile model -o engine --dump-dir d && liquidc opt d/00-trace.ir --passes fuse-linear
  cat module.ir | liquidc opt - --passes compact-tokens --verify-each --stats
  liquidc opt module.ir --passes fuse-linear --explain fuse-linear
  liquidc opt --list"""
)
@click.argument("file", default="-", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--passes", default="", help="Names, in order, with options: `a,b{key=value}`.")
@click.option("--verify-each", is_flag=True, help="Check the IR after every pass.")
@click.option("--stats", is_flag=True, help="Show on standard error how often each rule fired.")
@click.option("--explain", metavar="RULE", help="Show the rule's nearest miss and its reason.")
@click.option("--list", "list_passes", is_flag=True, help="List the passes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the IR to a file.")
@json_option
def command(
    file: Path,
    passes: str,
    verify_each: bool,
    stats: bool,
    explain: str | None,
    list_passes: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run passes over the IR text in FILE ("-" or nothing: standard input) and print the result."""
    from liquidc.option_text import split_list
    from liquidc.passplan import describe_passes, plan_passes, run_passes

    if list_passes:
        found = describe_passes()
        if as_json:
            emit_json({"passes": [{"name": name, "summary": text} for name, text in found]})
        else:
            for name, text in found:
                say(f"{name:20s} {text}")
        return
    from liquidc.ir import parse_module, print_module, verify
    from liquidc.ir.rewriter import Statistics

    plan = plan_passes(split_list(passes), ())
    text = _read(file)
    module = parse_module(text, "<stdin>" if str(file) == "-" else str(file))
    verify(module)
    statistics = Statistics()
    module = run_passes(module, plan, statistics, verify_each=verify_each)
    verify(module)
    result = print_module(module)
    reason = None if explain is None else _explain(explain, statistics)
    if as_json:
        emit_json(
            {
                "module": result,
                "passes": [p.text for p in plan],
                "rules": dict(sorted(statistics.fired.items())),
                **({} if reason is None else {"explanation": reason}),
            }
        )
        return
    if stats:
        show_statistics(statistics, as_json=False, stderr=True)
    if reason is not None:
        say(reason, err=True)
    if output is not None:
        output.write_text(result, encoding="utf-8")
    else:
        click.echo(result, nl=False)


def _read(path: Path) -> str:
    from liquidc.errors import InputError
    from liquidc.files import read_utf8
    from liquidc.ir.parser import MAX_BYTES

    if str(path) == "-":
        return read_stdin(MAX_BYTES)
    return read_utf8(path, InputError, MAX_BYTES)


def _explain(rule: str, statistics: Statistics) -> str:
    from liquidc.errors import InputError

    fired = statistics.fired.get(rule, 0)
    miss = statistics.near_misses.get(rule)
    if not fired and miss is None:
        known = sorted({*statistics.fired, *statistics.near_misses})
        tried = ", ".join(known) or "none"
        raise InputError(f"the rule {rule!r} was not tried by these passes; they tried {tried}")
    lines = [f"{rule}: fired {fired} times"]
    if miss is not None:
        lines.append(f"nearest miss, after {miss.held} checks held: {miss.reason}")
        lines.append(f"  at {miss.op}")
    return "\n".join(lines)

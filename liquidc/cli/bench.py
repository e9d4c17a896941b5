"""`liquidc bench ENGINE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from liquidc.cli.output import bytes_text, counting, emit_json, json_option, say, table


@click.command(
    epilog="""\b
Examples:
  liquidc bench engine
  liquidc bench engine --levels 100,50,0 --cached 512 --turns 20
  liquidc bench engine --prompt 0 --json
  liquidc bench engine --depth-bias=-2,-1,0,1,2 --min-depth 3"""
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--levels", default="100,50,0", show_default=True, help="Percent of gates on.")
@click.option("--cached", default=16, show_default=True, help="Tokens before the decode steps.")
@click.option("--steps", default=16, show_default=True, help="Decode steps per turn.")
@click.option("--turns", default=10, show_default=True, help="Turns of each level.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of a prefill; 0 for none.")
@click.option(
    "--depth-bias",
    metavar="LIST",
    help="Instead: bits per byte of held-out text and decode time at each of these biases.",
)
@click.option("--min-depth", default=0, show_default=True, help="With it: layers that always run.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="With it: the text.  [default: heldout.txt of the model]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of one operation, at most 16 for each core.",
)
@json_option
def command(
    engine: Path,
    levels: str,
    cached: int,
    steps: int,
    turns: int,
    prompt: int,
    depth_bias: str | None,
    min_depth: int,
    data: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time decoding and prefill of ENGINE at several depths, the levels taking turns.

    One engine file serves every level: gates are forced at run time. Medians with range and 95 %
    interval; leave the machine alone meanwhile.

    With --depth-bias, what an operator trades: a bias is added to every gate's score, above 0 more
    layers run, below 0 fewer, at --cached tokens and --steps of each of --turns pieces of text.
    """
    from liquidc.backends.base import RunnerOptions
    from liquidc.bench import BenchOptions, bench
    from liquidc.runtime import load

    if depth_bias is not None:
        _sweep(engine, _biases(depth_bias), data, min_depth, cached, steps, turns, threads, as_json)
        return
    for option, given in (("--data", data is not None), ("--min-depth", min_depth > 0)):
        if given:
            raise click.UsageError(f"{option} is for --depth-bias", click.get_current_context())
    options = BenchOptions(
        levels=_parse(levels), cached=cached, steps=steps, turns=turns, prompt=prompt
    )
    with (
        load(engine, options=RunnerOptions(threads=threads, bench=True)) as loaded,
        counting(quiet=as_json) as report,
    ):
        result = bench(loaded, options, report)
    if as_json:
        emit_json({"engine": str(engine), **result})
    else:
        _show(result)


def _sweep(
    engine: Path,
    biases: tuple[float, ...],
    data: Path | None,
    min_depth: int,
    cached: int,
    steps: int,
    turns: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Bits per byte against time."""
    from liquidc.backends.base import RunnerOptions
    from liquidc.depth_sweep import SweepOptions, sweep
    from liquidc.runtime import load
    from liquidc.verify import find_reference, read_held_out

    options = SweepOptions(biases, min_depth, windows=turns, cached=cached, steps=steps)
    with load(engine, options=RunnerOptions(threads=threads, bench=True)) as loaded:
        text = read_held_out(data or find_reference(engine) / "heldout.txt", loaded)
        with counting(quiet=as_json) as report:
            result = sweep(loaded, text, options, report)
    if as_json:
        emit_json({"engine": str(engine), **result})
        return
    first = next((r for r in result["rows"] if r["depth_bias"] == 0), result["rows"][0])
    rows = [
        [
            f"{row['depth_bias']:+g}",
            "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
            f"{row['bits_per_token']:.4f}",
            f"{row['layers_run']:.2f}",
            f"{row['ms_mean']:.3f}",
            f"{row['ms_median']:.3f}",
            f"{row['ms_low']:.3f}–{row['ms_high']:.3f}",
            f"{row['ms_mean'] / first['ms_mean']:.3f}",
        ]
        for row in result["rows"]
    ]
    columns = [
        *("bias", "bits per byte", "bits per token", "layers run"),
        *("ms, mean", "ms, median", "95 %", "ratio of means"),
    ]
    table("", columns, rows, right=0)
    say(
        f"{result['windows']} pieces of {result['window']} tokens; "
        f"{result['machine']['processor']}, {result['machine']['cores']} cores"
    )


def _biases(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        context = click.get_current_context()
        raise click.BadParameter(
            f"{text!r} is not a list of numbers", context, param_hint="--depth-bias"
        ) from None


def _parse(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        context = click.get_current_context()
        raise click.BadParameter(
            f"{text!r} is not a list of numbers", context, param_hint="--levels"
        ) from None


def _show(result: dict[str, Any]) -> None:
    first: dict[str, float] = {}
    rows: list[list[str]] = []
    for row in result["rows"]:
        kind = row["name"].partition(",")[0]
        base = first.setdefault(kind, row["ms_median"])
        size, share = row["bytes_per_token"], row["bandwidth_share"]
        rows.append(
            [
                row["name"],
                row["shape"],
                f"{row['ms_median']:.3f}",
                f"{row['ms_low']:.3f}–{row['ms_high']:.3f}",
                f"{row['ms_min']:.3f}–{row['ms_max']:.3f}",
                f"{row['ms_median'] / base:.3f}",
                "" if size is None else bytes_text(size),
                "" if share is None else f"{100 * share:.0f} %",
            ]
        )
    columns = ["", "", "ms, median", "95 %", "range", "ratio", "bytes/token", "bandwidth"]
    table("", columns, rows, right=2)
    machine = result["machine"]
    say(
        f"{machine['processor']}, {machine['cores']} cores, reads "
        f"{bytes_text(result['read_bandwidth_bytes_per_second'])}/s; {result['turns']} turns"
        + (f"; {result['settings']}" if result["settings"] else "")
    )

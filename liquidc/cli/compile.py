"""`liquidc compile MODEL -o ENGINE`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from liquidc.cli.output import (
    StageProgress,
    bytes_text,
    emit_json,
    fidelity_text,
    json_option,
    parse_bytes,
    say,
    table,
)

if TYPE_CHECKING:
    from liquidc.ir.rewriter import Statistics
    from liquidc.plan import CompileOptions


@click.command(
    epilog="""\b
Examples:
  liquidc compile samples/tiny-liquid -o engine --target onnxruntime
  liquidc compile model -o engine --dry-run
  liquidc compile model -o engine --quantize "int4{method=gptq}" --calibration text.txt
  liquidc compile model -o engine --quantize mixed --target-size 400MB
  liquidc compile model -o engine --quantize-cache int8 --calibration text.txt
  liquidc compile model -o engine --profile profile.json --specialize budget --max-kl 0.01
  liquidc compile model -o engine --profile profile.json --add-pass "prune-experts{ratio=0.25}"
  liquidc compile model -o engine --dump-dir stages --verify-each --stats
  liquidc compile model -o engine --start-from passes=edited.ir --force
  liquidc compile model -o engine --quantize int4 --resume"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Engine directory to write.")
@click.option("--target", default="onnxruntime", show_default=True, help="See `liquidc targets`.")
@click.option("--passes", help="Run these passes instead, in order: `a,b{key=value}`.")
@click.option("--no-pass", multiple=True, metavar="NAME", help="Leave a pass out; repeatable.")
@click.option("--add-pass", multiple=True, metavar="PASS", help="Run this pass too; repeatable.")
@click.option(
    "--specialize",
    type=click.Choice(["exact", "budget"]),
    help="Use the profile: without changing results, or fixing gates within --max-kl.",
)
@click.option("--max-kl", type=float, help="Nats per token that a lossy compile may cost.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Held-out text; default: MODEL/heldout.txt."
)
@click.option("--profile", type=click.Path(path_type=Path), help="Of this model, for the passes.")
@click.option("--quantize", metavar="SCHEME", help="int8, int4, fp8 or mixed; int4{block=64}.")
@click.option("--quantize-cache", metavar="SCHEME", help="Keys and values in few bits: int8.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to calibrate on, for --quantize int4{method=gptq} and --quantize-cache; "
    "not the held-out one.",
)
@click.option(
    "--target-size",
    metavar="SIZE",
    help="Bytes of weights, without padding, that --quantize mixed is to reach: 400MB, 4.2GB.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Schemes for --quantize mixed: TOML, a table [weights] of "name" = "int4".',
)
@click.option(
    "--portable-weights",
    is_flag=True,
    help="Dequantise by the standard operator, for runtimes without ONNX Runtime's MatMulNBits; "
    "of weights alone: other operators of com.microsoft stay.",
)
@click.option(
    "--fused-experts",
    is_flag=True,
    help="One QMoE for the experts of a layer: faster, but no profile shows which ran.",
)
@click.option(
    "--machine",
    type=click.Path(path_type=Path),
    help="Table of bench/machine_table.py by which lowerings are chosen.",
)
@click.option("--verify-each", is_flag=True, help="Check the IR after every pass.")
@click.option("--dump-dir", type=click.Path(path_type=Path), help="Write each stage's artefact.")
@click.option("--start-from", metavar="STAGE=FILE", help="Take a stage's artefact from a file.")
@click.option("--stats", is_flag=True, help="Show how often each rewrite rule fired.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, estimate size, memory and time, and write nothing.",
)
@click.option("--force", is_flag=True, help="Replace the engine if there is one.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where this compile stopped: interrupted, killed, or the disk was full.",
)
@json_option
def command(
    model: Path,
    output: Path | None,
    target: str,
    passes: str | None,
    no_pass: tuple[str, ...],
    add_pass: tuple[str, ...],
    specialize: str | None,
    max_kl: float | None,
    data: Path | None,
    profile: Path | None,
    quantize: str | None,
    quantize_cache: str | None,
    portable_weights: bool,
    fused_experts: bool,
    calibration: Path | None,
    target_size: str | None,
    recipe: Path | None,
    machine: Path | None,
    verify_each: bool,
    dump_dir: Path | None,
    start_from: str | None,
    stats: bool,
    dry_run: bool,
    force: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Compile the checkpoint directory MODEL into an engine directory.

    The engine appears whole or not at all. Beside it, ENGINE.build.json says what time, memory and
    bytes each stage took; it is no part of the engine. If the compile stops, what is complete stays
    in ENGINE.partial for --resume; without --resume the next compile starts anew.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.", click.get_current_context())
    from liquidc import lossy, mixed
    from liquidc.option_text import split_list
    from liquidc.pipeline import compile_model
    from liquidc.plan import CompileOptions

    options = CompileOptions(
        target=target,
        passes=None if passes is None else split_list(passes),
        without=no_pass,
        add=add_pass,
        profile=profile,
        quantize=_scheme(quantize, "--quantize"),
        quantize_cache=_scheme(quantize_cache, "--quantize-cache"),
        portable_weights=portable_weights,
        fused_experts=fused_experts,
        calibration=calibration,
        target_size=None if target_size is None else parse_bytes(target_size, "--target-size"),
        recipe=recipe,
        machine=machine,
        specialize=specialize or "",
        max_kl=max_kl,
        data=data,
        verify_each=verify_each,
        dump=dump_dir,
        start=None if start_from is None else _start(start_from),
        force=force,
        resume=resume,
    )
    if dry_run or output is None:
        _show_plan(model, output, options, as_json=as_json)
        return
    progress = StageProgress(quiet=as_json)
    try:
        compiled = compile_model(model, output, options, progress)
    finally:
        progress.stop()
    if stats:
        show_statistics(compiled.statistics, as_json=as_json)
    experts = {
        name: facts
        for name, facts in compiled.statistics.facts.items()
        if name in ("prune-experts", "merge-experts")
    }
    quantized = compiled.statistics.facts.get("quantize", {})
    if as_json:
        result: dict[str, Any] = {
            "engine": str(compiled.engine),
            "sha256": compiled.manifest.sha256,
            "seconds": compiled.seconds,
            "peak_rss_bytes": compiled.peak_rss_bytes,
            "bytes_resumed": compiled.resumed,
            "stages": [asdict(stage) for stage in compiled.stages],
        }
        result |= {"experts": experts} if experts else {}
        result |= {"quantize": quantized} if quantized else {}
        result |= {"fidelity": compiled.manifest.fidelity} if compiled.manifest.fidelity else {}
        if stats:
            result["rules"] = dict(sorted(compiled.statistics.fired.items()))
        emit_json(result)
        return
    for name, said in experts.items():
        rows = [[*row] for row in lossy.table(said)]
        table(f"{name}, measured on held-out text", [*lossy.COLUMNS], rows)
    if quantized:
        table("quantize", [*mixed.COLUMNS], [[*row] for row in mixed.table(quantized)])
        for line in mixed.notes(quantized):
            say(line)
    _show_fidelity(compiled.manifest.fidelity, quantized=bool(quantized))
    size = sum(info.bytes for info in compiled.manifest.files.values())
    if compiled.resumed:
        say(f"{bytes_text(compiled.resumed)} were there from a compile that was stopped")
    say(
        f"{compiled.engine}: {bytes_text(size)} in {len(compiled.manifest.files) + 1} files, "
        f"{compiled.seconds:.1f} s, peak memory {bytes_text(compiled.peak_rss_bytes)}, "
        f"sha256 {compiled.manifest.sha256[:16]}…"
    )


def _show_fidelity(found: dict[str, Any] | None, *, quantized: bool) -> None:
    """What a lossy compile changed on held-out text."""
    if found is not None and "kl_nats" in found:
        say(f"on {found['tokens']} held-out tokens: {fidelity_text(found)}")
    elif quantized and found is None:
        say("not measured on held-out text; give some with --data FILE to have it measured")


def show_statistics(statistics: Statistics, *, as_json: bool, stderr: bool = False) -> None:
    """Print the table of rule firings, unless the result is JSON."""
    if as_json:
        return
    rows = [[name, str(count)] for name, count in sorted(statistics.fired.items())]
    table("", ["rule", "fired"], rows or [["(none)", "0"]], stderr=stderr)


def _scheme(text: str | None, option: str) -> str:
    if text is not None and not text.strip():
        raise click.BadParameter(
            "a scheme is missing", click.get_current_context(), param_hint=option
        )
    return text or ""


def _start(text: str) -> tuple[str, Path]:
    stage, equals, file = text.partition("=")
    if not (stage and equals and file):
        raise click.BadParameter(
            f"{text!r} is not STAGE=FILE", click.get_current_context(), param_hint="--start-from"
        )
    return stage, Path(file)


def _show_plan(model: Path, output: Path | None, options: CompileOptions, *, as_json: bool) -> None:
    from liquidc.dryrun import dry_run

    found = dry_run(model, output, options)
    plan, opened, takes = found.plan, found.model, found.estimate
    if as_json:
        emit_json(
            {
                "model": str(model),
                "model_type": opened.type,
                "engine": None if output is None else str(output),
                "target": plan.backend.target(),
                "functions": list(plan.backend.functions),
                "stages": list(plan.stages),
                "passes": [p.text for p in plan.passes],
                "copied": sorted(opened.files()),
                "estimate": asdict(takes),
                "bytes_to_resume": found.resumed,
            }
        )
        return
    target = ", ".join(f"{value}" for value in plan.backend.target().values())
    most = "at most " if takes.at_most else ""
    say(f"model     {model} ({opened.type})")
    say(f"target    {target}")
    say(f"functions {', '.join(f'@{name}' for name in plan.backend.functions)}")
    say(f"stages    {' → '.join(plan.stages)}")
    say(f"passes    {' → '.join(p.text for p in plan.passes) or '(none)'}")
    say(f"copied    {', '.join(sorted(opened.files()))}")
    if found.resumed:
        say(f"resumed   {bytes_text(found.resumed)} that a stopped compile completed")
    say(
        f"estimate  engine {most}{bytes_text(takes.engine_bytes)} "
        f"({bytes_text(takes.weights_bytes)} of weights), peak memory "
        f"{bytes_text(takes.peak_memory_bytes)}, {takes.seconds:.0f} s at rates measured on "
        f"{takes.measured_on}"
    )
    say("nothing was written")

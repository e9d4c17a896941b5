"""`liquidc verify ENGINE`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from liquidc.cli.output import counting, emit_json, json_option, say, table


@click.command(
    epilog="""\b
Examples:
  liquidc verify engine
  liquidc verify engine --model samples/tiny-liquid --data samples/tiny-liquid/heldout.txt
  liquidc verify engine --prompts 50 --min-greedy-match 0.98 --json"""
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The model directory; by default that of the build log. Its hash must be the engine's.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Held-out text, or a .json list of token ids; by default MODEL/heldout.txt.",
)
@click.option("--windows", default=8, show_default=True, help="Pieces whose logits are compared.")
@click.option("--window", default=256, show_default=True, help="Tokens of a piece.")
@click.option("--prompts", default=20, show_default=True, help="Prompts continued greedily.")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens after each prompt.")
@click.option("--min-gate-agreement", type=float, help="Outside the tie band.")
@click.option("--min-expert-overlap", type=float, help="Mean over tokens.")
@click.option("--min-greedy-match", type=float, help="Share of equal tokens.")
@click.option("--min-top1-agreement", type=float, help="Share of positions.")
@click.option("--max-kl-nats", type=float, help="Mean over positions.")
@click.option("--max-logits-rel", type=float, help="max |Δ| / max |reference|.")
@click.option("--max-bits-per-byte-rel", type=float, help="More bits than the reference, relative.")
@json_option
def command(
    engine: Path,
    model: Path | None,
    data: Path | None,
    windows: int,
    window: int,
    prompts: int,
    new_tokens: int,
    min_gate_agreement: float | None,
    min_expert_overlap: float | None,
    min_greedy_match: float | None,
    min_top1_agreement: float | None,
    max_kl_nats: float | None,
    max_logits_rel: float | None,
    max_bits_per_byte_rel: float | None,
    as_json: bool,
) -> None:
    """Compare ENGINE with the PyTorch model it was compiled from, and prove that it skips.

    Logits, greedy tokens, gate decisions, experts and depth are compared on held-out text; then
    the target's profiler says which layers and experts really ran. Exit code 1 if a threshold is
    missed or the profiler saw other work than the gates decided. The thresholds are those of the
    engine's scheme of weights; an option replaces one.
    """
    for name, value in (("windows", windows), ("prompts", prompts), ("new-tokens", new_tokens)):
        if value < 1:
            raise click.BadParameter("must be 1 or more", param_hint=f"--{name}")
    from liquidc.runtime import load
    from liquidc.verify import Thresholds, VerifyOptions, find_reference, read_held_out, verify

    given = {
        "gate_agreement": min_gate_agreement,
        "expert_overlap": min_expert_overlap,
        "greedy_match": min_greedy_match,
        "top1_agreement": min_top1_agreement,
        "kl_nats": max_kl_nats,
        "logits_max_rel": max_logits_rel,
        "bits_per_byte_rel": max_bits_per_byte_rel,
    }
    with load(engine) as loaded:
        wanted = {name: value for name, value in given.items() if value is not None}
        options = VerifyOptions(
            windows=windows,
            window=window,
            prompts=prompts,
            new_tokens=new_tokens,
            thresholds=replace(Thresholds.of(loaded.manifest), **wanted),
        )
        directory = model if model is not None else find_reference(engine)
        held_out = read_held_out(data or directory / "heldout.txt", loaded)
        from liquidc.reference import Reference

        reference = Reference.load(directory, loaded.manifest.model.sha256)
        with counting(quiet=as_json) as report:
            result = verify(loaded, reference, held_out, options, report)
    if as_json:
        emit_json({"engine": str(engine), **result})
    else:
        _show(result)
    if not result["passed"]:
        click.get_current_context().exit(1)


def _show(result: dict[str, Any]) -> None:
    from liquidc.weight_check import FARTHEST

    limits = result["thresholds"]

    def row(key: str, text: str, limit: str = "") -> list[str]:
        return [key, text, limit]

    rows = [
        row("gate agreement", _share(result["gate_agreement"]), f"≥ {limits['gate_agreement']:g}"),
        row("  decisions", f"{result['gate_decisions']:,}"),
        row("  flips / ties", f"{result['gate_flips']} / {result['gate_ties']}"),
        row("expert overlap", _share(result["expert_overlap"]), f"≥ {limits['expert_overlap']:g}"),
        row("greedy tokens", _share(result["greedy_match"]), f"≥ {limits['greedy_match']:g}"),
        row(
            "  identical prompts",
            f"{result['greedy_prompts_identical']} of {result['prompts']}"
            f" × {result['greedy_tokens_per_prompt']}",
        ),
        row("top-1 agreement", _share(result["top1_agreement"]), f"≥ {limits['top1_agreement']:g}"),
        row(
            "logits max |Δ| / max",
            f"{result['logits_max_rel']:.2e}",
            f"≤ {limits['logits_max_rel']:g}",
        ),
        row("logits mean |Δ|", f"{result['logits_mean_abs']:.2e}"),
        row("KL, nats", f"{result['kl_nats']:.2e}", f"≤ {limits['kl_nats']:g}"),
        row(
            "bits per byte",
            _number(result["bits_per_byte"]),
            f"≤ +{100 * limits['bits_per_byte_rel']:g} %",
        ),
        row("  of the reference", _number(result["bits_per_byte_reference"])),
        row("mean depth", f"{result['depth_mean']:.3f}"),
        row("  of the reference", f"{result['depth_mean_reference']:.3f}"),
        row("layers run, by gates", f"{result['layers_run_by_gates']:,}"),
        row("layers run, by trace", f"{result['layers_run_by_trace']:,}", _wanted(result)),
        row("  if nothing skipped", f"{result['layers_offered']:,}"),
    ]
    if hidden := result["gates_not_shown"]:
        rows.append(row("  not shown", f"gates {', '.join(map(str, hidden))}"))
    if result["experts_traced_layers"]:
        rows += [
            row("expert rows, by routes", f"{result['experts_run_by_routes']:,}"),
            row("expert rows, by trace", f"{result['experts_run_by_trace']:,}", "equal"),
        ]
    if hidden := result["experts_not_shown_layers"]:
        layers = ", ".join(map(str, hidden))
        rows.append(row("expert rows, by trace", "not shown", f"layers {layers}"))
    for format, error in result["weights_error"].items():
        bound = (
            "equal" if not error and format not in FARTHEST else f"≤ {FARTHEST.get(format, 0):g}"
        )
        rows.append(row(f"{format} weights, ‖Δ‖ / ‖w‖", f"{error:.2e}", bound))
    table("", ["fidelity", "engine", "needed"], rows)
    _histogram(result["depth_histogram"], result["depth_histogram_reference"])
    for flip in result["gate_flips_listed"]:
        tie = ", in the tie band" if flip["tie"] else ""
        say(
            f"flip: window {flip['window']} token {flip['token']} layer {flip['layer']}: "
            f"p {flip['p']:.7f}, reference {flip['p_reference']:.7f}{tie}"
        )
    for failure in result["failures"]:
        say(f"failed: {failure}")
    say("passed" if result["passed"] else "not passed")


def _wanted(result: dict[str, Any]) -> str:
    """How many layers the trace must show."""
    if result["trace_rule"] == "at least":
        return f"≥ {result['layers_run_by_gates']:,}"
    if result["gates_run"] == result["gates_computed"]:
        return "equal"
    return f"{result['layers_computed']:,}, as lowered"


def _histogram(engine: list[int], reference: list[int]) -> None:
    most = max([*engine, *reference, 1])
    rows = [
        [str(depth), "█" * round(30 * ours / most), str(ours), str(theirs)]
        for depth, (ours, theirs) in enumerate(zip(engine, reference, strict=True))
        if ours or theirs
    ]
    table("", ["layers run", "tokens", "engine", "reference"], rows, right=2)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

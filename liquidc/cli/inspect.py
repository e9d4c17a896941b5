"""`liquidc inspect ENGINE`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from liquidc.cli.output import bytes_text, emit_json, fidelity_text, json_option, table

if TYPE_CHECKING:
    from liquidc.manifest import GateInfo, Manifest


@click.command(
    epilog="""\b
Examples:
  liquidc inspect engine
  liquidc inspect engine --explain
  liquidc inspect engine --json | python -m json.tool"""
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--no-hash", is_flag=True, help="Don't read the files to check their hashes.")
@click.option("--explain", is_flag=True, help="Show why each gate is computed as it is.")
@json_option
def command(engine: Path, no_hash: bool, explain: bool, as_json: bool) -> None:
    """Show what the engine in the directory ENGINE consists of; its files are checked."""
    from liquidc.engine import check_files, read_manifest
    from liquidc.explain import explain_lowerings
    from liquidc.manifest import reading_facts
    from liquidc.records import to_json
    from liquidc.report import read_report

    manifest = read_manifest(engine)
    if not no_hash:
        check_files(engine, manifest)
    report = read_report(engine)
    if as_json:
        content = to_json(manifest)
        content["engine_schema"] = content.pop("schema")
        content["built_by"] = content.pop("liquidc")
        lowerings = explain_lowerings(manifest)
        shown = {"engine": str(engine), "sha256": manifest.sha256, **content}
        emit_json({**shown, "lowerings": lowerings, "report": report})
        return
    if explain:
        with reading_facts():
            _explain(manifest, explain_lowerings(manifest))
        return
    _show(engine, manifest, report)


def _explain(manifest: Manifest, lowerings: list[dict[str, Any]]) -> None:
    """A line for each gate, and the machine that the times are of."""
    chosen = next(
        (p.facts for p in manifest.passes if p.name == "choose-lowering" and p.facts), None
    )
    rows = [
        [
            str(line["gate"]),
            str(line["layer"]),
            line["lowering"],
            line["reason"],
            f"{line['run_rate']:.1%}" if "run_rate" in line else "",
            *(_ms(line, name) for name in ("branch", "compact", "mask")),
        ]
        for line in lowerings
    ]
    title = "how each gate is computed"
    if chosen is not None:
        machine = chosen["machine"]
        tools = ", ".join(f"{name} {version}" for name, version in machine["tools"].items())
        calls = next(line["calls"] for line in lowerings if "calls" in line)
        title += f"; ms of {calls}, {machine['name']}, {machine['threads']} threads, {tools}"
    columns = ["gate", "layer", "lowering", "why", "runs", "branch", "compact", "mask"]
    table(title, columns, rows, right=4)


def _ms(line: dict[str, Any], lowering: str) -> str:
    times = line.get("us", {})
    return f"{times[lowering] / 1000:.2f}" if lowering in times else ""


def _show(engine: Path, manifest: Manifest, report: dict[str, Any] | None) -> None:
    from liquidc.manifest import reading_facts

    model = manifest.model
    size = sum(info.bytes for info in manifest.files.values())
    gated = len({gate.layer for gate in model.gates})
    cache = manifest.cache
    facts = [
        ["engine", f"{engine}, {bytes_text(size)}, schema {manifest.schema}"],
        ["sha256", manifest.sha256],
        ["built by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())],
        ["target", ", ".join(f"{name} {text}" for name, text in manifest.target.items())],
        ["model", f"{model.type}, {model.sha256[:16]}…"],
        [
            "shape",
            f"{model.layers} layers ({gated} gated), vocabulary {model.vocabulary}, "
            f"context {model.context or 'unknown'}",
        ],
        [
            "cache",
            "none"
            if cache is None
            else f"{cache.policy}, {cache.layers} × 2 × {cache.dtype}"
            f"[{', '.join(map(str, cache.shape))}]",
        ],
        ["passes", ", ".join(p.name for p in manifest.passes) or "none"],
    ]
    with reading_facts():
        facts += [[name, text] for name, text in _few_bits(manifest)]
    table("", ["", ""], facts, right=9)
    _show_layers(manifest)
    if report is not None and report.get("profile"):
        with reading_facts():
            _show_profile(report)
    for name, entry in manifest.functions.items():
        rows = [
            [kind, spec.name, f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"]
            for kind, specs in (("in", entry.inputs), ("out", entry.outputs))
            for spec in specs
            if not spec.name.startswith(("past.", "present."))
        ]
        table(
            f"@{name}, the caches past.* and present.* apart", ["", "name", "type"], rows, right=9
        )
    rows = [[name, f"{info.bytes:,}", info.sha256] for name, info in sorted(manifest.files.items())]
    table("", ["file", "bytes", "sha256"], rows)


def _few_bits(manifest: Manifest) -> list[tuple[str, str]]:
    """What is quantised, and what that cost on held-out text."""
    told = next((p.facts for p in manifest.passes if p.name == "quantize" and p.facts), None)
    if told is None:
        return []
    schemes = Counter(entry["scheme"] for entry in told["weights"].values())
    before, after = (
        sum(entry[key] for entry in told["weights"].values()) for key in ("bytes_float", "bytes")
    )
    each = [f"{count} of {scheme}" for scheme, count in sorted(schemes.items())]
    each.append(f"{len(told['kept'])} in float")
    text = f"{', '.join(each)}; {bytes_text(before)} → {bytes_text(after)}"
    rows = [("weights", text)]
    found = manifest.fidelity
    if found is not None and "kl_nats" in found:
        rows.append(("measured", fidelity_text(found)))
    return rows


def _show_layers(manifest: Manifest) -> None:
    model, cost = manifest.model, manifest.cost
    experts = {info.layer: f"{info.per_token} of {info.experts}" for info in model.experts}
    rows: list[list[str]] = []
    for layer in range(model.layers):
        gates = [index for index, gate in enumerate(model.gates) if gate.layer == layer]
        rows.append(
            [
                str(layer),
                ", ".join(_rule(model.gates[i]) for i in gates) or "always runs",
                experts.get(layer, "dense"),
                bytes_text(sum(cost.run[i] for i in gates)) if gates else "",
                bytes_text(sum(cost.skip[i] for i in gates)) if gates else "",
            ]
        )
    columns = ["layer", "gate", "experts", "weights read if run", "if skipped"]
    table(f"layers ({bytes_text(cost.always)} are read for every token)", columns, rows, right=3)


def _show_profile(report: dict[str, Any]) -> None:
    """Run rate and expected cost by layer, where there was a profile."""
    rows = [
        [
            str(layer["layer"]),
            "unknown" if layer["run_rate"] is None else f"{layer['run_rate']:.1%}",
            bytes_text(layer["expected"]["bytes"]),
            bytes_text(layer["always"]["bytes"] + layer["run"]["bytes"]),
        ]
        for layer in report["layers"]
    ]
    costs, context = report["costs"], report["context"]
    title = (
        f"expected: {bytes_text(costs['expected']['bytes'])} read per token of "
        f"{bytes_text(costs['full']['bytes'])} with every layer on ({context} tokens in the cache)"
    )
    table(title, ["layer", "tokens that run it", "bytes read", "if run"], rows)


def _rule(gate: GateInfo) -> str:
    if gate.fixed:
        return "fixed to run" if gate.fixed > 0 else "fixed to skip"
    return f"p {'>' if gate.compare == 'gt' else '≥'} {gate.threshold:g}"

"""The report's sections about depth: the sample text, gates, paths."""

from __future__ import annotations

from typing import Any

from liquidc.report.parts import (
    SHADES,
    bar,
    columns,
    escape,
    no_profile,
    percent,
    shade,
    size,
    squares,
    strip,
    table,
    tag,
)

Data = dict[str, Any]
ALL_TOKENS = {"branch": ", all tokens of a call if one runs", "mask": ", computed for all tokens"}


def depth_section(data: Data) -> str:
    """The sample text, coloured by depth, and the layers that each of its tokens ran."""
    sample = data["sample"]
    if sample is None:
        return no_profile("How deep tokens go is not known")
    layers, gated = data["model"]["layers"], {gate["layer"] for gate in data["gates"]}
    least = layers - len(gated)
    steps = range(least, layers + 1, -(-(layers + 1 - least) // SHADES))
    scale = "".join(tag("b", str(depth), cls=shade(depth, least, layers)) for depth in steps)
    legend = tag("span", "layers run") + tag("span", scale, cls="scale")
    spans = [
        tag("span", _shown(piece), cls=shade(depth, least, layers), data_t=index)
        for index, (piece, depth) in enumerate(zip(sample["pieces"], sample["depth"], strict=True))
    ]
    text = tag("div", "".join(spans), cls="text")
    labels = "".join(tag("span", str(layer)) for layer in range(layers))
    of_gate = [gate["layer"] for gate in data["gates"]]
    ran = [
        [
            all(digit == "1" for at, digit in zip(of_gate, path, strict=True) if at == layer)
            for layer in range(layers)
        ]
        for path in sample["paths"]
    ]
    below = tag(
        "p", "The same tokens from left to right, layer by layer: filled where a layer ran."
    )
    strips = tag("div", tag("div", labels, cls="labels") + strip(ran), cls="strips")
    return tag("div", legend, cls="legend") + text + below + strips


def _shown(piece: str) -> str:
    """A token's text, with a sign for a line's end."""
    return escape(piece).replace("\n", "⏎\n")


def gates_section(data: Data) -> str:
    """A line for each gate."""
    if not data["gates"]:
        return tag("p", "The model has no depth gates: every token runs every layer.", cls="dim")
    profile, skips = data["profile"], any(gate["weights_skip"] for gate in data["gates"])
    rows: list[list[str]] = []
    for gate in data["gates"]:
        sign = ">" if gate["compare"] == "gt" else "≥"
        rule = f"p {sign} {gate['threshold']:g}"
        if gate["fixed"]:
            rule = "fixed to run" if gate["fixed"] > 0 else "fixed to skip"
        elif gate["lowering"] != "compact":
            rule += ALL_TOKENS[gate["lowering"]]
        row = [str(gate["gate"]), str(gate["layer"]), escape(rule)]
        if profile:
            rate = gate["run_rate"]
            label = f"gate {gate['gate']}: {percent(rate)}"
            row += [
                bar([("run", rate)], 1, label),
                percent(rate),
                f"{gate['margin_mean']:.3f}",
                _margins(gate, profile),
                percent(sum(gate["margins"][:3]) / profile["tokens"]),
                f"{gate['entropy_bits']:.3f}",
            ]
        row.append(size(gate["weights_run"]))
        rows.append([*row, size(gate["weights_skip"])] if skips else row)
    names = ["gate", "layer", "runs if"]
    if profile:
        names += ["tokens that run it", "", "mean |p − τ|", "|p − τ|, 0 to 0.5"]
        names += ["under 0.01", "entropy, bits"]
    names += ["weights if run", "if skipped"] if skips else ["weights if run"]
    note = (
        tag(
            "p",
            "The small charts count tokens by their distance from the threshold on a logarithmic "
            "scale; those on the left are close to the other decision. Rates are those of the "
            "profile, before any gate was fixed.",
            cls="dim",
        )
        if profile
        else no_profile("How often gates fire is not known")
    )
    return table(names, rows, left=4) + note


def _margins(gate: Data, profile: Data) -> str:
    """Tokens by margin; the height is the number of digits of the count."""
    bounds = ["0", *(f"{bound:g}" for bound in profile["margin_classes"]), "0.5"]
    titles = [
        f"{low} to {high}: {count:,} tokens"
        for low, high, count in zip(bounds, bounds[1:], gate["margins"], strict=False)
    ]
    return columns([len(str(count)) if count else 0 for count in gate["margins"]], titles, "spark")


def paths_section(data: Data) -> str:
    """How deep tokens go, on which paths, and from gate to gate."""
    profile = data["profile"]
    if not profile:
        return no_profile("Which paths tokens take is not known")
    histogram, paths = profile["depth"]["histogram"], profile["paths"]
    drawn = ""
    if histogram:
        titles = [f"{depth} layers: {percent(share)}" for depth, share in histogram.items()]
        few = len(histogram) <= 10
        ticks = "".join(
            tag("span", escape(depth) + ("<br>" + percent(share) if few else ""))
            for depth, share in histogram.items()
        )
        chart = columns(list(histogram.values()), titles) + tag("div", ticks, cls="ticks")
        drawn = tag("h3", "Tokens by the number of layers that they run") + chart
    most = max((entry["share"] for entry in paths["top"]), default=1)
    rows = [
        [
            squares(entry["path"]),
            bar([("run", entry["share"])], most, entry["path"]),
            percent(entry["share"]),
            "–" if entry["depth"] is None else str(entry["depth"]),
            "–" if entry["bytes"] is None else size(entry["bytes"]),
        ]
        for entry in paths["top"]
    ]
    names = [f"gates 0 to {paths['gates'] - 1}", "tokens", "", "layers run", "bytes read"]
    known = paths["gates"] == len(data["gates"])
    share = sum(entry["share"] for entry in paths["top"])
    told = f"The {len(rows)} most frequent of {paths['different']:,} paths, {percent(share)} of all"
    told += " tokens." if known else " tokens; only the beginnings of the paths are known."
    if not data["gates"]:
        return drawn
    frequent = tag("h3", "The most frequent paths") + tag("p", told) + table(names, rows, left=2)
    sides = tag("div", frequent) + tag("div", _transitions(profile))
    return drawn + tag("div", sides, cls="side")


def _transitions(profile: Data) -> str:
    rows: list[list[str]] = []
    for step in profile["transitions"]:
        run, skip = step["run_run"] + step["run_skip"], step["skip_run"] + step["skip_skip"]
        rows.append(
            [
                f"{step['from']} → {step['to']}",
                percent(step["run_run"] / run) if run else "–",
                percent(step["skip_run"] / skip) if skip else "–",
                percent(step["run_run"] + step["skip_skip"]),
            ]
        )
    if not rows:
        return ""
    names = ["gates", "second runs if first ran", "if first skipped", "both decide alike"]
    return tag("h3", "From one gate to the next") + table(names, rows)

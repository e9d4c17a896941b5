"""The report's sections about costs: by layer, and by depth."""

from __future__ import annotations

from typing import Any

from liquidc.report.parts import (
    bar,
    escape,
    no_profile,
    percent,
    scaled,
    size,
    table,
    tag,
)

Data = dict[str, Any]


def time_section(data: Data) -> str:
    """Bars of bytes and FLOPs for each layer."""
    layers, known = data["layers"], data["costs"]["expected"] is not None
    outside: Data = {"name": "no layer", "always": data["costs"]["outside"], "run": None}
    rows: list[Data] = [{**layer, "name": f"layer {layer['layer']}"} for layer in layers]
    rows.append(outside)
    most = {
        key: max(row["always"][key] + (row["run"][key] if row["run"] else 0) for row in rows)
        for key in ("bytes", "flops")
    }
    cells = [
        tag("span", cls="head"),
        tag("span", "bytes read", cls="head"),
        tag("span", cls="head"),
        tag("span", "FLOPs", cls="head second"),
        tag("span", cls="head second"),
    ]
    for row in rows:
        cells.append(tag("span", escape(row["name"]), cls="name"))
        for key, second in (("bytes", ""), ("flops", " second")):
            parts = _segments(row, key, known)
            spent = sum(length for kind, length in parts if kind != "none")
            told = size(spent) if key == "bytes" else scaled(spent, "FLOPs")
            label = f"{row['name']}: {told}"
            cells.append(tag("span", bar(parts, most[key], label), cls=second.strip() or None))
            cells.append(tag("span", escape(told), cls="num" + second))
    legend = [("always", "every token"), ("run", "tokens that run the layer")]
    if any(layer["skip"]["bytes"] or layer["skip"]["flops"] for layer in layers):
        legend.append(("skip", "tokens that skip it"))
    if known:
        legend.append(("none", "saved by skipping"))
    return _legend(legend) + tag("div", "\n".join(cells), cls="rows") + _totals(data)


def _segments(row: Data, key: str, known: bool) -> list[tuple[str, float]]:
    always = ("always", row["always"][key])
    if row["run"] is None:
        return [always]
    if not known:
        return [always, ("run", row["run"][key])]
    run, skip = row["expected_run"][key], row["expected_skip"][key]
    return [always, ("run", run), ("skip", skip), ("none", max(row["run"][key] - run - skip, 0))]


def _totals(data: Data) -> str:
    costs = data["costs"]
    paid = costs["expected"] or costs["worst"]
    text = (
        f"Together {size(paid['bytes'])} and {scaled(paid['flops'], 'FLOPs')} a token"
        f"{' on average' if costs['expected'] else ' if every layer runs'}; of the bytes, "
        f"{size(paid['weights'])} are weights and {size(paid['cache'])} keys and values, with "
        f"{data['context']:,} tokens in the cache. FLOPs are those of matrix products."
    )
    return tag("p", escape(text), cls="dim") + (
        "" if costs["expected"] else no_profile("How often layers run is not known")
    )


def _legend(entries: list[tuple[str, str]]) -> str:
    items = [tag("span", tag("i", cls=kind) + escape(text)) for kind, text in entries]
    return tag("div", "".join(items), cls="legend")


def by_depth_section(data: Data) -> str:
    """A table: every layer on, on average, at quantiles of the depth."""
    costs, full = data["costs"], data["costs"]["full"]
    rows = [
        ("model, all layers", "", full),
        ("engine, all layers", "", costs["worst"]),
    ]
    if costs["expected"]:
        mean = data["profile"]["depth"]["mean"]
        rows.append(("engine, expected", "–" if mean is None else f"{mean:.2f}", costs["expected"]))
    if costs["guarded"]:
        rows.append(("expected, one path tried first", "", costs["guarded"]))
    rows += [
        (
            f"{entry['quantile'] * 100:g} % of tokens: at most",
            str(entry["depth"]),
            entry,
        )
        for entry in costs["quantiles"] or ()
    ]
    cells = [
        [
            escape(name),
            depth,
            size(cost["bytes"]),
            percent(cost["bytes"] / full["bytes"]) if full["bytes"] else "–",
            size(cost["weights"]),
            size(cost["cache"]),
            scaled(cost["flops"], "FLOPs"),
            percent(cost["flops"] / full["flops"]) if full["flops"] else "–",
        ]
        for name, depth, cost in rows
    ]
    names = ["", "layers run", "bytes read", "of the model", "weights", "keys and values"]
    names += ["FLOPs", "of the model"]
    missing = "" if costs["expected"] else no_profile("What to expect is not known")
    return table(names, cells) + missing

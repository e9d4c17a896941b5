"""The report's sections about the compile: passes, fidelity, guards."""

from __future__ import annotations

from typing import Any

from liquidc.passes.registry import is_lossy
from liquidc.report.parts import escape, facts_html, number, percent, size, squares, table, tag

Data = dict[str, Any]
_MEASURED = {
    "kl_nats": "KL(model ‖ engine), nats per token",
    "max_kl": "allowed",
    "top1_agreement": "tokens whose most probable next token is the same",
    "bits_per_byte": "bits per byte of text",
    "bits_per_byte_original": "bits per byte of the model",
    "gate_flips": "decisions of gates that differ",
    "tokens": "tokens measured on",
    "data": "text (sha256)",
}


def passes_section(data: Data) -> str:
    """One line for each pass, with more behind it."""
    if not data["passes"]:
        return tag("p", "No pass ran: the compile started behind them.", cls="dim")
    return "\n".join(_pass(entry) for entry in data["passes"])


def _pass(entry: Data) -> str:
    ops, weights, fired = entry["ops"], entry["weights"], entry["fired"]
    changed = fired or entry["kinds"] or weights[0] != weights[1]
    moved = f"weights {size(weights[0])} → {size(weights[1])}" if weights[0] != weights[1] else ""
    told = [
        f"{ops[0]:,} → {ops[1]:,} ops" if changed else "no change",
        "; ".join(filter(None, (moved, ", ".join(f"{rule} {n:,}×" for rule, n in fired.items())))),
    ]
    line = tag("b", escape(entry["name"])) + "".join(tag("span", escape(text)) for text in told)
    inside: list[str] = []
    if entry["options"]:
        inside.append(_block("Options", facts_html(entry["options"])))
    if entry["kinds"]:
        rows = [
            [escape(kind), f"{before:,}", f"{after:,}", f"{after - before:+,}".replace("-", "−")]
            for kind, (before, after) in entry["kinds"].items()
        ]
        inside.append(_block("Ops", table(["kind", "before", "after", "change"], rows)))
    if entry["facts"]:
        inside.append(_block("What it says", facts_html(entry["facts"])))
    if entry["refused"]:
        rows = [[escape(rule), escape(why)] for rule, why in entry["refused"].items()]
        inside.append(_block("Nearest misses", table(["rule", "did not fire, for"], rows, left=2)))
    body = "".join(inside) or tag("p", "Nothing to say.", cls="dim")
    kind = "pass" if changed else "pass quiet"
    return tag("details", tag("summary", line) + tag("div", body, cls="inside"), cls=kind)


def _block(title: str, content: str) -> str:
    return tag("div", tag("h3", title) + content)


def fidelity_section(data: Data) -> str:
    """What a lossy compile measured."""
    found: Data | None = data["fidelity"]
    if found is None:
        lossy = [entry["name"] for entry in data["passes"] if is_lossy(entry["name"])]
        text = (
            f"What {' and '.join(lossy)} changed was not measured: compile with held-out text."
            if lossy
            else "No lossy pass ran: results differ from the model's by rounding at most."
        )
        return tag("p", text, cls="dim")
    rows = [
        [name, _value(key, found[key])]
        for key, name in _MEASURED.items()
        if found.get(key) is not None
    ]
    rest = {key: value for key, value in found.items() if key not in _MEASURED}
    parts = [table(["", ""], rows)] if rows else []
    if paths := rest.pop("paths", None):
        parts.append(tag("p", "If every token were made to take one path:"))
        parts.append(_paths(paths))
    if rest:
        parts.append(facts_html(rest))
    return "".join(parts)


def _paths(paths: dict[str, Data]) -> str:
    keys = list(dict.fromkeys(key for told in paths.values() for key in told))
    rows = [
        [squares(path), *(_value(key, told.get(key)) for key in keys)]
        for path, told in paths.items()
    ]
    return table(["path", *(_MEASURED.get(key, key.replace("_", " ")) for key in keys)], rows)


def _value(key: str, value: Any) -> str:
    if key == "top1_agreement" and value is not None:
        return percent(value)
    if isinstance(value, int | float):
        return number(value, 4)
    return facts_html(value)


def guard_section(data: Data) -> str:
    """The paths that are tried, and how often they were wrong."""
    guard: Data | None = data["guard"]
    if guard is None:
        return tag("p", "Nothing is assumed: every gate decides for itself.", cls="dim")
    rest = dict(guard)
    parts: list[str] = []
    if (miss := rest.pop("miss_rate", None)) is not None:
        text = f"Of the profile's tokens that try the path, {percent(miss)} were on another one; "
        parts.append(tag("p", escape(text + "the general code computes them.")))
    if isinstance(path := rest.pop("path", None), str):
        parts.append(tag("p", squares(path)))
    paths = rest.pop("paths", None)
    if paths and all(isinstance(entry, dict) and "path" in entry for entry in paths):
        rows = [
            [squares(entry["path"]), percent(entry.get("share", 0)), size(entry.get("bytes", 0))]
            for entry in paths
        ]
        parts.append(table(["path", "tokens", "bytes read"], rows))
    elif paths:
        rest["paths"] = paths
    if "masked_bytes" in rest:
        masked, guarded = rest.pop("masked_bytes"), rest.pop("guarded_bytes")
        speculates = "and is" if rest.pop("speculate") else "so it is not"
        text = (
            f"A token reads {size(masked)} of weights in the general code, and {size(guarded)} on "
            f"average if the most frequent path is tried first, {speculates} by default."
        )
        parts.append(tag("p", escape(text)))
    return "".join(parts) + (facts_html(rest) if rest else "")

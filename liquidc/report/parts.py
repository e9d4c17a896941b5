"""Pieces of the report's page: numbers for people, tables, bars, heat maps. All text is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

SHADES = 9
"""Classes h0 to h8, from nothing to most."""
DATA = '<script type="application/json" id="data">'
"""Where the page's data begin."""
_VISIBLE = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421}
_VISIBLE[ord("\t")] = ord("⇥")


def escape(value: object) -> str:
    """Text as HTML, in elements and in attributes; what can't be shown is shown as a sign."""
    lines = str(value).split("\n")
    return "\n".join(html.escape(line.translate(_VISIBLE), quote=True) for line in lines)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element of HTML that is escaped already; `cls` is its class, `_` stands for `-`."""
    pairs = [
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return f"<{name}{''.join(pairs)}>{content}</{name}>"


def no_profile(what: str) -> str:
    """What is not known, and how to make a profile."""
    return tag(
        "p",
        escape(what) + " without a profile: measure one with <code>liquidc profile MODEL --data "
        "TEXT -o profile.json</code> and compile with <code>--profile profile.json</code>.",
        cls="dim",
    )


def data_script(data: Mapping[str, Any]) -> str:
    """JSON that no text in it can end: compact, sorted, ASCII, without `<`, `>` and `&`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"{DATA}{text}</script>"


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits; a whole number with all of its digits."""
    whole = float(value).is_integer() or abs(value) >= 10**digits
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"


def scaled(value: float, unit: str) -> str:
    """6.31 MB, 4.54 MFLOPs; with three significant digits."""
    power = 0
    while abs(value) >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    places = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{places}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}"


def size(value: float) -> str:
    """Bytes."""
    return scaled(value, "B")


def percent(share: float) -> str:
    """A share; small ones keep a digit that is not zero."""
    value = 100 * share
    if 0 < value < 0.01:
        return "< 0.01 %"
    places = 0 if value == 0 or value >= 99.95 else 1 if value >= 1 else 2
    return f"{value:.{places}f} %"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table of cells that are HTML already; columns from `left` on are aligned to the right."""

    def cells(name: str, row: Sequence[str]) -> str:
        return "".join(
            tag(name, cell, cls=None if index < left else "right") for index, cell in enumerate(row)
        )

    head = tag("thead", tag("tr", cells("th", [escape(column) for column in columns])))
    body = tag("tbody", "\n".join(tag("tr", cells("td", row)) for row in rows))
    return tag("div", tag("table", head + body), cls="scroll")


def bar(segments: Iterable[tuple[str, float]], most: float, label: str) -> str:
    """A bar of segments (class, length) on a scale that ends at `most`."""
    drawn, at = list[str](), 0.0
    for kind, length in segments:
        if length > 0 and most > 0:
            x, width = 100 * at / most, 100 * length / most
            drawn.append(f'<rect class="{kind}" x="{x:.2f}%" width="{width:.2f}%" height="100%"/>')
        at += length
    return tag("svg", "".join(drawn), cls="bar", role="img", aria_label=label)


def columns(values: Sequence[float], titles: Sequence[str], cls: str = "columns") -> str:
    """Upright bars; the highest fills the height."""
    most, step = max(values, default=0) or 1, 100 / max(len(values), 1)
    drawn = [
        f'<rect class="run" x="{step * index:.2f}%" y="{100 - 100 * value / most:.1f}%" '
        f'width="{step * 0.82:.2f}%" height="{100 * value / most:.1f}%">'
        f"<title>{escape(title)}</title></rect>"
        for index, (value, title) in enumerate(zip(values, titles, strict=True))
    ]
    return tag("svg", "".join(drawn), cls=cls, role="img", aria_label="; ".join(titles))


def shade(value: float, least: float, most: float) -> str:
    """The class of a heat map's cell."""
    if most <= least:
        return f"h{SHADES - 1}"
    return f"h{round((SHADES - 1) * (value - least) / (most - least))}"


def heat_map(
    rows: Sequence[Sequence[float]], label: str, block: float = 0, **attributes: object
) -> str:
    """A matrix as squares, one path for each shade; the largest entry has the strongest.

    Square blocks of `block` cells on the diagonal get a frame.
    """
    most = max((max(row, default=0) for row in rows), default=0)
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            kind = shade(value, 0, most) if most else "h0"
            cells.setdefault(kind, []).append(f"M{x} {y}h.94v.94h-.94z")
    paths = [f'<path class="{kind}" d="{"".join(cells[kind])}"/>' for kind in sorted(cells)]
    if block:
        frame = "".join(
            f"M{at * block:g} {at * block:g}h{block:g}v{block:g}h-{block:g}z"
            for at in range(round(len(rows) / block))
        )
        paths.append(f'<path class="outline" d="{frame}"/>')
    box = f"0 0 {len(rows[0])} {len(rows)}" if rows else "0 0 1 1"
    return tag(
        "svg", "".join(paths), cls="matrix", viewBox=box, role="img", aria_label=label, **attributes
    )


def squares(path: str) -> str:
    """A depth path: a full square for each gate that ran."""
    drawn = [
        f'<rect class="{"run" if digit == "1" else "none"}" x="{x}" width=".8" height=".8"/>'
        for x, digit in enumerate(path)
    ]
    return tag(
        "svg",
        "".join(drawn),
        cls="path",
        viewBox=f"0 0 {max(len(path), 1)} 0.8",
        style=f"width:{len(path) * 0.85:.2f}em",
        role="img",
        aria_label=path,
    )


def strip(paths: Sequence[Sequence[bool]]) -> str:
    """Which layers (rows, the first on top) each token (column) ran."""
    height = len(paths[0]) if paths else 0
    drawn: list[str] = []
    for layer in range(height):
        start = None
        for token in range(len(paths) + 1):
            runs = token < len(paths) and paths[token][layer]
            if runs and start is None:
                start = token
            if not runs and start is not None:
                drawn.append(f"M{start} {layer}h{token - start}v.85h{start - token}z")
                start = None
    return tag(
        "svg",
        f'<path class="run" d="{"".join(drawn)}"/>',
        cls="strip",
        viewBox=f"0 0 {max(len(paths), 1)} {max(height, 1)}",
        preserveAspectRatio="none",
        style=f"height:{height}em",
        role="img",
        aria_label="layers by token",
    )


def facts_html(value: Any) -> str:
    """Any JSON value: objects as lists of terms, lists of objects as tables."""
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        items = [
            tag("dt", escape(key.replace("_", " "))) + tag("dd", facts_html(entry))
            for key, entry in entries.items()
        ]
        return tag("dl", "".join(items)) if items else "none"
    if isinstance(value, list):
        entries = cast(list[Any], value)
        if entries and all(isinstance(entry, dict) for entry in entries):
            keys = list(dict.fromkeys(key for entry in entries for key in entry))
            rows = [[facts_html(entry.get(key)) for key in keys] for entry in entries]
            return table([key.replace("_", " ") for key in keys], rows, left=len(keys))
        return ", ".join(facts_html(entry) for entry in entries) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value, 4)
    return "–" if value is None or value == "" else escape(value)

"""The report of a compile as one HTML file: no request leaves it, and it needs no JavaScript.

Everything on the page comes from the data of `report_data`, which the page carries as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, cast

from liquidc.errors import EngineError
from liquidc.files import read_utf8
from liquidc.records import loads
from liquidc.report.costs import by_depth_section, time_section
from liquidc.report.experts import experts_section
from liquidc.report.gates import depth_section, gates_section, paths_section
from liquidc.report.parts import DATA, data_script, escape, percent, size, tag
from liquidc.report.passes import fidelity_section, guard_section, passes_section

REPORT = "report.html"
"""Name of the file in an engine."""
Data = dict[str, Any]


def report_page(data: Data) -> str:
    """The file."""
    title = f"liquidc: {data['model']['type']} for {data['target'].get('name', '')}"
    parts = [_head(data)]
    for anchor, name, lead, section in SECTIONS:
        content = section(data)
        if content:
            head = tag("h2", name, id=anchor) + tag("p", lead, cls="lead")
            parts.append(tag("section", head + content))
    parts.append(
        tag(
            "footer",
            f"Written by liquidc {escape(data['liquidc'])}. The numbers of this page as JSON: "
            "<code>liquidc inspect ENGINE --json</code>, under <code>report</code>.",
        )
    )
    template = resources.files("liquidc.report").joinpath("page.html.template").read_text("utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    return Template(template).substitute(
        title=escape(title),
        body="\n".join(parts),
        data=data_script(data),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def read_report(engine: Path) -> Data | None:
    """The data of an engine's report; None in an engine without one.

    Raises:
        EngineError: the report is damaged.
    """
    path = engine / REPORT
    if not path.exists():
        return None
    try:
        found = re.search(DATA + "(.*?)</script>", read_utf8(path, EngineError), re.DOTALL)
        data: Any = loads(found[1] if found else "")
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise EngineError(f"{path}: not a report of liquidc; compile the engine again")
    return cast(Data, data)


def _head(data: Data) -> str:
    model, profile, costs = data["model"], data["profile"], data["costs"]
    gated = len({gate["layer"] for gate in data["gates"]})
    kinds = [f"{model['layers']} layers, {gated} with gates"] if model["layers"] else []
    if model["experts"]:
        kinds.append(f"{model['experts']} experts")
    title = tag("h1", escape(" · ".join([model["type"], *kinds])))
    target = ", ".join(
        value if key == "name" else f"{key} {value}" for key, value in data["target"].items()
    )
    measured = f"; profile of {profile['tokens']:,} tokens" if profile else "; no profile"
    compiled = escape(f"Compiled for {target}{measured}; model {model['sha256'][:12]}…")
    expected, full = costs["guarded"] or costs["expected"], costs["full"]["bytes"]
    if expected is None:
        most = size(costs["worst"]["bytes"])
        tiles = [(most, "read per token at most; what to expect takes a profile")]
    else:
        told = f"expected cost: a token reads {size(expected['bytes'])}, not the {size(full)} of "
        told += "the model with every layer on"
        tiles = [(percent(expected["bytes"] / full) if full else "–", told)]
    mean = profile["depth"]["mean"] if profile else None
    if mean is not None:
        tiles.append((f"{mean:.2f} of {model['layers']}", "layers run per token, on average"))
    tiles.append((size(data["weights_bytes"]), "of weights in the engine"))
    shown = [
        tag("div", tag("b", escape(figure)) + tag("span", escape(what)), cls="tile")
        for figure, what in tiles
    ]
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _, _ in SECTIONS]
    return tag(
        "header",
        title
        + tag("p", compiled, cls="dim")
        + tag("div", "".join(shown), cls="tiles")
        + tag("nav", "".join(links)),
    )


SECTIONS: tuple[tuple[str, str, str, Callable[[Data], str]], ...] = (
    (
        "time",
        "Where the time goes",
        "What a token costs in each layer: decoding waits mostly for memory, so bytes come first.",
        time_section,
    ),
    (
        "depth",
        "Depth of each token",
        "A passage of the profiled text; the stronger a token's colour, the more layers it ran.",
        depth_section,
    ),
    (
        "gates",
        "Gates",
        "How often each gate lets a token run its layer, and how sure it is.",
        gates_section,
    ),
    (
        "paths",
        "Depth paths",
        "Which gates run together: a path is a token's decisions at all gates.",
        paths_section,
    ),
    (
        "experts",
        "Experts",
        "How many tokens use each expert, and which experts are used together.",
        experts_section,
    ),
    (
        "costs",
        "Cost by depth",
        "What one token reads and computes at most, on average, and at quantiles of its depth.",
        by_depth_section,
    ),
    (
        "passes",
        "What each pass did",
        "Ops and weights before and after each pass; open one for rules and facts.",
        passes_section,
    ),
    (
        "fidelity",
        "Fidelity",
        "How far the engine is from the model, measured on held-out text.",
        fidelity_section,
    ),
    (
        "guards",
        "Guards",
        "What is assumed about a token's path, and how often that was wrong in the profile.",
        guard_section,
    ),
)

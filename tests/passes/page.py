"""Writes docs/passes.md from the passes themselves: `python -m tests.passes.page`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from liquidc.ir.rewriter import Rule
from liquidc.passes.base import Pass
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"
INTRO = """# The passes

A pass changes a module in place: valid IR in, valid IR out. `liquidc opt` runs passes by name
over IR text; `--explain RULE` prints where a rule came closest to firing and why it did not.
This page is written from the code: `python -m tests.passes.page`.

What a pass may change is its contract. *bitwise*: no bit of any result. *reassociates*:
floating-point sums may be added in another order; decisions and integers stay, and in float64 the
results stay within the rounding that the module has anyway (`tests/generator/check.py`). Under
either contract an arm that is skipped stays skipped. *lossy*: results change; such a pass runs
only when it is asked for, needs a profile, and is measured (`liquidc/lossy.py`). Running a pass a
second time changes nothing. A pass that cannot transform something leaves it as it is and says why.

Without wishes of its own, a target runs them in this order:

{order}

| pass | contract | requires | ensures | what it does |
|---|---|---|---|---|
{rows}
"""


def summary(kind: type[Pass] | type[Rule]) -> str:
    """The first line of the documentation."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def row(name: str, kind: type[Pass]) -> str:
    """A pass's line of the table."""
    facts = [", ".join(names) or "–" for names in (kind.requires, kind.ensures)]
    return f"| `{name}` | {kind.contract} | {' | '.join(facts)} | {summary(kind)} |"


def rules_of(kind: type[Pass]) -> list[type[Rule]]:
    """The rewrite rules in a pass's file."""
    things = vars(sys.modules[kind.__module__]).values()
    rules = [thing for thing in things if inspect.isclass(thing) and issubclass(thing, Rule)]
    return [rule for rule in rules if rule.__module__ == kind.__module__]


def rule_name(rule: type[Rule]) -> str:
    """The name of a rule, whatever its constructor takes."""
    return rule.__new__(rule).name


def section(name: str, kind: type[Pass]) -> str:
    """A pass's documentation with its options and rules."""
    text = re.sub(
        r"::\n\n((?:    .*\n|\n)+)",
        lambda match: f":\n\n```\n{inspect.cleandoc(match[1])}\n```\n\n",
        f"{inspect.getdoc(kind)}\n",
    )
    parts = [f"## {name}", text.strip()]
    if options := dataclasses.fields(kind):
        parts.append("Options: " + ", ".join(f"`{f.name}={f.default}`" for f in options) + ".")
    if rules := [f"* `{rule_name(rule)}`: {summary(rule)}" for rule in rules_of(kind)]:
        parts.append("Rules:\n\n" + "\n".join(rules))
    return "\n\n".join(parts)


def render() -> str:
    """The whole page."""
    order = " → ".join(f"`{name}`" for name in DEFAULT_PIPELINE)
    rows = "\n".join(row(name, kind) for name, kind in sorted(PASSES.items()))
    sections = [section(name, kind) for name, kind in sorted(PASSES.items())]
    return "\n\n".join([INTRO.format(order=order, rows=rows).strip(), *sections]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

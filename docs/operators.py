"""Writes docs/ops.md, the operators that the trace translates: python docs/operators.py."""

from __future__ import annotations

from pathlib import Path

from liquidc.frontend.operators import ATEN
from liquidc.frontend.semantic_import import SEMANTIC


def page() -> str:
    """The page, from the importer's tables."""
    overloads: dict[str, list[str]] = {}
    for name in ATEN:
        if name.startswith("aten."):
            _, operator, overload = name.split(".")
            overloads.setdefault(operator, []).append(overload)
    rows = [f"| `{name}` | {', '.join(sorted(kinds))} |" for name, kinds in overloads.items()]
    special = sorted(f"`{name.removesuffix('.default')}`" for name in SEMANTIC)
    return "\n".join(
        [
            "# What can be compiled",
            "",
            "The operators that the trace translates, as `torch.export` names them. Another one is",
            "an error that names it and the line of the model. This page is written by",
            "`python docs/operators.py` from the importer's tables.",
            "",
            f"Of the protocol ([protocol.md](protocol.md)): {', '.join(special)}.",
            "",
            "| operator | overloads |",
            "|---|---|",
            *sorted(rows),
            "",
        ]
    )


if __name__ == "__main__":
    (Path(__file__).parent / "ops.md").write_text(page(), encoding="utf-8")

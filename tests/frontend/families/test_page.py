"""docs/models.md names every family."""

from __future__ import annotations

from pathlib import Path

from liquidc.frontend.families import families

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"


def test_the_page_names_every_family() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = {name.strip(" `") for row in rows[1:] for name in row.split(",")}
    assert named == {*families(), "liquid"}

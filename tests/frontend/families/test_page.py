"""docs/models.md names every family, and every field that is refused."""

from __future__ import annotations

import re
from pathlib import Path

from liquidc.frontend.families import families
from liquidc.frontend.families.common import REFUSED

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"


def tables() -> list[list[list[str]]]:
    """The cells of the page's tables, without their heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.M)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()[2:]]
        for block in blocks
    ]


def test_the_page_names_every_family() -> None:
    rows = [first for first, *_ in tables()[0]]
    named = {name.strip(" `") for row in rows for name in row.split(",")}
    assert named == {*families(), "liquid"}


def test_the_page_names_every_field_that_is_refused() -> None:
    assert {name.strip("`"): values for name, values in tables()[1]} == REFUSED

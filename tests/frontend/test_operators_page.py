"""docs/ops.md is what the importer's tables say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_current() -> None:
    page = runpy.run_path(str(DOCS / "operators.py"))["page"]
    assert (DOCS / "ops.md").read_text(encoding="utf-8") == page()

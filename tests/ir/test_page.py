"""The example of docs/ir.md is what it says: valid, and printed as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from liquidc.ir import parse_module, print_module, verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ir.md"


def test_the_example_is_valid() -> None:
    (text,) = re.findall(r"```mlir\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = parse_module(text)
    verify(module)
    assert print_module(module) == text

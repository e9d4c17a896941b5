"""Every operator that has a translation."""

from __future__ import annotations

from liquidc.frontend import aten, aten_shapes
from liquidc.frontend.aten_table import TABLE as ATEN
from liquidc.frontend.importer import Import
from liquidc.frontend.semantic_import import SEMANTIC

FILLED_BY = (aten, aten_shapes)
"""The files that fill the table of ATen operators."""

OPERATORS: dict[str, Import] = {**ATEN, **SEMANTIC}
"""Translations by name, as `torch.ops` prints it."""

"""ONNX Runtime engines of every model of the grid against the independent float64 oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.oracle.drive import drive
from tests.oracle.engines import engine, stepper
from tests.oracle.grid import edge_cases, grid
from tests.oracle.reference import assert_matches, reference, tolerance

CASES = {case.name: case for case in (*grid(), *edge_cases())}


@pytest.mark.parametrize("name", CASES)
def test_whole_chunked_and_token_by_token(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with engine(case, tmp_path / "engine", "onnxruntime") as loaded:
        for expected in reference(case):
            for chunk in (None, 3, 1):
                outputs = drive(case, expected.batch, stepper(loaded.runner), chunk)
                assert_matches(expected, outputs, tolerance(case.config))
                np.testing.assert_array_equal(outputs["kv_len"], expected.kv_len)

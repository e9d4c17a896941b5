"""The machine table and the cost model of a gate's lowerings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidc.errors import InputError
from liquidc.machine import DEFAULT, MachineTable, Work, expected, read_table
from liquidc.records import to_json

TABLE = MachineTable("m", {}, 1, (1, 4, 16), (1.0, 2.0, 8.0), 10.0, 1.0, 5.0, 0.5)


def test_products_between_and_beyond_the_entries() -> None:
    kib = 1024
    times = [TABLE.product_time(rows, kib) for rows in (0.5, 1, 2.5, 4, 16, 32)]
    assert times == [1.0, 1.0, 1.5, 2.0, 8.0, 16.0]
    assert TABLE.product_time(4, 10 * kib) == 20.0


def test_by_hand() -> None:
    """Four tokens of which half run: some token runs with probability 15/16."""
    work = Work(weights=2048, experts=0, share=0.0, ops=3, conditionals=1, width=1024)
    times = expected(TABLE, work, tokens=4, rate=0.5)
    some = 1 - 0.5**4
    rows = 2 / some
    assert times.mask == pytest.approx(2 * 2.0 + 3)
    assert times.branch == pytest.approx(10 + some * (2 * 2.0 + 3))
    few = 2 * (1 + (rows - 1) / 3)
    assert times.compact == pytest.approx(10 + some * (few + 3 + 5 + 0.5 * rows))


def test_experts_compute_only_tokens_that_run() -> None:
    """Two of eight experts, 8 KiB: 4 running tokens are one row for each expert."""
    without = Work(weights=2048, experts=0, share=0.0, ops=3, conditionals=1, width=1024)
    work = replace(without, experts=8192, share=0.25)
    for name in ("branch", "compact", "mask"):
        more = getattr(expected(TABLE, work, 4, 1.0), name)
        assert more - getattr(expected(TABLE, without, 4, 1.0), name) == pytest.approx(8)
    one = expected(TABLE, work, 1, 0.5).mask - expected(TABLE, without, 1, 0.5).mask
    assert one == pytest.approx(0.5 * 2)


@given(st.floats(0, 1), st.integers(1, 300))
def test_bounds(rate: float, tokens: int) -> None:
    work = Work(weights=10**6, experts=10**7, share=0.25, ops=30, conditionals=2, width=4096)
    times = expected(read_table(DEFAULT), work, tokens, rate)
    asked = 2 * read_table(DEFAULT).conditional
    assert asked <= times.branch <= (asked + times.mask) * (1 + 1e-9)
    assert times.compact >= asked


def test_gates_that_never_and_always_run() -> None:
    work = Work(weights=2048, experts=0, share=0.0, ops=3, conditionals=1, width=1024)
    never, always = (expected(TABLE, work, 4, rate) for rate in (0.0, 1.0))
    assert never.branch == never.compact == 10
    assert always.branch == 10 + always.mask


def test_the_table_that_comes_with_liquidc() -> None:
    table = read_table(DEFAULT)
    assert table.tools["onnxruntime"]
    assert table.product_time(128, 2**20) > table.product_time(1, 2**20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [2, 4, 16]}, "rows must rise from 1"),
        ({"rows": [1, 4]}, "with a product time for each"),
        ({"rows": [1, 16, 4]}, "rows must rise"),
        ({"op": -1.0}, "times must be 0 or more"),
        ({"op": "fast"}, "op must be a number"),
        ({"speed": 1}, "speed is not a known field"),
    ],
)
def test_damaged_tables(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**to_json(replace(TABLE)), **change}))
    with pytest.raises(InputError, match=message):
        read_table(path)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "absent.json")
    for text, message in (("{", "not valid JSON"), ("{}", "not a machine table")):
        (tmp_path / "text.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / "text.json")

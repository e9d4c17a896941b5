"""The bench: which gates each level forces, what is read, what is reported."""

from __future__ import annotations

import numpy as np
import pytest

from liquidc.bench import BenchOptions, bench, bytes_read, controls, interval
from liquidc.errors import InputError
from liquidc.runtime import Engine
from liquidc.session import DepthControls
from tests.liquidc.fakes import FakeRunner, manifest

SMALL = BenchOptions(cached=4, steps=3, turns=2, prompt=8)


@pytest.fixture
def engine() -> Engine:
    return Engine(manifest(), FakeRunner())


def test_levels_force_gates_evenly(engine: Engine) -> None:
    assert controls(engine, 100).gate_force == (1, 1)
    assert controls(engine, 50).gate_force == (-1, 1)
    assert controls(engine, 0).gate_force == (-1, -1)


def test_rows(engine: Engine) -> None:
    result = bench(engine, SMALL)
    names = [row["name"] for row in result["rows"]]
    assert names == [
        f"{kind}, {level} % on" for level in (100, 50, 0) for kind in ("decode", "prefill")
    ]
    for row in result["rows"]:
        assert row["ms_min"] <= row["ms_low"] <= row["ms_median"] <= row["ms_high"]
        assert row["ms_high"] <= row["ms_max"]
    assert [row["samples"] for row in result["rows"][:2]] == [6, 2]
    decode = [row["bytes_per_token"] for row in result["rows"][::2]]
    # a slot is 2 * 2 * 8 floats; the sixth token sees 6 slots at least
    assert decode[0] > decode[1] > decode[2]
    assert result["rows"][1]["bytes_per_token"] is None
    assert 0 < result["rows"][0]["bandwidth_share"]
    assert result["machine"]["cores"] >= 1


def test_bytes_of_weights_and_cache(engine: Engine) -> None:
    session = engine.session(capacity=4)
    result = session.prefill([1], depth=DepthControls(gate_force=(1, -1)))
    lengths = np.array([1, 1, 1, 1])
    # always 1000, gate 0 runs 100, gate 1 skips 2; layers 0, 1 and 3 read one slot each
    assert bytes_read(engine, result, lengths) == 1000 + 100 + 2 + 3 * 2 * 2 * 8 * 4


def test_the_interval_is_made_of_order_statistics() -> None:
    low, high = interval(list(range(101)))
    assert (low, high) == (40, 61)
    assert interval([5.0]) == (5.0, 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(levels=(101,)), "percentages"),
        (BenchOptions(cached=0), "1 or more"),
        (BenchOptions(cached=30), "don't fit the context of 32"),
    ],
)
def test_bad_options(engine: Engine, options: BenchOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(engine, options)

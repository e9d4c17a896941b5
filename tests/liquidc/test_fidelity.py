"""Metrics against small cases that are worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from liquidc.fidelity import (
    DepthMetrics,
    ExpertMetrics,
    GateMetrics,
    LogitMetrics,
    decide,
    depth_of,
    matching,
)
from liquidc.manifest import GateInfo

GATES = (GateInfo(1, 0.5, "gt"), GateInfo(2, 0.5, "ge", reserved=1))


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_logits() -> None:
    metrics = LogitMetrics()
    reference = f32([0.0, math.log(3)], [1.0, 1.0])
    engine = f32([0.0, 0.0], [1.0, 1.5])
    metrics.add(engine, reference)
    report = metrics.report()
    assert report["logits_max_abs"] == pytest.approx(math.log(3))
    assert report["logits_max_rel"] == pytest.approx(1.0)
    assert report["logits_mean_abs"] == pytest.approx((math.log(3) + 0.5) / 4)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    q = 1 / (1 + math.exp(0.5))
    second = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert report["kl_nats"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert report["top1_agreement"] == 0.0
    assert report["bits_per_byte"] is None


def test_bits_per_byte() -> None:
    metrics = LogitMetrics()
    uniform = np.zeros((2, 4), np.float32)
    sharp = f32([0, 0, 0, 50], [50, 0, 0, 0])
    metrics.add_text(uniform, sharp, np.array([3, 0]), 4)
    report = metrics.report()
    assert report["bits_per_byte"] == pytest.approx(1.0)
    assert report["bits_per_byte_reference"] == pytest.approx(0.0, abs=1e-9)


def test_decisions_follow_compare_and_reserved() -> None:
    p = f32([0.5, 0.6, 0.4], [0.1, 0.5, 0.4])
    assert decide(GATES, p).tolist() == [[False, True, False], [True, True, False]]
    assert decide(GATES, p, start=1).tolist() == [[False, True, False], [False, True, False]]


def test_flips_outside_the_band_count() -> None:
    metrics = GateMetrics(GATES)
    reference = f32([0.9, 0.50001, 0.2], [0.9, 0.9, 0.9])
    engine = f32([0.9, 0.49999, 0.2], [0.9, 0.9, 0.9])
    metrics.add(0, engine, decide(GATES, engine), reference, decide(GATES, reference))
    report = metrics.report()
    # |Δp| = 2e-5, so the band is 4e-5 wide on each side and the flip is a tie
    assert report["gate_tie_band"] == pytest.approx(4e-5, rel=1e-2)
    assert report["gate_agreement"] == 1.0
    assert (report["gate_flips"], report["gate_ties"]) == (1, 1)
    (flip,) = report["gate_flips_listed"]
    assert (flip["token"], flip["layer"], flip["tie"]) == (1, 1, True)
    wrong = f32([0.9, 0.3, 0.2], [0.9, 0.9, 0.9])
    metrics.add(1, wrong, decide(GATES, wrong), reference, decide(GATES, reference))
    report = metrics.report()
    assert report["gate_tie_band"] == 1e-4
    assert report["gate_flips"] == 2
    # near the threshold in the reference alone is no tie
    assert report["gate_agreement"] == pytest.approx(10 / 11)
    far = f32([0.1, 0.9, 0.2], [0.9, 0.9, 0.9])
    near = f32([0.9, 0.9, 0.2], [0.9, 0.9, 0.9])
    metrics.add(2, far, decide(GATES, far), near, decide(GATES, near))
    assert metrics.report()["gate_agreement"] == pytest.approx(15 / 17)


def test_a_reserved_position_is_no_tie() -> None:
    metrics = GateMetrics(GATES)
    p = f32([0.9], [0.5])
    metrics.add(0, p, decide(GATES, p), p, decide(GATES, p))
    assert metrics.report()["gate_ties"] == 0


def test_no_gates_agree() -> None:
    metrics = GateMetrics(())
    empty = np.zeros((0, 5), np.float32)
    metrics.add(0, empty, empty > 0, empty, empty > 0)
    assert metrics.report()["gate_agreement"] == 1.0


def test_expert_overlap() -> None:
    metrics = ExpertMetrics()
    ours = np.array([[[0, 1], [2, 3], [-1, -1]]])
    theirs = np.array([[[1, 0], [2, 0], [0, 1]]])
    metrics.add(4, ours, theirs)
    report = metrics.report()
    assert report["expert_overlap"] == 0.75
    (listed,) = report["expert_differences_listed"]
    assert listed == {
        "window": 4,
        "token": 1,
        "layer": 0,
        "experts": [2, 3],
        "experts_reference": [0, 2],
    }
    assert ExpertMetrics().report()["expert_overlap"] is None


def test_depth() -> None:
    gates = np.array([[True, False, True], [True, True, False]])
    assert depth_of(gates, (1, 1), 3).tolist() == [3, 2, 2]
    assert depth_of(gates, (1, 2), 3).tolist() == [3, 2, 2]
    metrics = DepthMetrics(3, (1, 2))
    metrics.add(gates, np.ones((2, 3), np.bool_))
    report = metrics.report()
    assert report["depth_histogram"] == [0, 0, 2, 1]
    assert report["depth_histogram_reference"] == [0, 0, 0, 3]
    assert report["depth_mean"] == pytest.approx(7 / 3)


def test_matching_counts_up_to_the_first_difference() -> None:
    assert matching([1, 2, 3], [1, 2, 3], 3) == 3
    assert matching([1, 9, 3], [1, 2, 3], 3) == 1
    assert matching([1, 2], [1, 2, 3], 3) == 2

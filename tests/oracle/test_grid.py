"""The grid is what its users rely on: complete, decided, sensitive to every field, reproducible."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests.oracle.coverage import required_values, used_values
from tests.oracle.grid import Batch, Case, edge_cases, grid
from tests.oracle.liquid_numpy import Oracle
from tests.oracle.reference import MARGIN, assert_matches, reference, run, tolerance

GRID = grid()
ALL = [*GRID, *edge_cases()]

CHANGES: dict[str, tuple[Any, Any]] = {
    "rms_norm_eps": (1e-3, 1e-6),
    "rope_theta": (10000.0, 100.0),
    "depth_gate.scope": ("attn", "ffn"),
    "depth_gate.input": ("post_norm", "residual"),
    "depth_gate.router_act": ("tanh", "silu"),
    "depth_gate.router_exec_index": (0, 1),
    "depth_gate.threshold": (0.40625, 0.5),
    "depth_gate.exec_scale": ("prob", "logit"),
    "depth_gate.exec_scale_alpha": (0.5, 1.0),
    "depth_gate.scale_target": ("both", "delta"),
    "depth_gate.skip_scale": ("one_minus_prob", "one"),
    "depth_gate.kv_policy": ("drop", "own"),
    "depth_gate.reserved_initial_tokens": (3, 1),
    "moe.score": ("sigmoid", "softmax"),
    "moe.post": ("none", "renorm"),
    "moe.renorm_eps": (0.5, 0.0),
    "moe.group_score": ("top2sum", "max"),
    "moe.group_fill": ("zero", "neg_inf"),
    "moe.n_group": (3, 1),
    "moe.topk_group": (2, 1),
    "moe.routed_scaling_factor": (2.5, 1.0),
    "moe.apply": ("input", "output"),
    "moe.num_experts_per_tok": (3, 2),
    "moe.shared_gate": ("sigmoid", "none"),
}
"""For each field whose change keeps all shapes: a value in the grid, and what it is changed to."""


def test_every_value_of_every_field_occurs() -> None:
    """Each value is used where it matters, not only written."""
    used = {pair for case in GRID for pair in used_values(case)}
    assert required_values() <= used, required_values() - used


def test_every_policy_scope_target() -> None:
    """All 36, with unique names."""
    points = {
        (case.gate["kv_policy"], case.gate["scope"], case.gate["scale_target"])
        for case in GRID
        if case.num_gates
    }
    assert len(points) == 36
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_decisions_vary_and_are_clear(case: Case) -> None:
    """Every gate runs and skips when it is free, and nothing is decided within rounding."""
    free = [r for r in reference(case) if r.batch.gate_force is None and r.batch.min_depth is None]
    for gate in range(case.num_gates):
        decisions = np.concatenate([r.gates[gate][r.valid] for r in free])
        assert set(decisions) == {False, True}
    for r in reference(case):
        assert r.gate_margin.min(initial=np.inf) > MARGIN
        assert r.expert_margin.min() > MARGIN


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_is_ignored_is_caught(field: str) -> None:
    """Changing the field in a case that uses it moves the outputs far beyond the tolerance."""
    value, other = CHANGES[field]
    section, _, name = field.rpartition(".")
    seen = 0.0
    for case in GRID:
        fields = {"": case.config, "depth_gate": case.gate, "moe": case.moe}[section]
        unused = (section == "moe" and not fields["num_experts"]) or (
            section == "depth_gate" and not fields["layers"]
        )
        if unused or fields[name] != value:
            continue
        part = case.config.get(section, {})
        config = {**case.config, **({section: {**part, name: other}} if section else {name: other})}
        for expected in reference(case)[:2]:
            changed = run(Oracle(config, case.weights()), expected.batch)
            scale = np.abs(expected.logits[expected.valid]).max()
            error = np.abs(changed.logits - expected.logits)[expected.valid].max() / scale
            seen = max(seen, error / tolerance(case.config))
        if seen > 100:
            return
    pytest.fail(f"changing {field} from {value} to {other} moves the logits by {seen} bounds")


def test_the_tie_decides_compare() -> None:
    """`compare` only shows at a tie, which the edge cases have in every precision."""
    ties = [case for case in edge_cases() if case.name.startswith("tie")]
    assert {case.gate["compare"] for case in ties} == {"gt", "ge"}
    for case in ties:
        plain = reference(case)[0]
        assert (plain.gate_p == 0.5).all()
        assert (plain.gates == (case.gate["compare"] == "ge")).all()
        assert plain.experts is not None
        shown = plain.experts[:, plain.gates.all(0)]
        assert (shown == [0, 1]).all()


def test_pieces_of_a_batch() -> None:
    """`chunks` keeps tokens and positions; ended rows are empty."""
    whole = Batch("ragged", ((5, 6, 7, 8), (9,)), position_start=(0, 3), gate_bias=(1.0, 2.0))
    first, second = whole.chunks(3)
    assert first.prompts == ((5, 6, 7), (9,))
    assert second.prompts == ((8,), ())
    assert second.position_start == (3, 6)
    assert second.gate_bias == (1.0, 2.0)
    np.testing.assert_array_equal(second.input_ids, [[8], [0]])
    np.testing.assert_array_equal(second.lengths, [1, 0])
    np.testing.assert_array_equal(whole.input_ids, [[5, 6, 7, 8], [9, 0, 0, 0]])


def test_saving(tmp_path: Path) -> None:
    """A saved case is a checkpoint directory; drawing the weights again gives the same."""
    case = GRID[0]
    case.save(tmp_path / "model")
    reader: Any = safetensors
    stored = reader.load_file(tmp_path / "model" / "model.safetensors")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == case.config
    assert set(stored) == set(case.weights())
    for name, value in case.weights().items():
        np.testing.assert_array_equal(stored[name], value)
        assert value.dtype == np.float32


def test_the_comparison_can_fail() -> None:
    """`assert_matches` accepts the oracle itself and refuses each kind of difference."""
    case = next(case for case in GRID if case.num_gates and case.moe["num_experts"])
    expected = reference(case)[1]
    bound = tolerance(case.config)
    names = ("logits", "gates", "gate_p", "gate_score", "experts")
    good = {name: getattr(expected, name) for name in names}
    assert_matches(expected, good, bound)
    for name in names:
        value = good[name].copy()
        index = (0,) * value.ndim
        value[index] = ~value[index] if value.dtype == np.bool_ else value[index] + 1
        with pytest.raises(AssertionError, match=f"ragged: {name} differ"):
            assert_matches(expected, {**good, name: value}, bound)
    padding = replace(expected, valid=~expected.valid)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_matches(padding, {**good, "logits": np.zeros_like(expected.logits)}, bound)

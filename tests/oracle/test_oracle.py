"""Self-checks of the oracle: identities that the equations imply, and examples worked by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.oracle.grid import Batch, Case, edge_cases, grid
from tests.oracle.liquid_numpy import Array, Oracle, rope, route, top
from tests.oracle.reference import Reference, reference, run

GRID = grid()
GATED = [case for case in GRID if case.num_gates]
MOE = {
    "num_experts_per_tok": 2,
    "score": "softmax",
    "post": "renorm",
    "renorm_eps": 0.0,
    "n_group": 1,
    "topk_group": 1,
    "group_score": "max",
    "group_fill": "neg_inf",
    "routed_scaling_factor": 1.0,
}


def by_name(cases: Iterable[Case]) -> Any:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


def batch(case: Case, name: str) -> Batch:
    """The batch of that name."""
    return next(b for b in case.batches() if b.name == name)


def result(case: Case, name: str) -> Reference:
    """What the oracle says about the batch of that name."""
    return next(r for r in reference(case) if r.batch.name == name)


def without_gates(case: Case) -> Oracle:
    """The same model without its depth gates."""
    config = {name: value for name, value in case.config.items() if name != "depth_gate"}
    weights = {name: w for name, w in case.weights().items() if ".depth_" not in name}
    return Oracle(config, weights)


@by_name(case for case in GATED if case.gate["exec_scale"] == "none")
def test_forced_run_is_the_model_without_gates(case: Case) -> None:
    """With every gate forced to run and no scale, gates change no bit."""
    forced = result(case, "run")
    assert forced.gates[:, forced.valid].all()
    plain = run(without_gates(case), replace(forced.batch, gate_force=None))
    np.testing.assert_array_equal(forced.logits, plain.logits)
    np.testing.assert_array_equal(forced.kv_len, plain.kv_len)


@by_name(
    case
    for case in GATED
    if case.gate["scope"] in ("layer", "attn_ffn") and case.gate["skip_path"] == "identity"
)
def test_forced_skip_is_the_model_of_the_other_layers(case: Case) -> None:
    """A model that skips its gated layers is the model that never had them."""
    skipped = result(case, "skip")
    gated = case.gate["layers"]
    kept = [i for i in range(case.config["num_hidden_layers"]) if i not in gated]
    weights: dict[str, Array] = {}
    for name, value in without_gates(case).weights.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) in gated:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = value
    moe = dict(case.config["moe"])
    if moe and case.moe["layers"] != "all":
        moe["layers"] = [kept.index(i) for i in case.moe["layers"] if i in kept]
    config = {**case.config, "moe": moe, "num_hidden_layers": len(kept), "depth_gate": {}}
    rest = run(Oracle(config, weights), replace(skipped.batch, gate_force=None))
    np.testing.assert_array_equal(skipped.logits, rest.logits)


def test_identity_experts_add_their_input() -> None:
    """With experts that compute 0, the feed-forward is the input times the identity shares."""
    case = next(case for case in GRID if case.name == "ungated-longcat")
    still = {n: 0 * w if n.endswith("down_proj") else w for n, w in case.weights().items()}
    oracle, seen = Oracle(case.config, still), set[int]()
    for z in np.random.default_rng(0).standard_normal((50, case.config["hidden_size"])):
        logits = oracle.linear("model.layers.0.mlp.gate", z)
        bias = oracle.weights["model.layers.0.mlp.gate.e_score_correction_bias"]
        experts, weights, _ = route(logits, oracle.moe, bias)
        share = sum(w for e, w in zip(experts, weights, strict=True) if e >= 4)
        y, chosen, _ = oracle.feed_forward(0, z)
        assert chosen == experts
        np.testing.assert_allclose(y, share * z, rtol=1e-12)
        seen.add(sum(e >= 4 for e in experts))
    assert seen == {1, 2}


def test_softmax_topk_renorm_is_topk_softmax() -> None:
    """Mixtral's router is Granite's (spec 5.6 number 5), alone and inside a model."""
    logits = np.random.default_rng(0).standard_normal((50, 8))
    for row in logits:
        one = route(row, MOE, None)
        other = route(row, {**MOE, "score": "identity", "post": "softmax_k"}, None)
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], rtol=1e-14)
    case = next(case for case in GRID if case.name == "ungated-mixtral")
    moe = {**case.config["moe"], "score": "identity", "post": "softmax_k"}
    other = run(Oracle({**case.config, "moe": moe}, case.weights()), batch(case, "ragged"))
    valid = other.valid
    np.testing.assert_array_equal(result(case, "ragged").experts, other.experts)
    np.testing.assert_allclose(
        result(case, "ragged").logits[valid], other.logits[valid], rtol=0, atol=1e-12
    )


@by_name([*GRID, *edge_cases()])
def test_cache_lengths(case: Case) -> None:
    """Under drop a layer's lists hold what its attention executed, else every token."""
    scope, gated = case.gate["scope"], case.gate["layers"]
    for r in reference(case):
        for layer in range(case.config["num_hidden_layers"]):
            expected = r.batch.lengths
            if case.gate["kv_policy"] == "drop" and layer in gated and scope != "ffn":
                gate = gated.index(layer) * (2 if scope == "attn_ffn" else 1)
                expected = r.gates[gate].sum(-1)
            np.testing.assert_array_equal(r.kv_len[layer], expected)


def test_inherit_copies_the_layer_below() -> None:
    """A skipped token has the keys and values of the layer below; layer 0 has its own."""
    base = next(c for c in GATED if c.name.startswith("inherit-layer-ffn"))
    assert base.gate["layers"] == list(range(base.config["num_hidden_layers"]))
    for case in (base, replace(base, config=_with(base, "depth_gate.layers", [1, 2, 4]))):
        oracle = Oracle(case.config, case.weights())
        sequence = oracle.sequence()
        gates = [sequence.step(t).gates for t in batch(case, "plain").prompts[0]]
        for t, runs in enumerate(gates):
            for i, run_here in zip(case.gate["layers"], runs, strict=True):
                for lists in (sequence.keys, sequence.values):
                    same = bool((lists[i][t] == lists[max(i - 1, 0)][t]).all())
                    assert same == (not run_here or i == 0)


@by_name(GATED)
def test_controls(case: Case) -> None:
    """Bias shifts decisions and not p; the floor holds; force is stronger than reserved tokens."""
    gate, layers = case.gate, case.config["num_hidden_layers"]
    for r in reference(case):
        p = 1 / (1 + np.exp(-r.gate_score[:, r.valid]))
        np.testing.assert_allclose(r.gate_p[:, r.valid], p, rtol=1e-14)
        positions = r.batch.starts[:, None] + np.arange(r.valid.shape[1], dtype=np.int64)
        reserved = r.valid & (positions < gate["reserved_initial_tokens"])
        force = r.batch.gate_force or (0,) * case.num_gates
        for mask, forced in zip(r.gates, force, strict=True):
            assert mask[r.valid if forced > 0 else reserved if forced == 0 else ~r.valid].all() or (
                forced < 0 and not mask.any()
            )
    floor = result(case, "floor")
    per_layer = 2 if gate["scope"] == "attn_ffn" else 1
    ran = floor.gates.reshape(-1, per_layer, *floor.valid.shape).all(1).sum(0)
    executed = ran + layers - len(gate["layers"])
    assert floor.batch.min_depth is not None
    for row, least in enumerate(floor.batch.min_depth):
        assert (executed[row][floor.valid[row]] >= least).all()
    shifted = result(case, "bias")
    unbiased = run(case.oracle(), replace(shifted.batch, gate_bias=None))
    if gate["layers"][0] == 0:
        np.testing.assert_array_equal(shifted.gate_p[0], unbiased.gate_p[0])
    assert shifted.gates[:, 0].sum() >= unbiased.gates[:, 0].sum()
    assert shifted.gates[:, 1].sum() <= unbiased.gates[:, 1].sum()


@by_name(GRID)
def test_every_tensor_is_read(case: Case) -> None:
    """No weight of the case is left out of the computation."""

    class Recording(dict[str, Array]):
        def __getitem__(self, name: str) -> Array:
            seen.add(name)
            return super().__getitem__(name)

    seen: set[str] = set()
    oracle = case.oracle()
    oracle.weights = Recording(oracle.weights)
    for b in case.batches():
        if b.name in ("run", "skip", "plain"):
            run(oracle, b)
    assert seen == set(oracle.weights)


def test_rope_depends_on_distance() -> None:
    """Position 0 turns nothing, position 1 turns the first pair by one radian, q·k sees i - j."""
    q, k = np.random.default_rng(1).standard_normal((2, 1, 6))
    np.testing.assert_array_equal(rope(q, 0, 100.0), q)
    turned = rope(np.array([[1.0, 0.0, 0.0, 0.0]]), 1, 100.0)
    np.testing.assert_allclose(turned, [[np.cos(1), 0, np.sin(1), 0]])
    near = rope(q, 9, 100.0) @ rope(k, 4, 100.0).T
    np.testing.assert_allclose(near, rope(q, 5, 100.0) @ rope(k, 0, 100.0).T)


def test_top() -> None:
    """Falling order, the lowest index first among equals, the margin without exact ties."""
    assert top([1.0, 3.0, 3.0, 2.0], 2) == ([1, 2], 1.0)
    assert top([1.0, 1.0, 1.0], 2) == ([0, 1], float("inf"))
    assert top([0.5, 2.0, 1.75], 1) == ([1], 0.25)


def test_router_families_by_hand() -> None:
    """The generic router on numbers that can be followed."""
    logits = np.log([1.0, 4.0, 2.0, 3.0])  # softmax: .1 .4 .2 .3
    assert route(logits, {**MOE, "post": "none"}, None)[0] == [1, 3]
    np.testing.assert_allclose(route(logits, {**MOE, "post": "none"}, None)[1], [0.4, 0.3])
    np.testing.assert_allclose(route(logits, MOE, None)[1], [4 / 7, 3 / 7])
    eps = {**MOE, "renorm_eps": 0.3, "routed_scaling_factor": 2.0}
    np.testing.assert_allclose(route(logits, eps, None)[1], [0.8, 0.6])
    llama4 = {**MOE, "score": "identity", "post": "sigmoid", "num_experts_per_tok": 1}
    np.testing.assert_allclose(route(logits, llama4, None)[1], [0.8])  # sigmoid(log 4)
    # The bias moves the choice, the weight stays unbiased: sigmoid gives .5 .8 .667 .75.
    v3 = {**MOE, "score": "sigmoid"}
    chosen, weights, margin = route(logits, v3, np.array([0.4, 0.0, 0.0, 0.0]))
    assert chosen == [0, 1]
    np.testing.assert_allclose(weights, [0.5 / 1.3, 0.8 / 1.3])
    np.testing.assert_allclose(margin, 0.8 - 0.75)


def test_groups_by_hand() -> None:
    """Best and top-2 sum keep different groups; the two fills differ when scores are negative."""
    logits = np.array([9.0, 1.0, 6.0, 5.0, -2.0, -3.0])
    moe = {**MOE, "score": "identity", "post": "none", "n_group": 3, "topk_group": 1}
    assert route(logits, moe, None)[0] == [0, 1]
    assert route(logits, {**moe, "group_score": "top2sum"}, None)[0] == [2, 3]
    low = logits - 8.0  # 1 -7 -2 -3 -10 -11
    assert route(low, moe, None)[0] == [0, 1]
    assert route(low, {**moe, "group_fill": "zero"}, None)[0] == [0, 2]


def _with(case: Case, field: str, value: Any) -> dict[str, Any]:
    """The case's config with one field changed ("depth_gate.compare")."""
    section, _, name = field.rpartition(".")
    if not section:
        return {**case.config, name: value}
    return {**case.config, section: {**case.config.get(section, {}), name: value}}

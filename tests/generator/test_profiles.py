"""Profiles of generated modules are profiles."""

from __future__ import annotations

import random
from pathlib import Path

from liquidc.ir import ops
from liquidc.profile import read_profile
from tests.generator.modules import example


def test_they_are_valid_and_fit_the_gates_and_experts(tmp_path: Path) -> None:
    path, gates, experts = tmp_path / "profile.json", 0, 0
    for seed in range(50):
        made = example(random.Random(seed))
        assert made.profile is not None
        path.write_bytes(made.profile.to_bytes())
        assert read_profile(path) == made.profile
        found = list(made.module.functions["prefill"].body.walk())
        decided = [op.layer for op in found if isinstance(op, ops.DepthGate)]
        assert [gate.layer for gate in made.profile.gates] == decided
        routes = [op.k for op in found if isinstance(op, ops.Route)]
        assert [layer.per_token for layer in made.profile.experts] == routes
        layers = [layer.layer for layer in made.profile.experts]
        results = made.module.functions["prefill"].result_names
        returned = {int(n.split(".")[1]) for n in results if n.startswith("experts.")}
        assert returned <= set(layers) <= set(range(made.profile.model.layers))
        assert layers == sorted(set(layers))
        for layer in made.profile.experts:
            assert sum(layer.load) == layer.tokens * layer.per_token
            pairs = sum(map(sum, layer.together))
            assert pairs == layer.tokens * layer.per_token * (layer.per_token - 1)
        gates, experts = gates + len(decided), experts + len(routes)
    assert min(gates, experts) > 10

"""The numbers of report.html, against independent computation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liquidc.errors import InputError
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.loss import layer_cost
from liquidc.ir import parse_module
from liquidc.ir.rewriter import Statistics
from liquidc.manifest import Manifest
from liquidc.passlog import PassLog
from liquidc.passplan import plan_passes, run_passes
from liquidc.pipeline import CompileOptions, compile_model
from liquidc.profile import ExpertProfile, Paths
from liquidc.report import REPORT, read_report, report_page
from liquidc.report.data import CELLS, expert_pairs
from liquidc.runtime import load
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.profiles import PATHS, TOGETHER, TOKENS, made_profile, write_profile

CONTEXT = 128


def report(engine: Path) -> dict[str, Any]:
    data = read_report(engine)
    assert data is not None
    return data


@pytest.fixture(scope="module")
def manifest(null_engine: Path) -> Manifest:
    with load(null_engine) as engine:
        return engine.manifest


@pytest.fixture(scope="module")
def data(profiled_engine: Path) -> dict[str, Any]:
    return report(profiled_engine)


def tokens() -> list[str]:
    """The path of each token."""
    return [path for path, count in PATHS.items() for _ in range(count)]


def flops(layer: int, keys: float) -> tuple[float, float]:
    """By the model's formulas: what every token pays, and what those that run the layer do."""
    cost = layer_cost(LiquidConfig.from_dict(CONFIG), layer, keys)
    return cost.fixed, cost.attention + cost.ffn


def test_expected_cost_is_the_mean_over_tokens(
    data: dict[str, Any], null_engine: Path, manifest: Manifest
) -> None:
    """Keys are dropped with their tokens: attention of a gated layer sees those that ran it."""
    rates = {1: 11 / 16, 2: 10 / 16}
    head, slot = 2 * 32 * 256, 2 * 4 * 2 * 8
    expected = head + sum(sum(flops(layer, CONTEXT)) for layer in (0, 3))
    cache = 2 * CONTEXT * slot
    for path in tokens():
        for layer, digit in zip((1, 2), path, strict=True):
            always, run = flops(layer, CONTEXT * rates[layer])
            expected += (always + (run if digit == "1" else 0)) / TOKENS
            cache += CONTEXT * rates[layer] * slot / TOKENS if digit == "1" else 0
    costs = data["costs"]
    assert costs["expected"]["flops"] == round(expected)
    assert costs["expected"]["cache"] == round(cache)
    cost = manifest.cost
    weights = cost.always + rates[1] * cost.run[0] + rates[2] * cost.run[1]
    assert costs["expected"]["weights"] == round(weights)
    assert costs["expected"]["bytes"] == costs["expected"]["weights"] + costs["expected"]["cache"]
    assert costs["worst"]["weights"] == cost.always + sum(cost.run)
    assert costs["worst"]["cache"] == 4 * CONTEXT * slot
    assert costs["worst"]["flops"] == head + sum(sum(flops(layer, CONTEXT)) for layer in range(4))
    assert costs["full"]["flops"] == costs["worst"]["flops"]
    assert data["context"] == CONTEXT


def test_layers_add_up_to_the_whole(data: dict[str, Any]) -> None:
    costs, layers = data["costs"], data["layers"]
    for key in ("weights", "cache", "bytes", "flops"):
        total = costs["outside"][key] + sum(layer["expected"][key] for layer in layers)
        assert total == pytest.approx(costs["expected"][key], abs=8)
        most = sum(layer["always"][key] + layer["run"][key] for layer in layers)
        assert costs["outside"][key] + most == costs["worst"][key]
    assert [layer["run_rate"] for layer in layers] == [1, 11 / 16, 10 / 16, 1]
    assert layers[0]["gates"] == []
    assert layers[2]["gates"] == [1]
    assert layers[2]["experts"] == {"experts": 4, "per_token": 2}


def test_quantiles_are_those_of_the_sorted_tokens(data: dict[str, Any], manifest: Manifest) -> None:
    """Of equal depth, path 01 reads less than 10: fewer keys were kept for layer 2."""
    order = {"00": 0, "01": 1, "10": 2, "11": 3}
    ordered = sorted(tokens(), key=lambda path: order[path])
    quantiles = data["costs"]["quantiles"]
    assert [entry["quantile"] for entry in quantiles] == [0.1, 0.5, 0.9]
    for entry, rank in zip(quantiles, (2, 8, 15), strict=True):
        path = ordered[rank - 1]
        assert entry["path"] == path
        assert entry["depth"] == 2 + path.count("1")
        ran = [run for run, digit in zip(manifest.cost.run, path, strict=True) if digit == "1"]
        assert entry["weights"] == manifest.cost.always + sum(ran)
    assert [entry["path"] for entry in quantiles] == ["00", "10", "11"]


def test_depth_paths_and_gates(data: dict[str, Any]) -> None:
    profile = data["profile"]
    assert profile["depth"]["mean"] == pytest.approx(
        sum(2 + path.count("1") for path in tokens()) / TOKENS
    )
    assert profile["depth"]["histogram"] == {"2": 2 / 16, "3": 7 / 16, "4": 7 / 16}
    assert [entry["path"] for entry in profile["paths"]["top"]] == ["11", "10", "01", "00"]
    assert profile["paths"]["top"][0]["share"] == 7 / 16
    assert profile["transitions"] == [
        {
            "from": 0,
            "to": 1,
            "skip_skip": 2 / 16,
            "skip_run": 3 / 16,
            "run_skip": 4 / 16,
            "run_run": 7 / 16,
        }
    ]
    gate = data["gates"][1]
    assert (gate["layer"], gate["run_rate"], gate["fixed"]) == (2, 10 / 16, 0)
    assert gate["margin_mean"] == pytest.approx(6 / 16)
    assert gate["entropy_bits"] == pytest.approx(4 / 16)
    assert data["sample"]["depth"] == [2, 3, 3, 4, 4]


def test_experts_before_and_after_ordering(data: dict[str, Any], profiled_engine: Path) -> None:
    """Experts 0 and 2, and 1 and 3, are used together most."""
    assert [layer["layer"] for layer in data["experts"]] == [0, 1, 2, 3]
    layer = data["experts"][0]
    assert layer["load"] == [7, 9, 8, 8]
    assert layer["entropy_bits"] == pytest.approx(1.5)
    assert layer["together"] == [list(row) for row in TOGETHER]
    order = layer["order"]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert layer["together_ordered"] == [[TOGETHER[i][j] for j in order] for i in order]
    assert layer["cut"] == {"before": 4 + 2 + 3 + 5, "after": 1 + 2 + 3 + 1}
    page = (profiled_engine / REPORT).read_text()
    assert page.count('data-key="together_ordered"') == 4


def test_many_experts_share_cells() -> None:
    count = 2 * CELLS + 3
    together = tuple(tuple(0 if i == j else i + j for j in range(count)) for i in range(count))
    experts = ExpertProfile(0, 2, 5, (1,) * count, together)
    cells = expert_pairs(experts, range(count))
    assert len(cells) == len(cells[0]) == 23
    assert sum(map(sum, cells)) == sum(map(sum, together))
    assert cells[0][1] == sum(together[i][j] for i in range(3) for j in range(3, 6))


def test_what_passes_did_is_recorded() -> None:
    text = """module @m

weight @w : f32[2] = tensor("w", f32[2])
weight @v : f32[3] = tensor("v", f32[3])

func @f(%x: f32[2]) -> (y: f32[2]) {
  %w = weight weight="w" : f32[2]
  %v = weight weight="v" : f32[3]
  %a = add %x, %w : f32[2]
  %b = add %x, %w : f32[2]
  %c = add %a, %b : f32[2]
  %d = neg %v : f32[3]
  return %c
}
"""
    module, statistics = parse_module(text), Statistics()
    log = PassLog(module, statistics)
    plan = plan_passes(("eliminate-common", "eliminate-dead", "eliminate-dead"), ())
    run_passes(module, plan, statistics, after=log.after)
    common, dead, again = log.records
    assert common.ops == (7, 6)
    assert common.kinds == {"add": (3, 2)}
    assert common.fired == {"eliminate-common": 1}
    assert dead.ops == (6, 4)
    assert dead.weights == (20, 8)
    assert dead.kinds == {"neg": (1, 0), "weight": (2, 1)}
    assert (again.kinds, again.fired, again.weights) == ({}, {}, (8, 8))


def test_passes_are_told_in_order(data: dict[str, Any], profiled_engine: Path) -> None:
    with load(profiled_engine) as loaded:
        passes = loaded.manifest.passes
    assert [entry["name"] for entry in data["passes"]] == [p.name for p in passes]
    for entry, following in zip(data["passes"], data["passes"][1:], strict=False):
        assert entry["ops"][1] == following["ops"][0]
    ordered = next(entry for entry in data["passes"] if entry["name"] == "order-experts")
    assert ordered["fired"] == {"order-experts": 4}
    assert ordered["options"] == {"groups": 2}
    assert len(ordered["facts"]["layers"]) == 4


# ---- fixed gates, guards


def test_gates_that_are_fixed(model_directory: Path, profile_file: Path, tmp_path: Path) -> None:
    """The engine's paths, costs and depths are those that it can take."""
    held_out = tmp_path / "heldout.txt"
    held_out.write_text(
        "".join(f"{i} times {i} is {i * i}. Quite so, ever after.\n" for i in range(16))
    )
    options = CompileOptions(
        target="null",
        profile=profile_file,
        data=held_out,
        add=("fix-gates{gates=.0}", "eliminate-dead"),
    )
    compiled = compile_model(model_directory, tmp_path / "engine", options)
    data = report(tmp_path / "engine")
    assert [layer["run_rate"] for layer in data["layers"]] == [1, 11 / 16, 0, 1]
    assert data["profile"]["depth"]["histogram"] == {"2": 5 / 16, "3": 11 / 16}
    assert [entry["path"] for entry in data["profile"]["paths"]["top"]] == ["10", "00"]
    assert data["sample"]["paths"] == ["00", "00", "10", "10", "10"]
    assert data["layers"][2]["run"]["bytes"] == 0
    assert data["costs"]["worst"]["bytes"] < data["costs"]["full"]["bytes"]
    assert data["fidelity"] == compiled.manifest.fidelity
    page = (tmp_path / "engine" / REPORT).read_text()
    assert "fixed to skip" in page
    assert "nats per token" in page


def test_a_path_that_is_tried_first(data: dict[str, Any]) -> None:
    guard = {
        "paths": [{"path": "11", "share": 0.4, "bytes": 1000}],
        "masked_bytes": 3000,
        "guarded_bytes": 2200,
        "miss_rate": 0.6,
        "speculate": True,
    }
    page = report_page(data | {"guard": guard})
    assert "60.0 % were on another one" in page
    assert "3.00 kB of weights in the general code, and 2.20 kB on average" in page
    assert "and is by default" in page


def test_a_profile_of_other_gates(
    model_directory: Path, manifest: Manifest, tmp_path: Path
) -> None:
    profile = made_profile(manifest.model.sha256)
    other = replace(
        profile,
        gates=profile.gates[:1],
        transitions=(),
        paths=Paths(1, {"0": 5, "1": 11}),
        sample=None,
    )
    path = write_profile(other, tmp_path / "p.json")
    with pytest.raises(InputError, match="the profile has 1 gates, the module"):
        compile_model(
            model_directory, tmp_path / "engine", CompileOptions(target="null", profile=path)
        )
    assert not (tmp_path / "engine").exists()


def test_only_the_beginnings_of_paths_are_known(
    model_directory: Path, manifest: Manifest, tmp_path: Path
) -> None:
    profile = replace(made_profile(manifest.model.sha256), paths=Paths(1, {"0": 5, "1": 11}))
    path = write_profile(profile, tmp_path / "p.json")
    options = CompileOptions(target="null", profile=path)
    compile_model(model_directory, tmp_path / "engine", options)
    data = report(tmp_path / "engine")
    assert data["costs"]["quantiles"] is None
    assert data["costs"]["expected"]["weights"] > 0
    assert data["profile"]["depth"] == {"histogram": {}, "mean": pytest.approx(2 + 21 / 16)}
    assert (
        "only the beginnings of the paths are known" in (tmp_path / "engine" / REPORT).read_text()
    )


def test_a_layer_with_two_gates_runs_when_both_do(tmp_path: Path) -> None:
    gates = {"layers": [1], "scope": "attn_ffn", "kv_policy": "own"}
    model = save_model(tmp_path / "model", CONFIG | {"depth_gate": gates})
    built = compile_model(model, tmp_path / "first", CompileOptions(target="null"))
    profile = made_profile(built.manifest.model.sha256)
    profile = replace(profile, gates=tuple(replace(gate, layer=1) for gate in profile.gates))
    path = write_profile(profile, tmp_path / "p.json")
    compile_model(model, tmp_path / "engine", CompileOptions(target="null", profile=path))
    data = report(tmp_path / "engine")
    assert [layer["run_rate"] for layer in data["layers"]] == [1, 7 / 16, 1, 1]
    assert data["profile"]["depth"]["histogram"] == {"3": 9 / 16, "4": 7 / 16}
    attention, both = data["gates"]
    assert data["layers"][1]["run"]["weights"] == attention["weights_run"] + both["weights_run"]

"""What a token costs, counted off the IR, against the formulas of the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from liquidc.cost import cost_info
from liquidc.facts import main_function
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.loss import layer_cost
from liquidc.ir import Module, parse_module
from liquidc.ir.cost import Cost, Place, costs
from liquidc.ir.rewriter import Statistics
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.passplan import plan_passes, run_passes
from liquidc.pipeline import open_model
from tests.liquidc.conftest import CONFIG, save_model

CONTEXT = 100
GATES: dict[str, dict[str, Any]] = {
    "drop, a gate for each layer": {"kv_policy": "drop"},
    "own, two gates": {"kv_policy": "own", "scope": "attn_ffn"},
    "inherit, gated feed-forward with an adapter": {
        "kv_policy": "inherit",
        "scope": "ffn",
        "skip_path": "adapter",
        "adapter_intermediate_size": 6,
    },
    "own, gated attention, a linear router": {
        "kv_policy": "own",
        "scope": "attn",
        "router_type": "linear",
        "router_act": "none",
        "router_norm": False,
    },
}


def by_formula(config: LiquidConfig) -> dict[Place, float]:
    """FLOPs from the formulas; `hoist-common` moved what both arms need above them."""
    scope, found = config.depth_gate.scope, Counter[Place]()
    found[Place()] = 2 * config.hidden_size * config.vocab_size
    gate = 0
    for layer in range(config.num_hidden_layers):
        cost, always = layer_cost(config, layer, CONTEXT), Place(layer)
        count = config.gates_per_layer(layer)
        first, last = (
            (Place(layer, gate), Place(layer, gate + count - 1)) if count else (always,) * 2
        )
        found[always] += cost.fixed
        found[first if scope != "ffn" else always] += cost.attention
        found[last if scope != "attn" else always] += cost.ffn
        found[always] += cost.adapter if count else 0  # hoisted: the code that runs needs it too
        gate += count
    return {place: flops for place, flops in found.items() if flops}


def counted(module: Module) -> dict[Place, float]:
    found = costs(module, main_function(module)).items()
    flops = {place: cost.flops + CONTEXT * cost.key_flops for place, cost in found}
    return {place: value for place, value in flops.items() if value}


@pytest.mark.parametrize("name", GATES)
def test_flops_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    """Experts are conditionals of their own before the passes, and grouped after them."""
    given = CONFIG | {"depth_gate": {"layers": [1, 2], **GATES[name]}}
    config = LiquidConfig.from_dict(given)
    traced = open_model(save_model(tmp_path / "model", given)).trace()
    compiled = run_passes(traced, plan_passes(DEFAULT_PIPELINE, ()), Statistics())
    assert counted(compiled) == by_formula(config)
    on = sum(flops for place, flops in counted(traced).items() if place.ran)
    assert on == sum(by_formula(config).values())


def test_weights_and_keys_of_each_layer(null_engine: Path, model_directory: Path) -> None:
    """Bytes by hand: hidden 32, 4 heads of 8, 2 of them for keys, 2 of 4 experts of width 16."""
    module = open_model(model_directory).trace()
    found = costs(module, main_function(module))
    norms, attention = 2 * 32, 32 * (32 + 16 + 16 + 32)
    layer = 4 * (norms + attention + 4 * 32 + 2 * 3 * 16 * 32)
    width = LiquidConfig.from_dict(CONFIG).router_width
    router = 4 * (width * 32 + width + width)
    for index in (0, 3):
        assert found[Place(index)].weights == layer
    for index, gate in ((1, 0), (2, 1)):
        assert found[Place(index)].weights + found[Place(index, gate)].weights == layer + router
        assert found[Place(index, gate)].key_bytes == 2 * 4 * 2 * 8
    assert found[Place()].weights == 4 * (256 * 32 + 32 + 32)
    info = cost_info(module)
    assert info.always == sum(c.weights for place, c in found.items() if place.gate is None)
    assert info.run == tuple(found[Place(layer, gate)].weights for layer, gate in ((1, 0), (2, 1)))


IR = """module @m {layers = 2}

weight @h.1.w : f32[6, 4] = tensor("h.1.w", f32[6, 4])

func @prefill(%x: f32[B, T, 4], %k: f32[B, 4, T]) -> (y: f32[B, T, 6], s: f32[B, T, T]) {
  %w = weight weight="h.1.w" : f32[6, 4]
  %y = linear %x, %w : f32[B, T, 6]
  %s = matmul %x, %k : f32[B, T, T]
  return %y, %s
}
"""


def test_products_of_any_function() -> None:
    """A product with one key for each column is paid by key; names tell the layer."""
    module = parse_module(IR)
    found = costs(module, module.functions["prefill"])
    assert found == {
        Place(1): Cost(weights=4 * 24, flops=2 * 24),
        Place(): Cost(key_flops=2 * 4),
    }


def test_codes_are_counted_as_what_is_read_of_them(model_directory: Path) -> None:
    """Half a byte and a scale of 4 bytes for 16 elements; only the experts that a token uses."""
    traced = open_model(model_directory).trace()
    quantize = "quantize{scheme=int4,block=16,head=float}"
    before, after = (
        run_passes(traced, plan_passes([*DEFAULT_PIPELINE, *names], ()), Statistics())
        for names in ([], [quantize, "eliminate-dead"])
    )
    floats, codes = (costs(module, main_function(module)) for module in (before, after))
    assert counted(after) == counted(before)
    products = 32 * (32 + 16 + 16 + 32) + 2 * 3 * 16 * 32
    for place in (Place(0), Place(3)):
        assert floats[place].weights - codes[place].weights == products * (4 - 0.5 - 4 / 16)
    for layer, gate in ((1, 0), (2, 1)):
        places = (Place(layer), Place(layer, gate))
        old, new = (sum(found[p].weights for p in places) for found in (floats, codes))
        assert old - new == products * (4 - 0.5 - 4 / 16)
    assert floats[Place()] == codes[Place()]

"""`quantize` on generated modules: what a module computes whose weights are the rounded ones."""

from __future__ import annotations

import random
from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidc.ir import Module, ops, parse_module, print_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.quantised import Grid, dequantise
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import materialize
from liquidc.passes.base import PassContext
from liquidc.passes.quantize import Quantize
from liquidc.passes.registry import PASSES
from tests.generator.modules import Example, example
from tests.generator.test_properties import EXAMPLES, FEW, MANY

BEFORE = ("fold-constants", "stack-experts", "group-experts", "fuse-linear")
SCHEMES = ("int8", "int4", "fp8")


def changed(made: Example, rng: random.Random) -> tuple[Module, Module, dict[str, Grid]]:
    """The module before and after the pass, and what was to be quantised."""
    before, scheme = made.module.clone(), rng.choice(SCHEMES)
    for step in BEFORE:
        PASSES[step]().run(before, Statistics())
    symmetric = scheme == "fp8" or rng.random() < 0.5
    with patch("liquidc.passes.quantize.LEAST", 2):  # generated rows are short
        head = rng.choice(("same", "float"))
        step = Quantize(scheme, rng.choice((0, -1, 2)), symmetric, head=head)
        grids, after = step.grids(before, PassContext()), before.clone()
        step.run(after, statistics := Statistics())
    assert set(statistics.facts["quantize"]["weights"]) == set(grids)
    return before, after, grids


def elsewhere(module: Module, names: set[str]) -> set[str]:
    """Those of these weights that are still read as floats."""
    return {op.weight for op in module.walk() if isinstance(op, ops.Weight)} & names


def check(made: Example, seed: int) -> None:
    before, after, grids = changed(made, random.Random(seed))
    verify(after)
    text = print_module(after)
    assert print_module(parse_module(text)) == text
    if elsewhere(after, set(grids)):
        return
    old, new = Interpreter(before, made), Interpreter(after, made)
    for name, grid in grids.items():
        parts = grid.parts(before.weights[name])
        read = {kind: materialize(part, made) for kind, part in parts.items()}
        old.weights[name] = dequantise(
            read["codes"], read["scales"], read.get("zeros"), grid.format
        )
    for function, _, inputs in made.calls:
        wanted, got = old.run(function, inputs), new.run(function, inputs)
        assert wanted.keys() == got.keys()
        for key, value in got.items():
            assert value.numpy().tobytes() == wanted[key].numpy().tobytes(), key


@FEW
@given(EXAMPLES, st.integers(0, 99))
def test_the_same_as_with_rounded_weights(made: Example, seed: int) -> None:
    check(made, seed)


@pytest.mark.slow
@MANY
@given(EXAMPLES, st.integers(0, 99))
def test_the_same_as_with_rounded_weights_on_many(made: Example, seed: int) -> None:
    check(made, seed)


def test_weights_in_every_place_are_quantised() -> None:
    places = Counter[str]()
    for seed in range(40):
        _, after, _ = changed(example(random.Random(seed)), random.Random(seed))
        for op in after.walk():
            if isinstance(op, ops.Dequantize):
                places.update(type(user).__name__ for user in op.y.uses)
            if isinstance(op, ops.If) and any(isinstance(o, ops.Dequantize) for o in op.then.ops):
                places["arm"] += 1
    assert min(places[name] for name in ("Linear", "GroupedExperts", "arm")) >= 5

"""`quantize-cache` on generated modules: what a module computes that rounds its keys and values."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liquidc.ir import Module, Op, ops, parse_module, print_module, verify
from liquidc.ir.interpreter import Frame, Interpreter
from tests.generator.modules import Example, Inputs, coded, float_example
from tests.generator.test_properties import FEW, MANY

SEEDS = st.integers(0, 10**6)


def scales(made: Example) -> dict[str, torch.Tensor]:
    """By the argument that a cache begins as."""
    return {
        name.removeprefix("calibrated/").removesuffix(".scale"): tensor
        for name, tensor in made.tensors.items()
        if name.startswith("calibrated/")
    }


@dataclass(slots=True, kw_only=True)
class Rounding(Interpreter):
    """Rounds what is appended to a cache; keeps floats."""

    scales: dict[str, torch.Tensor]
    names: dict[int, str] = field(default_factory=dict)

    def _op(self, op: Op, frame: Frame) -> Sequence[torch.Tensor]:
        if not isinstance(op, ops.Append | ops.AppendRows):
            return Interpreter._op(self, op, frame)
        new, scale = frame.values[op.new], self.scales[op.cache.name]
        steps = torch.clamp(torch.round(new / scale), -128, 127)
        frame.values[op.new] = torch.where(steps.isnan(), 0.0, steps) * scale
        outputs = Interpreter._op(self, op, frame)
        frame.values[op.new] = new
        return outputs


def check(seed: int) -> None:
    before = float_example(random.Random(seed))
    after = coded(before, random.Random(seed))
    verify(after.module)
    text = print_module(after.module)
    assert print_module(parse_module(text)) == text
    known = scales(after)
    old = Rounding(before.module, before, scales=known)
    new = Interpreter(after.module, after)
    for function, _, inputs in after.calls:
        wanted = old.run(function, as_floats(inputs, known, "past."))
        got = as_floats(new.run(function, inputs), known, "present.")
        assert wanted.keys() == got.keys()
        for name, value in got.items():
            # A zero that was rounded may have lost its sign.
            same = (value + 0).numpy().tobytes() == (wanted[name] + 0).numpy().tobytes()
            assert same or (value.dtype == torch.bool and torch.equal(value, wanted[name])), name


def as_floats(values: Inputs, known: dict[str, torch.Tensor], prefix: str) -> Inputs:
    """Codes made floats again."""
    return {
        name: value * known[name.replace(prefix, "past.", 1)][:, None]
        if value.dtype == torch.int8 and name.startswith(prefix)
        else value
        for name, value in values.items()
    }


@FEW
@given(SEEDS)
def test_the_same_as_with_rounded_keys_and_values(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@MANY
@given(SEEDS)
def test_the_same_as_with_rounded_keys_and_values_of_many(seed: int) -> None:
    check(seed)


def test_caches_in_every_place_hold_codes() -> None:
    places = Counter[str]()
    for seed in range(40):
        module: Module = coded(float_example(random.Random(seed)), random.Random(seed)).module
        for op in module.walk():
            if isinstance(op, ops.Append | ops.AppendRows):
                assert op.scale is not None
                places[type(op).__name__] += 1
            if isinstance(op, ops.Attend | ops.AttendRows):
                assert None not in (op.key_scale, op.value_scale)
                places[type(op).__name__] += 1
            if isinstance(op, ops.If) and any(isinstance(o, ops.Append) for o in op.then.ops):
                places["arm"] += 1
    assert min(places[n] for n in ("Append", "AppendRows", "Attend", "AttendRows", "arm")) >= 5

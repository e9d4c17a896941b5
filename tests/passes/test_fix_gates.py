"""`fix-gates`: gates decided at compile time, their layers and caches gone or unconditional."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import Module, ops, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.eliminate_dead import EliminateDead
from liquidc.passes.fix_gates import FixGates
from liquidc.passes.hoist_common import HoistCommon
from tests.generator.modules import Example, example
from tests.passes.filecheck import Rewritten, assert_idempotent, assert_unchanged, run_pass

TEXT = """
module @m {gates = 1, layers = 2}
weight @w : f32[8, 8] = tensor("w", f32[8, 8])
weight @k : f32[4, 8] = tensor("k", f32[4, 8])
func @prefill(%x: f32[B, T, 8], %score: f32[B, T], %valid: bool[B, T], %positions: i64[B, T],
    %force: i8[], %bias: f32[B], %floor: i64[B], %executed: i64[B, T], %length: i64[B],
    %past.0.key: f32[B, 1, S, 4], %past.0.value: f32[B, 1, S, 4])
    -> (y: f32[B, T, 8], gates: bool[B, T], gate_p: f32[B, T],
    present.0.key: f32[B, 1, S, 4], present.0.value: f32[B, 1, S, 4]) {
  %m, %p = depth_gate %score, %valid, %positions, %force, %bias, %floor, %executed,
      layer=0, gate=0, remaining=2, threshold=0.5 : bool[B, T], f32[B, T]
  %any = any %m, dims=[0, 1] : bool[]
  %k = weight weight="k" : f32[4, 8]
  %flat = linear %x, %k : f32[B, T, 4]
  %new = reshape %flat, shape=["B", "T", 1, 4] : f32[B, T, 1, 4]
  %keys = append %past.0.key, %new, %length, %valid : f32[B, 1, S, 4]
  %values = append %past.0.value, %new, %length, %valid : f32[B, 1, S, 4]
  %y = if %any, label="layer0" : f32[B, T, 8] {
    %w = weight weight="w" : f32[8, 8]
    %h = linear %x, %w : f32[B, T, 8]
    %wide = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %zero = constant value=[0.0] : f32[]
    %kept = where %wide, %h, %zero : f32[B, T, 8]
    %sum = add %x, %kept : f32[B, T, 8]
    yield %sum
  } else {
    yield %x
  }
  return %y, %m, %p, %keys, %values
}
"""


@dataclass(frozen=True)
class Then(Pass):
    """A pass and then `eliminate-dead`."""

    step: FixGates
    name = "then"
    contract = "lossy"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        self.step.run(module, statistics, context)
        EliminateDead().run(module, statistics)


def fixed(gates: str, text: str = TEXT) -> Rewritten:
    return run_pass(Then(FixGates(gates=gates)), text)


def test_never() -> None:
    fixed("0").check("""
        CHECK-NOT: weight @
        CHECK: func @prefill
        CHECK-SAME: -> (y: f32[B, T, 8], gates: bool[B, T], gate_p: f32[B, T]) {
        CHECK-NEXT: %m, %p = fixed_gate %valid, layer=0, gate=0, run=false, threshold=0.5
        CHECK-NEXT: return %x, %m, %p
    """)
    assert "past.0" not in fixed("0").text


def test_always() -> None:
    fixed("1").check("""
        CHECK: %p = fixed_gate %valid, layer=0, gate=0, run=true, threshold=0.5
        CHECK-NOT: if
        CHECK: %h = linear %x, %w
        CHECK: %wide = reshape %valid
        CHECK: %kept = where %wide, %h, %zero
        CHECK: return %{{.*}}, %valid, %p
    """)


def test_a_free_gate_stays() -> None:
    assert_unchanged(FixGates(gates="."), TEXT)
    for gates in "01":
        assert_idempotent(FixGates(gates=gates), TEXT)


def test_a_cache_that_is_read_stays() -> None:
    read = TEXT.replace(
        "  return %y,",
        "  %limit = add %positions, %positions : i64[B, T]\n"
        '  %q = reshape %x, shape=["B", "T", 2, 4] : f32[B, T, 2, 4]\n'
        "  %seen = attend %q, %keys, %values, %limit, scale=0.5 : f32[B, T, 2, 4]\n  return %y,",
    )
    assert "present.0.key" in fixed("0", read).text


def test_a_probability_that_scales_the_result_keeps_its_gate() -> None:
    scaled = TEXT.replace(
        "    %sum = add %x, %kept",
        '    %s = reshape %p, shape=["B", "T", 1] : f32[B, T, 1]\n'
        "    %kept2 = mul %kept, %s : f32[B, T, 8]\n    %sum = add %x, %kept2",
    )
    rewritten = assert_unchanged(FixGates(gates="1"), scaled)
    told = rewritten.statistics.facts["fix-gates"]
    assert told["refused"] == {"0": "its probability scales the layer's result"}


def test_refusals() -> None:
    with pytest.raises(InputError, match="needs a profile"):
        run_pass(FixGates(), TEXT)
    with pytest.raises(InputError, match="a digit 0, 1 or a dot"):
        FixGates(gates="x")
    with pytest.raises(InputError, match="1 digits for 2 gates"):
        fixed("0", TEXT.replace("gate=0,", "gate=1,"))
    with pytest.raises(InputError, match="shares of tokens"):
        FixGates(never=0.5, always=0.4)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_forcing_the_gate(seed: int) -> None:
    """A fixed gate is the gate with `gate_force`."""
    made: Example = example(random.Random(seed))
    module = made.module.clone()
    HoistCommon().run(module, Statistics())
    count = sum(isinstance(op, ops.DepthGate) for op in module.functions["prefill"].body.walk())
    digits = "".join(random.Random(seed).choice("01.") for _ in range(count))
    after, statistics = module.clone(), Statistics()
    FixGates(gates=digits).run(after, statistics)
    verify(after)
    told = statistics.facts["fix-gates"] if count else {"refused": {}}
    for function, _, inputs in made.calls:
        forced = dict(inputs)
        force = forced["gate_force"].clone()
        for gate, digit in enumerate(digits):
            if digit != "." and str(gate) not in told["refused"]:
                force[gate] = 1 if digit == "1" else -1
        # The floor would run what a removed layer can no longer: leave it out.
        forced["min_depth"] = torch.zeros_like(inputs["min_depth"])
        old = Interpreter(module, made).run(function, {**forced, "gate_force": force})
        args = {arg.name for arg in after.functions[function].args}
        given = {name: x for name, x in forced.items() if name in args}
        new = Interpreter(after, made).run(function, given)
        assert set(new) <= set(old)
        for name, value in new.items():
            if not name.startswith("gate_p"):
                assert torch.equal(old[name], value), name

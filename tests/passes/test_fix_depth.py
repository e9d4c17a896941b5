"""`fix-depth`: masked functions, functions of one path, and when a layer can't be masked."""

from __future__ import annotations

import random

import pytest
import torch

from liquidc.errors import InputError, UnsupportedError
from liquidc.ir import Module, ops, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.fix_depth import ON_PATH, FixDepth, straight_line
from liquidc.passes.gate_arms import gates_of
from tests.generator.check import assert_same, first_row
from tests.generator.modules import Example, example
from tests.passes.filecheck import assert_idempotent, run_pass

TEXT = """
module @m
weight @w : f32[8, 8] = tensor("w", f32[8, 8])
func @prefill(%x: f32[B, T, 8], %m: bool[B, T]) -> (y: f32[B, T, 8]) {
  %zero = constant value=[0.0] : f32[]
  %any = any %m, dims=[0, 1] : bool[]
  %y = if %any, label="layer1" : f32[B, T, 8] {
    %w = weight weight="w" : f32[8, 8]
    %h = linear %x, %w : f32[B, T, 8]
    %wide = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %kept = where %wide, %h, %zero : f32[B, T, 8]
    %sum = add %x, %kept : f32[B, T, 8]
    yield %sum
  } else {
    yield %x
  }
  return %y
}
"""


def test_a_masked_arm_needs_no_conditional() -> None:
    assert_idempotent(FixDepth(), TEXT)
    run_pass(FixDepth(), TEXT).check("""
        CHECK: func @prefill
        CHECK-NOT: if
        CHECK: %h = linear %x, %w
        CHECK: %kept = where %wide, %h, %zero
        CHECK: %sum = add %x, %kept
        CHECK-NEXT: return %sum
    """)


def test_an_adapter_of_skipped_tokens_may_stand_in_both_arms() -> None:
    adapted = TEXT.replace(
        "    %kept = where %wide, %h, %zero : f32[B, T, 8]\n"
        "    %sum = add %x, %kept : f32[B, T, 8]\n",
        "    %other = tanh %x : f32[B, T, 8]\n    %sum = where %wide, %h, %other : f32[B, T, 8]\n",
    ).replace("    yield %x\n", "    %skipped = tanh %x : f32[B, T, 8]\n    yield %skipped\n")
    assert "if" not in run_pass(FixDepth(), adapted).text.split("func")[1]
    with pytest.raises(UnsupportedError, match="layer1: can't be computed without control flow"):
        run_pass(FixDepth(), adapted.replace("%skipped = tanh", "%skipped = silu"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("where %wide, %h, %zero", "where %wide, %zero, %h"),
        ("add %x, %kept", "add %x, %h"),
        ("    yield %x\n", "    %n = neg %x : f32[B, T, 8]\n    yield %n\n"),
    ],
)
def test_arms_that_differ_for_skipped_tokens_are_refused(old: str, new: str) -> None:
    with pytest.raises(UnsupportedError, match="result 0 of a skipped token is not shown"):
        run_pass(FixDepth(), TEXT.replace(old, new))


def test_options() -> None:
    with pytest.raises(InputError, match="paths is 0 or more"):
        FixDepth(paths=-1)


@pytest.mark.parametrize("seed", range(60))
def test_a_path_computes_one_token_and_says_whether_the_gates_agree(seed: int) -> None:
    made: Example = example(random.Random(seed))
    function = made.module.functions["prefill"]
    gates = gates_of(function)
    if not gates or any(isinstance(op, ops.Rows) for op in function.body.walk()):
        return
    rng = random.Random(seed)
    path = "".join(rng.choice("01") for _ in gates)
    fixed = straight_line(function, path)
    module = Module("path", {fixed.name: fixed}, made.module.weights)
    verify(module)
    assert not [op for op in fixed.body.ops if isinstance(op, ops.If) and "/" not in op.label]
    for name, _, inputs in made.calls:
        if name != "decode":
            continue
        one = {**first_row(inputs), "lengths": torch.tensor([1])}
        one["position_start"] += 5  # no reserved tokens
        one["min_depth"] = torch.tensor([0])
        for right in (True, False):
            force = torch.tensor([1 if digit == "1" else -1 for digit in path])
            if not right:
                force[rng.randrange(len(path))] *= -1
            one["gate_force"] = torch.nn.functional.pad(
                force, (0, len(inputs["gate_force"]) - len(path))
            ).to(torch.int8)
            new = Interpreter(module, made).run(fixed.name, one)
            assert bool(new.pop(ON_PATH)) == right
            if right:
                old = Interpreter(made.module, made).run("decode", one)
                for key, value in old.items():
                    assert_same(value, new[key], key)


def test_statistics_name_the_paths() -> None:
    statistics = Statistics()
    for seed in range(40):
        made = example(random.Random(seed))
        try:
            FixDepth().run(made.module.clone(), statistics, PassContext(made.profile))
        except UnsupportedError:
            continue
    assert statistics.fired["path"] > 0
    assert statistics.fired["fix-depth"] > 0

"""`specialize-depth`: layers that always run, straight-line code for a hot path, and its guard."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import parse_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.specialize_depth import SpecializeDepth, best_run
from liquidc.passes.speculate import HIT, TRIED
from liquidc.profile import MARGINS, GateProfile, Paths, Profile, ProfiledModel
from tests.generator.check import assert_same, first_row
from tests.generator.modules import Example, example
from tests.passes.filecheck import Rewritten, assert_idempotent, assert_unchanged, run_pass

LAYER = """
  %first.{n} = slice %x, dim=2, start=0, stop=1 : f32[B, T, 1]
  %score.{n} = reshape %first.{n}, shape=["B", "T"] : f32[B, T]
  %m{n}, %p{n} = depth_gate %score.{n}, %valid, %positions, %force{n}, %bias, %floor, %executed,
      layer={n}, gate={n}, remaining=2, threshold=0.5 : bool[B, T], f32[B, T]
  %any{n} = any %m{n}, dims=[0, 1] : bool[]
  %y{n}, %keys{n} = if %any{n}, label="layer{n}" : f32[B, T, 8], f32[B, 1, S, 4] {
    %w.{n} = weight weight="w" : f32[8, 8]
    %h.{n} = linear %x, %w.{n} : f32[B, T, 8]
    %k.{n} = slice %h.{n}, dim=2, start=0, stop=4 : f32[B, T, 4]
    %new.{n} = reshape %k.{n}, shape=["B", "T", 1, 4] : f32[B, T, 1, 4]
    %keys.{n} = append %past.{n}.key, %new.{n}, %length, %m{n} : f32[B, 1, S, 4]
    %wide.{n} = reshape %m{n}, shape=["B", "T", 1] : bool[B, T, 1]
    %zero.{n} = constant value=[0.0] : f32[]
    %kept.{n} = where %wide.{n}, %h.{n}, %zero.{n} : f32[B, T, 8]
    %sum.{n} = add %x, %kept.{n} : f32[B, T, 8]
    yield %sum.{n}, %keys.{n}
  } else {
    yield %x, %past.{n}.key
  }
"""
CONTROLS = (
    "%valid: bool[B, T], %positions: i64[B, T], %force0: i8[], %force1: i8[], "
    "%bias: f32[B], %floor: i64[B], %executed: i64[B, T], %length: i64[B]"
)
TEXT = (
    'module @m {gates = 2, layers = 2}\nweight @w : f32[8, 8] = tensor("w", f32[8, 8])\n'
    f"func @prefill(%x: f32[B, T, 8], {CONTROLS}, %past.0.key: f32[B, 1, S, 4],"
    " %past.1.key: f32[B, 1, S, 4]) -> (y: f32[B, T, 8],"
    " present.0.key: f32[B, 1, S, 4], present.1.key: f32[B, 1, S, 4]) {"
    + LAYER.replace("{n}", "0")
    + LAYER.replace("{n}", "1").replace("%x", "%y0")
    + "  return %y1, %keys0, %keys1\n}\n"
)


def profile(**paths: int) -> PassContext:
    """What a profile says of two gates: tokens by path, `p10=3`."""
    counts = {name[1:]: count for name, count in paths.items()}
    tokens = sum(counts.values())
    runs = [sum(n for path, n in counts.items() if path[gate] == "1") for gate in range(2)]
    margins = (tokens, *(0 for _ in MARGINS))
    return PassContext(
        Profile(
            ProfiledModel("0" * 64, "m", 2),
            tokens,
            {"1" * 64: tokens},
            tuple(GateProfile(n, 0.5, run, margins, 0, 0) for n, run in enumerate(runs)),
            ((0, 0, 0, tokens),),
            Paths.of(2, counts),
        )
    )


def specialised(step: SpecializeDepth, context: PassContext) -> Rewritten:
    assert_idempotent(step, TEXT, context)
    return run_pass(step, TEXT, context)


def test_a_layer_that_always_runs_has_no_conditional_and_keeps_its_gate() -> None:
    rewritten = specialised(SpecializeDepth(hot=1.0), profile(p11=98, p10=1, p01=1))
    rewritten.check("""
        CHECK: %m0, %p0 = depth_gate
        CHECK-NOT: if
        CHECK: %keys{{.*}} = append %past.0.key, %{{.*}}, %length, %m0
        CHECK: %kept.0 = where
        CHECK: %m1, %p1 = depth_gate
        CHECK-NOT: if
        CHECK: return
    """)
    assert rewritten.statistics.facts["specialize-depth"]["always"] == [0, 1]


def test_a_layer_that_runs_less_keeps_its_conditional() -> None:
    context = profile(p11=40, p10=20, p01=20, p00=40)
    assert_unchanged(SpecializeDepth(), TEXT, context)


def test_a_hot_path_is_tried_checked_and_committed() -> None:
    rewritten = specialised(SpecializeDepth(), profile(p10=90, p11=5, p00=5))
    rewritten.check("""
        CHECK: present.1.key: f32[B, 1, S, 4], path_tried: bool[], path_hit: bool[])
        CHECK: %m0, %p0 = depth_gate
        CHECK: %[[HIT:[a-z0-9_.]+]], {{.*}} = if %{{.*}}, label="path"
        CHECK: linear
        CHECK: depth_gate
        CHECK: broadcast %new.0, shape=["B", "T", 1, 4]
        CHECK: } else {
        CHECK-NEXT: constant value=[false]
        CHECK: if %[[HIT]], label="path/commit"
        CHECK-NEXT: append %past.0.key
        CHECK-NEXT: yield
        CHECK: } else {
        CHECK: if %{{.*}}, label="layer0"
        CHECK: if %{{.*}}, label="layer1"
        CHECK: return
    """)
    told = rewritten.statistics.facts["specialize-depth"]
    assert (told["path"], told["path_gates"]) == ("10", [0, 1])
    assert told["miss_rate"] == pytest.approx(5 / 95)


def test_gates_that_agree_are_one_check() -> None:
    """Two gates that both run or both skip: whichever is more frequent is the path."""
    rewritten = run_pass(SpecializeDepth(), TEXT, profile(p00=60, p11=40))
    assert rewritten.statistics.facts["specialize-depth"]["path"] == "00"
    assert rewritten.statistics.facts["specialize-depth"]["miss_rate"] == 0


def test_no_path_is_taken_that_misses_too_often() -> None:
    assert_unchanged(SpecializeDepth(), TEXT, profile(p10=75, p11=15, p00=15))
    assert "path" in run_pass(SpecializeDepth(hot=0.8), TEXT, profile(p10=75, p11=15, p00=15)).text


def test_the_longest_run_of_gates_wins_then_the_most_frequent() -> None:
    record = profile(p00=1).profile
    assert record is not None
    wide = Paths(4, {"0111": 90, "0110": 4, "1000": 6})
    record = dataclasses.replace(record, paths=wide)
    assert best_run([0, 1, 2, 3], record, 0.9) == (0, "0111", 90 / 94)
    assert best_run([0, 1, 2, 3], record, 0.97) == (0, "011", 1.0)
    assert best_run([0], record, 0.0) is None


def test_gates_whose_conditionals_do_not_follow_one_another_are_refused() -> None:
    """Both gates decide before the first layer: there is no second decision to check."""
    second = LAYER.replace("{n}", "1").replace("%x", "%y0")
    gate, _ = second.split("  %any1")
    early = TEXT.replace(gate, "\n").replace("  %any0", gate.replace("%y0", "%x") + "  %any0")
    refused = assert_unchanged(SpecializeDepth(), early, profile(p10=90, p00=10))
    assert refused.refused("hot-path") == "the gates do not follow one another"


def test_an_arm_that_is_not_masked_keeps_its_conditional() -> None:
    unmasked = TEXT.replace("%sum.0 = add %x, %kept.0", "%sum.0 = add %x, %h.0")
    refused = run_pass(SpecializeDepth(hot=1.0), unmasked, profile(p11=98, p10=1, p01=1))
    assert 'label="layer0"' in refused.text
    assert 'label="layer1"' not in refused.text
    told = refused.statistics.facts["specialize-depth"]["refused"]
    assert told == {"0": "result 0 of a skipped token is not shown to be the other arm's"}


def test_a_profile_is_needed_and_must_fit() -> None:
    with pytest.raises(InputError, match=r"specialize-depth.*profile"):
        run_pass(SpecializeDepth(), TEXT)
    with pytest.raises(InputError, match="from 0 to 1"):
        SpecializeDepth(hot=2)
    three = parse_module(TEXT.replace("gate=1", "gate=2"))
    with pytest.raises(InputError, match="2 gates, not 3"):
        SpecializeDepth().run(three, Statistics(), profile(p11=1))


def test_paths_cut_short_leave_the_module_alone() -> None:
    context = profile(p11=1)
    assert context.profile is not None
    short = dataclasses.replace(context.profile, paths=Paths(1, {"1": 1}))
    assert_unchanged(SpecializeDepth(), TEXT, PassContext(short))


@pytest.mark.parametrize("seed", range(40))
def test_hits_and_misses_are_told_apart(seed: int) -> None:
    """One token under every forced decision: results as without, and the guard says which."""
    made: Example = example(random.Random(seed))
    module = made.module.clone()
    step = SpecializeDepth(always=1.0, hot=0.0)
    statistics = Statistics()
    step.run(module, statistics, PassContext(made.profile))
    verify(module)
    told = statistics.facts[step.name]
    if not told["path"]:
        return
    for name, _, inputs in made.calls:
        if name != "decode":
            continue
        one = {**first_row(inputs), "lengths": torch.tensor([1])}
        one["position_start"] += 5  # no reserved tokens
        one["min_depth"] = torch.tensor([0])
        gates = len(inputs["gate_force"])
        for digits in range(2 ** len(told["path"])):
            path = f"{digits:0{len(told['path'])}b}"
            force = torch.zeros(gates, dtype=torch.int8)
            for gate, digit in zip(told["path_gates"], path, strict=True):
                force[gate] = 1 if digit == "1" else -1
            one["gate_force"] = force
            old = Interpreter(made.module, made).run("decode", one)
            new = Interpreter(module, made).run("decode", one)
            tried, hit = bool(new.pop(TRIED)), bool(new.pop(HIT))
            assert tried == (path[0] == told["path"][0])
            assert hit == (path == told["path"])
            for key, value in old.items():
                assert_same(value, new[key], key)

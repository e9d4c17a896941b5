"""stack-experts, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.stack_experts import StackExperts
from tests.passes.experts import INPUT, OUTPUT, chain, region
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = StackExperts()
GATED = OUTPUT.replace("silu %h{e}", "mul %h{e}, %x")
MIXED = INPUT.replace("silu %h{e}", "mul %h{e}, %x")
OTHER = OUTPUT.replace("silu", "neg")


def test_a_chain_becomes_one_op_over_the_stacked_weight() -> None:
    text = chain(region(0, "total"), region(1, "y0"), region(2, "y1"))
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @w0.stacked : f32[3, 4, 4] = tensor("w", f32[3, 4, 4])
        CHECK: func
        CHECK-NOT: if
        CHECK: [[W:%[\\w.]+]] = weight weight="w0.stacked"
        CHECK: %y2 = map_experts %x, %index, %share, [[[W]]] :
        CHECK-SAME: (%tokens: f32[B, T, 4], %param0: f32[4, 4])
        CHECK-NEXT: [[H:%\\w+]] = linear %tokens, %param0
        CHECK-NEXT: [[S:%\\w+]] = silu [[H]]
        CHECK-NEXT: yield [[S]]
        CHECK: return %y2
    """)


def test_weights_are_stacked_in_the_order_of_the_experts() -> None:
    text = chain(region(0, "total"), region(1, "y0")).replace('tensor("w"', 'tensor("v"', 1)
    run_pass(STEP, text).check("""
        CHECK: @w0.stacked : f32[2, 4, 4] =
        CHECK-SAME: stack([select(tensor("v", {{.*}}), 0), select(tensor("w", {{.*}}), 1)])
    """)


def test_a_weight_on_the_input_is_applied_to_the_input() -> None:
    text = chain(region(0, "total", INPUT), region(1, "y0", INPUT))
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: map_experts %x, %index, %share, {{.*}}, apply="input"
        CHECK-NEXT: [[H:%\\w+]] = linear %tokens, %param0
        CHECK-NEXT: [[S:%\\w+]] = silu [[H]]
        CHECK-NEXT: yield [[S]]
    """)


def test_a_chain_that_a_conditional_uses_twice_still_stacks() -> None:
    after = """
  %c = any %m0, dims=[0, 1] : bool[]
  %after = if %c, label="layer1" : f32[B, T, 4] {
    %twice = add %y1, %y1 : f32[B, T, 4]
    %more = neg %y1 : f32[B, T, 4]
    %sum = add %twice, %more : f32[B, T, 4]
    yield %sum
  } else {
    yield %x
  }"""
    text = chain(region(0, "total"), region(1, "y0"), after, result="after")
    run_pass(STEP, text).check('CHECK: map_experts\nCHECK: if %c, label="layer1"')


def test_a_body_may_read_the_tokens_twice() -> None:
    text = chain(region(0, "total", GATED), region(1, "y0", GATED))
    run_pass(STEP, text).check("""
        CHECK: [[H:%\\w+]] = linear %tokens, %param0
        CHECK-NEXT: mul [[H]], %tokens
    """)


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ((region(0, "total"),), "there is only one expert"),
        ((region(0, "total", expert=1), region(1, "y0", expert=0)), "experts are not in order"),
        ((region(0, "total"), region(1, "y0", skip="total")), "there is only one expert"),
        ((region(0, "total"), region(1, "y0", OTHER)), "the bodies differ at neg"),
        ((region(0, "total"), region(1, "y0", INPUT)), "the tokens differ"),
        ((region(0, "total", MIXED), region(1, "y0", MIXED)), "the body reads more than"),
    ],
)
def test_a_chain_that_differs_somewhere_stays(regions: tuple[str, ...], reason: str) -> None:
    assert reason in assert_unchanged(STEP, chain(*regions)).refused("stack-experts")


def test_a_chain_that_does_not_start_at_zero_is_no_chain() -> None:
    text = chain(region(0, "total"), region(1, "y0"), start=1.0)
    assert not +assert_unchanged(STEP, text).statistics.fired


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("any %m1, dims=[0, 1] : bool[]", "constant value=[true] : bool[]", "condition is not any"),
        ("mul %s1, %r1", "mul %s1, %h1", "no weight of the expert is applied"),
        ("%share, expert=1", "%share, expert=0", "no weight of the expert is applied"),
        ("%t1 = add", "%t1 = sub", "the region does not add to a total"),
        ("where %k1, %o1, %z1", "add %o1, %z1", "what is added is not masked"),
        ("%z1 = constant value=[0.0]", "%z1 = constant value=[2.0]", "elsewhere is not 0"),
        ("reshape %m1,", "reshape %m0,", "the mask is another one"),
        ("linear %x, %w1", "linear %total, %w1", "the tokens differ"),
        ("silu %h1", "silu %x", "the bodies differ"),
    ],
)
def test_a_region_that_differs_in_a_part_is_refused(old: str, new: str, reason: str) -> None:
    text = chain(region(0, "total"), region(1, "y0"))
    assert text.count(old) == 1
    changed = text.replace(old, new)
    assert reason in assert_unchanged(STEP, changed).refused("stack-experts")


def test_weights_that_only_one_expert_shares_are_refused() -> None:
    twice = OUTPUT.replace("silu %h{e}", "linear %h{e}, %{w}")
    second = region(1, "y0", twice).replace("linear %h1, %w1", "linear %h1, %u")
    second = second.replace("%w1 = weight", '%u = weight weight="w2" : f32[4, 4]\n    %w1 = weight')
    text = chain(region(0, "total", twice), second)
    reason = assert_unchanged(STEP, text).refused("stack-experts")
    assert reason == "weights are shared differently"

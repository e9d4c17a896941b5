"""fold-identity-experts, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.fold_identity_experts import FoldIdentityExperts
from liquidc.passes.stack_experts import StackExperts
from tests.passes.experts import INPUT, chain, region
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = FoldIdentityExperts()
NAME = STEP.name
SAME = "\n    %o{e} = mul %x, %r{e} : f32[B, T, 4]"
"""The body of an identity expert."""


def same(e: int, total: str, **changes: int) -> str:
    return region(e, total, SAME, **changes)


REAL = region(0, "total") + region(1, "y0")
MIXED = chain(REAL, same(2, "y1"), same(3, "y2"), count=4, result="y3")


def test_regions_without_weights_become_one_product() -> None:
    assert_idempotent(STEP, MIXED)
    run_pass(STEP, MIXED).check("""
        CHECK: %y0 = if
        CHECK: %y1 = if
        CHECK-NOT: if
        CHECK: [[A:%\\w+]] = constant value=[2] : i64[]
        CHECK-NEXT: [[G:%\\w+]] = ge %index, [[A]] : bool[B, T, 2]
        CHECK-NEXT: [[B:%\\w+]] = constant value=[3] : i64[]
        CHECK-NEXT: [[L:%\\w+]] = le %index, [[B]] : bool[B, T, 2]
        CHECK-NEXT: [[O:%\\w+]] = and [[G]], [[L]]
        CHECK-NEXT: [[Z:%\\w+]] = constant value=[0.0]
        CHECK-NEXT: [[W:%\\w+]] = where [[O]], %share, [[Z]] : f32[B, T, 2]
        CHECK-NEXT: [[S:%\\w+]] = sum [[W]], dims=[2], keep=true : f32[B, T, 1]
        CHECK-NEXT: [[P:%\\w+]] = mul %x, [[S]] : f32[B, T, 4]
        CHECK-NEXT: %y3 = add %y1, [[P]] : f32[B, T, 4]
        CHECK-NEXT: return %y3
    """)


@pytest.mark.parametrize("real", [REAL, region(0, "total", INPUT) + region(1, "y0", INPUT)])
def test_the_experts_before_them_are_left_to_be_stacked(real: str) -> None:
    text = chain(real, same(2, "y1"), count=3, result="y2")
    refused = assert_unchanged(StackExperts(), text).refused("stack-experts")
    assert refused == "the body reads more than the tokens and its weights"
    run_pass(StackExperts(), run_pass(STEP, text).text).check("""
        CHECK: %y1 = map_experts %x, %index, %share,
        CHECK: %y2 = add %y1,
    """)


def test_a_share_of_another_type_than_the_tokens_is_cast() -> None:
    text = MIXED.replace("f32[B, T, 4]", "f64[B, T, 4]").replace("f32[4, 4]", "f64[4, 4]")
    text = text.replace("f32[4, 4, 4]", "f64[4, 4, 4]").replace("value=[0.0] : f32[]", "Z")
    text = text.replace("Z", "value=[0.0] : f64[]")
    for e in range(4):
        text = text.replace(f"= reshape %v{e}, ", f"= cast %q{e}, to=f64 : f64[B, T, 1]~%v{e}, ")
        head, _, tail = text.partition(f"    %r{e} = cast")
        line, _, rest = tail.partition("\n")
        cast, _, reshape = line.partition("~")
        text = f"{head}    %q{e} = reshape {reshape}\n    %r{e} = cast{cast}\n{rest}"
    run_pass(STEP, text).check("""
        CHECK: [[S:%\\w+]] = sum {{.*}} : f32[B, T, 1]
        CHECK-NEXT: [[C:%\\w+]] = cast [[S]], to=f64 : f64[B, T, 1]
        CHECK-NEXT: mul %x, [[C]] : f64[B, T, 4]
    """)


def test_numbers_that_are_not_in_a_row_are_folded_apart() -> None:
    text = chain(same(0, "total"), same(1, "y0", expert=5), count=2)
    found = run_pass(STEP, text)
    assert found.statistics.fired[NAME] == 2
    found.check("""
        CHECK: [[A:%\\w+]] = constant value=[0] : i64[]
        CHECK: %y0 = add %total,
        CHECK: constant value=[5] : i64[]
        CHECK: %y1 = add %y0,
    """)


def test_regions_of_other_tokens_are_folded_apart() -> None:
    text = chain(same(0, "total"), same(1, "y0"), count=2).replace("%o1 = mul %x", "%o1 = mul %y0")
    found = run_pass(STEP, text)
    assert found.statistics.fired[NAME] == 2
    found.check("CHECK: mul %x,\nCHECK: mul %y0,")


def test_a_total_that_is_used_between_two_regions_stays() -> None:
    between = "\n  %n = neg %y0 : f32[B, T, 4]"
    text = chain(same(0, "total"), between, same(1, "y0"), count=2, result="y1")
    text = text.replace("return %y1", "%z = add %y1, %n : f32[B, T, 4]\n  return %z")
    assert run_pass(STEP, text).statistics.fired[NAME] == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("any %m0, dims=[0, 1] : bool[]", "constant value=[true] : bool[]", "condition is not any"),
        ("%o0 = mul %x, %r0", "%o0 = mul %x, %x", "the last product is no weight's"),
        ("%o0 = mul %x, %r0", "%o0 = neg %x", "no weight of the expert is applied"),
        ("%share, expert=0", "%share, expert=1", "the last product is no weight's"),
        ("weight %index, %share", "weight %other, %share", "the last product is no weight's"),
        ("%t0 = add", "%t0 = sub", "the region does not add to a total"),
        ("%z0 = constant value=[0.0]", "%z0 = constant value=[2.0]", "elsewhere is not 0"),
        ("yield %total", "yield %x", "skipping changes the total"),
    ],
)
def test_another_form_stays(old: str, new: str, reason: str) -> None:
    text = chain(same(0, "total"), count=1).replace("%share:", "%other: i64[B, T, 2], %share:")
    assert text.count(old) == 1
    assert reason in assert_unchanged(STEP, text.replace(old, new)).refused(NAME)


def test_an_expert_that_computes_something_stays() -> None:
    reason = assert_unchanged(STEP, chain(REAL, count=2, result="y1")).refused(NAME)
    assert reason == "the expert computes something"

"""hoist-common, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.errors import InputError
from liquidc.passes.hoist_common import HoistCommon
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = HoistCommon()
OWN = """
module @m
weight @k : f32[4, 8] = tensor("k", f32[4, 8])
func @f(%c: bool[], %v: bool[B, T], %n: i64[B], %x: f32[B, T, 8], %past: f32[B, 1, S, 4])
    -> (y: f32[B, T, 8], present: f32[B, 1, S, 4]) {
  %w = weight weight="k" : f32[4, 8]
  %y, %present = if %c, label="layer1" : f32[B, T, 8], f32[B, 1, S, 4] {
    %a = silu %x : f32[B, T, 8]
    %k1 = linear %x, %w : f32[B, T, 4]
    %r1 = reshape %k1, shape=["B", "T", 1, 4] : f32[B, T, 1, 4]
    %p1 = append %past, %r1, %n, %v : f32[B, 1, S, 4]
    yield %a, %p1
  } else {
    %k2 = linear %x, %w : f32[B, T, 4]
    %r2 = reshape %k2, shape=["B", "T", 1, 4] : f32[B, T, 1, 4]
    %p2 = append %past, %r2, %n, %v : f32[B, 1, S, 4]
    yield %x, %p2
  }
  return %y, %present
}
"""


def test_what_both_arms_compute_moves_above_with_its_chain() -> None:
    assert_idempotent(STEP, OWN)
    rewritten = run_pass(STEP, OWN)
    assert rewritten.statistics.fired == {"hoist-common": 3, "outer-result": 1}
    rewritten.check("""
        CHECK: %k1 = linear %x, %w
        CHECK-NEXT: %r1 = reshape %k1
        CHECK-NEXT: %p1 = append %past, %r1, %n, %v
        CHECK-NEXT: %y = if %c, label="layer1" : f32[B, T, 8] {
        CHECK-NEXT: %a = silu %x
        CHECK-NEXT: yield %a
        CHECK-NEXT: } else {
        CHECK-NEXT: yield %x
        CHECK-NEXT: }
        CHECK-NEXT: return %y, %p1
    """)


def test_appends_stay_in_the_arms_on_request() -> None:
    step = HoistCommon(append="arm")
    assert_idempotent(step, OWN)
    run_pass(step, OWN).check("""
        CHECK: %r1 = reshape
        CHECK-NEXT: %y, %present = if
        CHECK: append %past, %r1, %n, %v
        CHECK: else
        CHECK: append %past, %r1, %n, %v
    """)


def test_an_unknown_place_for_appends_is_an_input_error() -> None:
    with pytest.raises(InputError, match="append is above or arm, not 'below'"):
        HoistCommon(append="below")


def test_inner_conditionals_come_first() -> None:
    text = """
module @m
func @f(%c: bool[], %d: bool[], %x: f32[4]) -> (y: f32[4]) {
  %y = if %c : f32[4] {
    %z = if %d : f32[4] {
      %a = silu %x : f32[4]
      yield %a
    } else {
      %b = silu %x : f32[4]
      yield %b
    }
    yield %z
  } else {
    %e = silu %x : f32[4]
    yield %e
  }
  return %y
}
"""
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: [[A:%\\w+]] = silu %x
        CHECK-NEXT: return [[A]]
    """)


def arms(then: str, otherwise: str) -> str:
    return f"""
module @m
func @f(%c: bool[], %m: bool[B, T], %x: f32[B, T]) -> (y: f32[B, T]) {{
  %y = if %c : f32[B, T] {{{then}
  }} else {{{otherwise}
  }}
  return %y
}}
"""


@pytest.mark.parametrize(
    ("then", "otherwise"),
    [
        ("%a = silu %x : f32[B, T]\n yield %a", "%b = neg %x : f32[B, T]\n yield %b"),
        (
            "%a = silu %x : f32[B, T]\n %b = neg %a : f32[B, T]\n yield %b",
            "%d = exp %x : f32[B, T]\n %e = neg %d : f32[B, T]\n yield %e",
        ),
        (
            '%r = rows %m, dim="N0" : i64[N0]\n %u = gather_rows %x, %r : f32[N0]\n'
            " %a = scatter_rows %x, %r, %u : f32[B, T]\n yield %a",
            '%s = rows %m, dim="N1" : i64[N1]\n yield %x',
        ),
        ("yield %x", "%b = neg %x : f32[B, T]\n yield %b"),
    ],
)
def test_what_differs_or_depends_on_the_arm_stays(then: str, otherwise: str) -> None:
    assert not +assert_unchanged(STEP, arms(then, otherwise)).statistics.fired


def test_two_twins_in_one_arm_follow_the_hoisted_op() -> None:
    text = arms(
        "%a = silu %x : f32[B, T]\n yield %a",
        "%b = silu %x : f32[B, T]\n %d = silu %x : f32[B, T]\n %e = add %b, %d : f32[B, T]\n"
        " yield %e",
    )
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: %a = silu %x
        CHECK-NEXT: if
        CHECK-NEXT: yield %a
        CHECK: add %a, %a
    """)

"""eliminate-dead, by FileCheck."""

from __future__ import annotations

from liquidc.passes.eliminate_dead import EliminateDead
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = EliminateDead()


def test_chains_regions_and_weights_that_nobody_uses_go() -> None:
    text = """
module @m
weight @used : f32[4, 4] = tensor("used", f32[4, 4])
weight @dead : f32[4, 4] = tensor("dead", f32[4, 4])
func @f(%c: bool[], %x: f32[2, 4]) -> (y: f32[2, 4]) {
  %w = weight weight="used" : f32[4, 4]
  %d = weight weight="dead" : f32[4, 4]
  %a = linear %x, %d : f32[2, 4]
  %b = if %c : f32[2, 4] {
    %e = silu %a : f32[2, 4]
    yield %e
  } else {
    yield %a
  }
  %y = linear %x, %w : f32[2, 4]
  return %y
}
"""
    assert_idempotent(STEP, text)
    rewritten = run_pass(STEP, text)
    assert rewritten.statistics.fired["unused-weight"] == 1
    rewritten.check("""
        CHECK: weight @used
        CHECK-NOT: dead
        CHECK: %w = weight
        CHECK-NEXT: %y = linear %x, %w
        CHECK-NEXT: return %y
    """)


def test_unused_results_of_a_conditional_go_with_what_they_need() -> None:
    text = """
module @m
func @f(%c: bool[], %x: f32[4]) -> (y: f32[4]) {
  %p, %q, %r = if %c, label="layer0" : f32[4], f32[4], f32[4] {
    %a = silu %x : f32[4]
    %b = neg %a : f32[4]
    yield %a, %b, %x
  } else {
    %d = exp %x : f32[4]
    yield %x, %d, %x
  }
  %y = add %p, %r : f32[4]
  return %y
}
"""
    assert_idempotent(STEP, text)
    rewritten = run_pass(STEP, text)
    assert rewritten.statistics.fired["unused-result"] == 1
    rewritten.check("""
        CHECK: %p, %r = if %c, label="layer0" : f32[4], f32[4] {
        CHECK-NEXT: %a = silu %x
        CHECK-NEXT: yield %a, %x
        CHECK-NEXT: } else {
        CHECK-NEXT: yield %x, %x
        CHECK: add %p, %r
    """)


def test_an_op_with_one_used_result_stays_whole() -> None:
    rewritten = assert_unchanged(
        STEP,
        """
module @m
func @f(%s: f32[B, T, 4], %m: bool[B, T]) -> (y: i64[B, T, 2]) {
  %i, %w = route %s, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
  return %i
}
""",
    )
    assert not +rewritten.statistics.fired


def test_a_value_that_only_a_nested_block_uses_stays() -> None:
    assert_unchanged(
        STEP,
        """
module @m
func @f(%c: bool[], %x: f32[4]) -> (y: f32[4]) {
  %a = silu %x : f32[4]
  %y = if %c : f32[4] {
    %z = if %c : f32[4] {
      yield %a
    } else {
      yield %x
    }
    yield %z
  } else {
    yield %x
  }
  return %y
}
""",
    )

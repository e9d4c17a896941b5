"""eliminate-common, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.eliminate_common import EliminateCommon
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = EliminateCommon()


def test_equal_ops_become_one_and_chains_follow() -> None:
    text = """
module @m
func @f(%x: f32[4]) -> (y: f32[4]) {
  %a = silu %x : f32[4]
  %b = neg %a : f32[4]
  %c = silu %x : f32[4]
  %d = neg %c : f32[4]
  %y = add %b, %d : f32[4]
  return %y
}
"""
    assert_idempotent(STEP, text)
    rewritten = run_pass(STEP, text)
    assert rewritten.statistics.fired["eliminate-common"] == 2
    rewritten.check("""
        CHECK: %a = silu %x
        CHECK-NEXT: %b = neg %a
        CHECK-NEXT: %y = add %b, %b
        CHECK-NEXT: return %y
    """)


def test_an_arm_reuses_what_is_outside_but_not_the_other_arm() -> None:
    text = """
module @m
func @f(%c: bool[], %x: f32[4]) -> (y: f32[4]) {
  %a = silu %x : f32[4]
  %y = if %c : f32[4] {
    %b = silu %x : f32[4]
    %d = neg %b : f32[4]
    yield %d
  } else {
    %e = neg %a : f32[4]
    yield %e
  }
  %f = neg %a : f32[4]
  %g = add %y, %f : f32[4]
  return %g
}
"""
    assert_idempotent(STEP, text)
    rewritten = run_pass(STEP, text)
    assert rewritten.statistics.fired["eliminate-common"] == 1
    rewritten.check("""
        CHECK: %a = silu %x
        CHECK-NEXT: if %c
        CHECK-NEXT: %d = neg %a
        CHECK: %e = neg %a
        CHECK: %f = neg %a
    """)


@pytest.mark.parametrize(
    ("first", "second", "type"),
    [
        ("rms_norm %x, eps=1e-06", "rms_norm %x, eps=1e-05", "f32[2, 2]"),
        ("transpose %x, perm=[0, 1]", "transpose %x, perm=[1, 0]", "f32[2, 2]"),
        ("sub %x, %z", "sub %z, %x", "f32[2, 2]"),
        ("cast %x, to=f32", "cast %z, to=f32", "f32[2, 2]"),
        (
            "constant value=[0.0, 1.0, 0.0, 0.0]",
            "constant value=[-0.0, 1.0, 0.0, 0.0]",
            "f32[2, 2]",
        ),
        ("layer_norm %x, weight=%w, eps=0.1", "layer_norm %x, bias=%w, eps=0.1", "f32[2, 2]"),
    ],
)
def test_ops_that_differ_in_anything_stay_apart(first: str, second: str, type: str) -> None:
    assert_unchanged(
        STEP,
        f"""
module @m
func @f(%x: f32[2, 2], %z: f32[2, 2], %w: f32[2]) -> (y: f32[2, 2]) {{
  %a = {first} : {type}
  %b = {second} : {type}
  %y = add %a, %b : {type}
  return %y
}}
""",
    )


def test_constants_of_another_type_stay_apart() -> None:
    assert_unchanged(
        STEP,
        """
module @m
func @f(%x: i64[1]) -> (a: i64[1], b: i32[1]) {
  %a = constant value=[1] : i64[1]
  %b = constant value=[1] : i32[1]
  return %a, %b
}
""",
    )


def test_conditionals_and_run_time_dimensions_are_not_merged() -> None:
    assert_unchanged(
        STEP,
        """
module @m
func @f(%c: bool[], %m: bool[B, T], %x: f32[4]) -> (a: f32[4], b: f32[4], r: i64[N0], s: i64[N1]) {
  %a = if %c : f32[4] {
    yield %x
  } else {
    yield %x
  }
  %b = if %c : f32[4] {
    yield %x
  } else {
    yield %x
  }
  %r = rows %m, dim="N0" : i64[N0]
  %s = rows %m, dim="N1" : i64[N1]
  return %a, %b, %r, %s
}
""",
    )

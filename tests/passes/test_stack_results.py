"""stack-results, by FileCheck."""

from __future__ import annotations

from liquidc.passes.stack_results import StackResults
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = StackResults()
LENGTHS = """
module @m
func @f(%kv: i64[2, B], %a: bool[B, T], %b: bool[B, T]) -> (y: i64[2, B]) {
  %s0 = slice %kv, dim=0, start=0, stop=1 : i64[1, B]
  %k0 = reshape %s0, shape=["B"] : i64[B]
  %s1 = slice %kv, dim=0, start=1, stop=2 : i64[1, B]
  %k1 = reshape %s1, shape=["B"] : i64[B]
  %c0 = cast %a, to=i64 : i64[B, T]
  %n0 = sum %c0, dims=[1] : i64[B]
  %l0 = add %k0, %n0 : i64[B]
  %c1 = cast %b, to=i64 : i64[B, T]
  %n1 = sum %c1, dims=[1] : i64[B]
  %l1 = add %k1, %n1 : i64[B]
  %r0 = reshape %l0, shape=[1, "B"] : i64[1, B]
  %r1 = reshape %l1, shape=[1, "B"] : i64[1, B]
  %y = concat [%r0, %r1], dim=0 : i64[2, B]
  return %y
}
"""


def test_lengths_of_all_layers_are_added_at_once() -> None:
    assert_idempotent(STEP, LENGTHS)
    run_pass(STEP, LENGTHS).check("""
        CHECK: %[[A:.+]] = reshape %a, shape=[1, "B", "T"]
        CHECK: %[[B:.+]] = reshape %b, shape=[1, "B", "T"]
        CHECK: %[[M:.+]] = concat [%[[A]], %[[B]]], dim=0 : bool[2, B, T]
        CHECK-NEXT: %[[C:.+]] = cast %[[M]], to=i64
        CHECK-NEXT: %[[N:.+]] = sum %[[C]], dims=[2] : i64[2, B]
        CHECK-NEXT: %[[Y:.+]] = add %kv, %[[N]] : i64[2, B]
        CHECK-NEXT: return %[[Y]]
    """)


def test_what_every_layer_adds_alike_is_one_row() -> None:
    text = LENGTHS.replace("%l1 = add %k1, %n1", "%l1 = add %k1, %n0")
    run_pass(STEP, text).check("""
        CHECK: %[[N:.+]] = reshape %n0, shape=[1, "B"]
        CHECK-NEXT: %[[Y:.+]] = add %kv, %[[N]] : i64[2, B]
        CHECK-NEXT: return %[[Y]]
    """)


def test_probabilities_are_the_sigmoid_of_all_scores() -> None:
    gate = (
        "depth_gate %s{0}, %v, %p, %f, %w, %d, %e, layer={0}, gate={0}, remaining=2, threshold=0.5"
        " : bool[B, T], f32[B, T]"
    )
    text = f"""
module @m
func @f(%s0: f32[B, T], %s1: f32[B, T], %v: bool[B, T], %p: i64[B, T], %f: i8[], %w: f32[B],
        %d: i64[B], %e: i64[B, T]) -> (y: f32[2, B, T]) {{
  %g0, %p0 = {gate.format(0)}
  %g1, %p1 = {gate.format(1)}
  %r0 = reshape %p0, shape=[1, "B", "T"] : f32[1, B, T]
  %r1 = reshape %p1, shape=[1, "B", "T"] : f32[1, B, T]
  %y = concat [%r0, %r1], dim=0 : f32[2, B, T]
  return %y
}}
"""
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: %[[S:.+]] = concat [{{.+}}], dim=0 : f32[2, B, T]
        CHECK-NEXT: %[[Y:.+]] = sigmoid %[[S]] : f32[2, B, T]
        CHECK-NEXT: return %[[Y]]
    """)


def test_a_broadcast_addition_stays() -> None:
    text = """
module @m
func @f(%a: i64[B], %b: i64[B, 3], %c: i64[]) -> (y: i64[2, B]) {
  %n = sum %b, dims=[1] : i64[B]
  %l0 = add %a, %c : i64[B]
  %l1 = add %n, %c : i64[B]
  %r0 = reshape %l0, shape=[1, "B"] : i64[1, B]
  %r1 = reshape %l1, shape=[1, "B"] : i64[1, B]
  %y = concat [%r0, %r1], dim=0 : i64[2, B]
  return %y
}
"""
    assert_unchanged(STEP, text)


def test_rows_in_another_order_are_no_whole_tensor() -> None:
    swapped = LENGTHS.replace("start=0, stop=1", "start=9, stop=9").replace(
        "start=1, stop=2", "start=0, stop=1"
    )
    text = swapped.replace("start=9, stop=9", "start=1, stop=2")
    run_pass(STEP, text).check("""
        CHECK: %[[K:.+]] = concat [{{.+}}], dim=0 : i64[2, B]
        CHECK: add %[[K]]
    """)

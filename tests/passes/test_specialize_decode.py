"""specialize-decode, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.errors import InputError
from liquidc.passes.specialize_decode import SpecializeDecode
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

ANY, ONE = SpecializeDecode(), SpecializeDecode(batch=1)
BODY = """(%m: bool[B, T], %n: i64[B], %x: f32[B, T, 4]) -> (y: f32[B, T, 4], l: i64[B, T]) {
  %i = cast %m, to=i64 : i64[B, T]
  %s = cumsum %i, dim=1 : i64[B, T]
  %t = iota dim="T" : i64[T]
  %flat = reshape %x, shape=["B*T", 4] : f32[B*T, 4]
  %back = reshape %flat, shape=["B", "T", 4] : f32[B, T, 4]
  %c = any %m, dims=[0, 1] : bool[]
  %y = if %c, label="layer0" : f32[B, T, 4] {
    %h = silu %back : f32[B, T, 4]
    %k = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %z = constant value=[0.0] : f32[]
    %w = where %k, %h, %z : f32[B, T, 4]
    yield %w
  } else {
    %k2 = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %h2 = neg %back : f32[B, T, 4]
    %w2 = where %k2, %h2, %x : f32[B, T, 4]
    yield %w2
  }
  %l = add %s, %t : i64[B, T]
  return %y, %l
}
"""
TEXT = f"module @m\nfunc @prefill{BODY}\nfunc @decode{BODY}"


def test_decode_takes_one_token_a_row_and_prefill_any() -> None:
    assert_idempotent(ANY, TEXT)
    run_pass(ANY, TEXT).check("""
        CHECK: func @prefill(%m: bool[B, T], %n: i64[B], %x: f32[B, T, 4])
        CHECK: cumsum
        CHECK: func @decode(%m: bool[B, 1], %n: i64[B], %x: f32[B, 1, 4])
        CHECK-NOT: cumsum
        CHECK: iota dim=1 : i64[1]
        CHECK: reshape %x, shape=["B", 4] : f32[B, 4]
        CHECK: any %m, dims=[0, 1]
        CHECK: where {{%\\w+}}, %h, %z : f32[B, 1, 4]
        CHECK: where {{%\\w+}}, %h2, %x
    """)


def test_with_one_row_the_mask_is_known_in_both_arms() -> None:
    assert_idempotent(ONE, TEXT)
    run_pass(ONE, TEXT).check("""
        CHECK: func @decode(%m: bool[1, 1], %n: i64[1], %x: f32[1, 1, 4])
        CHECK: if {{%\\w+}}, label="layer0"
        CHECK: [[H:%\\w+]] = silu
        CHECK-NOT: where
        CHECK: yield [[H]]
        CHECK: else
        CHECK-NOT: where
        CHECK: yield %x
    """)


def test_a_mask_that_does_not_decide_is_not_known() -> None:
    text = TEXT.replace("any %m", "any %q").replace(
        "(%m: bool[B, T]", "(%m: bool[B, T], %q: bool[B, T]"
    )
    run_pass(ONE, text).check("CHECK: @decode\nCHECK: where\nCHECK: where")


def test_a_conditional_over_all_of_several_tokens_leaves_the_mask_unknown() -> None:
    text = TEXT.replace("bool[B, T]", "bool[B, 2]").replace("i64[B, T]", "i64[B, 2]")
    text = text.replace('"B", "T", 1] : bool[B, T, 1]', '"B", 2, 1] : bool[B, 2, 1]')
    text = text.replace('dim="T" : i64[T]', "dim=2 : i64[2]").replace("B, T, 4]", "B, 2, 4]")
    text = text.replace('"B*T", 4] : f32[B*T, 4]', '"2*B", 4] : f32[2*B, 4]')
    text = text.replace('shape=["B", "T", 4]', 'shape=["B", 2, 4]')
    rewritten = run_pass(ONE, text)
    assert rewritten.statistics.fired["specialize-decode"] == 0
    assert rewritten.refused("sum-of-one") == "there are several elements"
    rewritten.check("CHECK: @decode\nCHECK: cumsum\nCHECK: where\nCHECK: where")


def test_a_module_without_decode_stays() -> None:
    assert_unchanged(ANY, f"module @m\nfunc @prefill{BODY}")


def test_another_batch_is_an_input_error() -> None:
    with pytest.raises(InputError, match="batch is 0 \\(any\\) or 1, not 4"):
        SpecializeDecode(batch=4)

"""fuse-linear, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.fuse_linear import FuseLinear
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = FuseLinear()
WEIGHTS = """
module @m
weight @l.q.weight : f32[4, 2] = tensor("q", f32[4, 2])
weight @l.k.weight : f32[3, 2] = tensor("k", f32[3, 2])
weight @l.q.bias : f32[4] = tensor("qb", f32[4])
weight @l.k.bias : f32[3] = tensor("kb", f32[3])
"""
READ = """
  %q = weight weight="l.q.weight" : f32[4, 2]
  %k = weight weight="l.k.weight" : f32[3, 2]
  %qb = weight weight="l.q.bias" : f32[4]
  %kb = weight weight="l.k.bias" : f32[3]
"""


def pair(first: str, second: str, args: str = "%x: f32[B, T, 2], %z: f32[B, T, 2]") -> str:
    return f"""{WEIGHTS}
func @f({args}) -> (a: f32[B, T, 4], b: f32[B, T, 3]) {{{READ}
  %a = linear {first} : f32[B, T, 4]
  %b = linear {second} : f32[B, T, 3]
  return %a, %b
}}
"""


def test_two_projections_become_one_in_their_order() -> None:
    text = pair("%x, %q", "%x, %k")
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @l.q.weight.and.k : f32[7, 2] = 
        CHECK-SAME: concat([tensor("q", {{.*}}), tensor("k", {{.*}})], 0)
        CHECK: [[W:%\\w+]] = weight weight="l.q.weight.and.k"
        CHECK-NEXT: [[Y:%\\w+]] = linear %x, [[W]] : f32[B, T, 7]
        CHECK-NEXT: %a = slice [[Y]], dim=2, start=0, stop=4
        CHECK-NEXT: %b = slice [[Y]], dim=2, start=4, stop=7
        CHECK-NEXT: return %a, %b
    """)


def test_biases_are_put_together_too() -> None:
    run_pass(STEP, pair("%x, %q, bias=%qb", "%x, %k, bias=%kb")).check("""
        CHECK: concat([tensor("qb", f32[4]), tensor("kb", f32[3])], 0)
        CHECK: linear %x, {{%\\w+}}, bias={{%\\w+}} : f32[B, T, 7]
    """)


@pytest.mark.parametrize(
    ("first", "second", "args", "reason"),
    [
        ("%x, %q, bias=%qb", "%x, %k", "", "some have a bias and some have none"),
        ("%x, %u", "%x, %k", ", %u: f32[4, 2]", "a factor is no weight"),
        ("%x, %q, bias=%u", "%x, %k, bias=%kb", ", %u: f32[4]", "a bias is no weight"),
    ],
)
def test_projections_that_are_not_alike_stay(
    first: str, second: str, args: str, reason: str
) -> None:
    text = pair(first, second, "%x: f32[B, T, 2]" + args)
    assert assert_unchanged(STEP, text).refused("fuse-linear") == reason


def test_projections_of_two_operands_stay() -> None:
    assert not +assert_unchanged(STEP, pair("%x, %q", "%z, %k")).statistics.fired


def test_projections_of_two_blocks_stay() -> None:
    assert_unchanged(
        STEP,
        f"""{WEIGHTS}
func @f(%c: bool[], %x: f32[B, T, 2]) -> (y: f32[B, T, 4]) {{{READ}
  %a = linear %x, %q : f32[B, T, 4]
  %y = if %c : f32[B, T, 4] {{
    %b = linear %x, %q, bias=%qb : f32[B, T, 4]
    yield %b
  }} else {{
    yield %a
  }}
  return %y
}}
""",
    )


ROUTED = f"""{WEIGHTS}
func @f(%x: f32[B, T, 2], %m: bool[B, T]) -> (i: i64[B, T, 1], v: f32[B, T, 3]) {{{READ}
  %s = linear %x, %q : f32[B, T, 4]
  %t = MIDDLE : f32[B, T, 4]
  %i, %w = route %t, %m, k=1 : i64[B, T, 1], f32[B, T, 1]
  %v = linear %x, %k : f32[B, T, 3]
  return %i, %v
}}
"""


@pytest.mark.parametrize(
    "middle", ["tanh %s", "rms_norm %s, eps=1e-05", "sub %s, %qb", "add %s, %qb"]
)
def test_routers_stay_apart(middle: str) -> None:
    assert not +assert_unchanged(STEP, ROUTED.replace("MIDDLE", middle)).statistics.fired


def test_what_a_layer_adds_to_the_state_is_no_router() -> None:
    text = ROUTED.replace("MIDDLE", "add %s, %s")
    assert run_pass(STEP, text).statistics.fired["fuse-linear"] == 1

"""fuse-shared-experts, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.fuse_shared_experts import FuseSharedExperts
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = FuseSharedExperts()
SHAPES = {"r": "[3, 4]", "gu": "[3, 12, 4]", "d": "[3, 4, 6]", "bias": "[4]", "v": "[1, 4]"}
APART = """
  %sg = linear %x, %g : f32[B, T, W]
  %su = linear %x, %u : f32[B, T, W]"""
TOGETHER = """
  %both = linear %x, %b : f32[B, T, 2W]
  %sg = slice %both, dim=2, start=0, stop=W : f32[B, T, W]
  %su = slice %both, dim=2, start=W, stop=2W : f32[B, T, W]"""
TAIL = """
  %a = silu %sg : f32[B, T, W]
  %h = mul %a, %su : f32[B, T, W]
  %o = linear %h, %e : f32[B, T, 4]"""
SHARE = """
  %vx = linear %x, %v : f32[B, T, 1]
  %share = sigmoid %vx : f32[B, T, 1]
  %so = mul %o, %share : f32[B, T, 4]"""


def layer(shared: str, added: str = "%y, %o", *, width: int = 6, apply: str = "") -> str:
    """Three experts of width 6 behind a router, and a shared one."""
    shapes = SHAPES | {"g": "[W, 4]", "u": "[W, 4]", "b": "[2W, 4]", "e": "[4, W]"}
    weights = "".join(f'weight @{n} : f32{s} = tensor("{n}", f32{s})\n' for n, s in shapes.items())
    reads = "".join(f'  %{n} = weight weight="{n}" : f32{s}\n' for n, s in shapes.items())
    text = f"""
module @m
{weights}
func @f(%x: f32[B, T, 4], %z: f32[B, T, 4], %m: bool[B, T])
    -> (s: f32[B, T, 4], experts: i64[B, T, 2]) {{
{reads}
  %l = linear %x, %r : f32[B, T, 3]
  %i, %w = route %l, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
  %y = grouped_experts %x, %i, %w, %gu, %d{apply} : f32[B, T, 4]{shared}
  %s = add {added} : f32[B, T, 4]
  return %s, %i
}}
"""
    return text.replace("2W", str(2 * width)).replace("W", str(width))


def test_one_of_the_same_width_becomes_one_expert_more() -> None:
    text = layer(APART + TAIL)
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @gu.and.shared : f32[4, 12, 4] = concat([tensor("gu", f32[3, 12, 4]),
        CHECK-SAME: stack([concat([tensor("g", f32[6, 4]), tensor("u", f32[6, 4])], 0)])], 0)
        CHECK: weight @d.and.shared : f32[4, 4, 6] = concat([tensor("d", f32[3, 4, 6]),
        CHECK-SAME: stack([tensor("e", f32[4, 6])])], 0)
        CHECK: %i, %w = route %l, %m, k=2
        CHECK-NEXT: [[E:%\\w+]] = constant value=[3] : i64[1]
        CHECK-NEXT: [[N:%\\w+]] = broadcast [[E]], shape=["B", "T", 1]
        CHECK-NEXT: [[I:%\\w+]] = concat [%i, [[N]]], dim=2 : i64[B, T, 3]
        CHECK-NEXT: [[ONE:%\\w+]] = constant value=[1.0] : f32[]
        CHECK-NEXT: [[O:%\\w+]] = broadcast [[ONE]], shape=["B", "T", 1]
        CHECK-NEXT: [[W:%\\w+]] = concat [%w, [[O]]], dim=2 : f32[B, T, 3]
        CHECK-NEXT: [[GU:%\\w+]] = weight weight="gu.and.shared"
        CHECK-NEXT: [[D:%\\w+]] = weight weight="d.and.shared"
        CHECK-NEXT: %s = grouped_experts %x, [[I]], [[W]], [[GU]], [[D]] : f32[B, T, 4]
        CHECK-NEXT: return %s, %i
    """)


def test_a_gated_one_of_twice_the_width_becomes_two_experts_with_its_share() -> None:
    text = layer(APART + TAIL + SHARE, "%so, %y", width=12)
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @gu.and.shared : f32[5, 12, 4] =
        CHECK-SAME: stack([concat([slice(tensor("g", f32[12, 4]), 0, 0, 6),
        CHECK-SAME: slice(tensor("u", f32[12, 4]), 0, 0, 6)], 0),
        CHECK-SAME: concat([slice(tensor("g", f32[12, 4]), 0, 6, 12),
        CHECK-SAME: slice(tensor("u", f32[12, 4]), 0, 6, 12)], 0)])
        CHECK: weight @d.and.shared : f32[5, 4, 6] =
        CHECK-SAME: stack([slice(tensor("e", f32[4, 12]), 1, 0, 6),
        CHECK-SAME: slice(tensor("e", f32[4, 12]), 1, 6, 12)])
        CHECK: [[E:%\\w+]] = constant value=[3, 4] : i64[2]
        CHECK: concat [%i, {{.*}} : i64[B, T, 4]
        CHECK: [[V:%\\w+]] = broadcast %share, shape=["B", "T", 2]
        CHECK-NEXT: concat [%w, [[V]]], dim=2 : f32[B, T, 4]
        CHECK-NOT: mul
        CHECK: %s = grouped_experts
    """)


def test_gate_and_up_may_be_slices_of_one_projection() -> None:
    run_pass(STEP, layer(TOGETHER + TAIL)).check("""
        CHECK: weight @gu.and.shared : f32[4, 12, 4] =
        CHECK-SAME: stack([concat([slice(tensor("b", f32[12, 4]), 0, 0, 6),
        CHECK-SAME: slice(tensor("b", f32[12, 4]), 0, 6, 12)], 0)])
        CHECK-NOT: slice %
        CHECK: %s = grouped_experts
    """)


def test_weights_on_the_input_stay_there() -> None:
    text = layer(APART + TAIL, apply=', apply="input"')
    run_pass(STEP, text).check('CHECK: %s = grouped_experts {{.*}}, apply="input" :')


EXTRA = {
    "%j": "%j = add %i, %i : i64[B, T, 2]",
    "%gn": "%gn = neg %gu : f32[3, 12, 4]",
    "%wn": "%wn = neg %g : f32[6, 4]",
}
"""Further values of the layer, which stand before the sum."""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("silu", "tanh", "the gate's activation is not silu"),
        ("mul %a, %su", "add %a, %su", "no product of gate and up"),
        ("linear %h, %e", "linear %h, %e, bias=%bias", "it has a bias or another width"),
        ("linear %x, %u", "linear %z, %u", "it reads other tokens or has a bias"),
        ("%su = linear %x, %u", "%su = neg %sg", "gate or up is no linear"),
        ("add %y, %o", "add %x, %o", "no experts are added to"),
        ("add %y, %o", "add %y, %x", "what is added ends in no linear"),
        ("add %y, %o", "add %y, %y", "what is added ends in no linear"),
        ("return %s", "return %o", "is used too"),
        ("return %s", "return %y", "is used too"),
        ("%i, %w, %gu", "%j, %w, %gu", "the experts' numbers are no router's"),
        ("%w, %gu", "%w, %gn", "the experts' weights are computed"),
        ("linear %x, %g :", "linear %x, %wn :", "its weights are computed"),
    ],
)
def test_another_form_stays(old: str, new: str, reason: str) -> None:
    text = layer(APART + TAIL)
    assert text.count(old) == 1
    text = text.replace(old, new)
    for name, line in EXTRA.items():
        if name in new:
            text = text.replace("\n  %y =", f"\n  {line}\n  %y =")
    assert reason in assert_unchanged(STEP, text).refused("fuse-shared-experts")


def test_a_projection_that_makes_more_than_gate_and_up_stays() -> None:
    more = "\n  %more = slice %both, dim=2, start=3, stop=7 : f32[B, T, 4]"
    text = layer(TOGETHER + more + TAIL).replace("return %s", "return %more")
    assert "is used too" in assert_unchanged(STEP, text).refused("fuse-shared-experts")


def test_a_width_that_is_no_multiple_is_refused() -> None:
    refused = assert_unchanged(STEP, layer(APART + TAIL, width=8)).refused("fuse-shared-experts")
    assert refused == "its width 8 is no multiple of the experts' 6"


def test_a_share_beside_weights_on_the_input_is_refused() -> None:
    text = layer(APART + TAIL + SHARE, "%y, %so", apply=', apply="input"')
    refused = assert_unchanged(STEP, text).refused("fuse-shared-experts")
    assert refused == "its share would multiply its input, as the experts' weights do"


def test_a_factor_that_is_not_one_number_for_a_token_is_refused() -> None:
    factor = "\n  %so = mul %o, %z : f32[B, T, 4]"
    refused = assert_unchanged(STEP, layer(APART + TAIL + factor, "%y, %so"))
    assert refused.refused("fuse-shared-experts") == "its share is no number for each token"


def test_a_router_of_more_numbers_than_experts_is_refused() -> None:
    text = layer(APART + TAIL).replace("f32[3, 12, 4]", "f32[2, 12, 4]")
    text = text.replace("f32[3, 4, 6]", "f32[2, 4, 6]")
    refused = assert_unchanged(STEP, text).refused("fuse-shared-experts")
    assert refused == "the router knows more experts than there are"

"""group-experts, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.group_experts import GroupExperts
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = GroupExperts()
TOGETHER = """
    %h = linear %e, %gu : f32[B, T, 12]
    %g = slice %h, dim=2, start=0, stop=6 : f32[B, T, 6]
    %u = slice %h, dim=2, start=6, stop=12 : f32[B, T, 6]
    %s = silu %g : f32[B, T, 6]
    %p = mul %s, %u : f32[B, T, 6]
    %o = linear %p, %d : f32[B, T, 4]"""
APART = """
    %g = linear %e, %gw : f32[B, T, 6]
    %u = linear %e, %uw : f32[B, T, 6]
    %s = silu %g : f32[B, T, 6]
    %p = mul %u, %s : f32[B, T, 6]
    %o = linear %p, %d : f32[B, T, 4]"""
PARAMS = {"gu": "[12, 4]", "gw": "[6, 4]", "uw": "[6, 4]", "d": "[4, 6]", "b": "[4]"}


def mapped(body: str, params: str = "gu d", *, apply: str = "", width: int = 4) -> str:
    names = params.split()
    shapes = {name: PARAMS[name].replace("[", "[3, ") for name in names}
    weights = "".join(f'weight @{n} : f32{s} = tensor("{n}", f32{s})\n' for n, s in shapes.items())
    reads = "".join(f'  %w.{n} = weight weight="{n}" : f32{s}\n' for n, s in shapes.items())
    operands = ", ".join(f"%w.{name}" for name in names)
    args = "".join(f", %{name}: f32{PARAMS[name]}" for name in names)
    result = f"f32[B, T, {width}]"
    return f"""
module @m
{weights}
func @f(%x: f32[B, T, 4], %i: i64[B, T, 2], %w: f32[B, T, 2]) -> (y: {result}) {{
{reads}
  %y = map_experts %x, %i, %w, [{operands}]{apply} : {result} (%e: f32[B, T, 4]{args}) {{{body}
    yield %o
  }}
  return %y
}}
"""


def test_swiglu_over_one_projection_becomes_grouped() -> None:
    assert_idempotent(STEP, mapped(TOGETHER))
    run_pass(STEP, mapped(TOGETHER)).check("""
        CHECK-NOT: map_experts
        CHECK: %y = grouped_experts %x, %i, %w, %w.gu, %w.d : f32[B, T, 4]
        CHECK-NEXT: return %y
    """)


def test_swiglu_over_two_projections_joins_gate_then_up() -> None:
    text = mapped(APART, "uw gw d", apply=', apply="input"')
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @gw.gate_up : f32[3, 12, 4] = 
        CHECK-SAME: concat([tensor("gw", {{.*}}), tensor("uw", {{.*}})], 1)
        CHECK: [[W:%\\w+]] = weight weight="gw.gate_up"
        CHECK-NEXT: %y = grouped_experts %x, %i, %w, [[W]], %w.d, apply="input"
    """)


@pytest.mark.parametrize(
    ("body", "old", "new", "reason"),
    [
        (TOGETHER, "silu", "sigmoid", "the gate's activation is not silu"),
        (TOGETHER, "mul %s", "add %s", "no product of gate and up"),
        (TOGETHER, "%o = linear %p, %d", "%q = linear %p, %d", "the body ends in no linear"),
        (TOGETHER, "slice %h, dim=2, start=6, stop=12", "neg %g", "only the gate is a slice"),
        (TOGETHER, "start=6, stop=12", "start=5, stop=11", "not the two halves"),
        (TOGETHER, "slice %h, dim=2, start=0", "slice %t, dim=2, start=0", "no slices of a linear"),
        (TOGETHER, "linear %e, %gu", "linear %n, %gu", "are no plain projection"),
        (APART, "linear %e, %uw", "linear %n, %uw", "no plain projections"),
        (APART, "%u = linear %e, %uw", "%u = silu %g", "gate or up is no linear"),
    ],
)
def test_another_body_stays(body: str, old: str, new: str, reason: str) -> None:
    first = body.splitlines()[1]
    changed = body.replace(old, new)
    if "%n" in new:
        changed = "\n    %n = neg %e : f32[B, T, 4]" + changed
    if "%t" in new:
        changed = changed.replace(first, first + "\n    %t = neg %h : f32[B, T, 12]")
    if "%q" in new:
        changed += "\n    %o = neg %q : f32[B, T, 4]"
    text = mapped(changed, "gu d" if body is TOGETHER else "gw uw d")
    assert reason in assert_unchanged(STEP, text).refused("group-swiglu")


def test_a_bias_is_refused() -> None:
    text = mapped(TOGETHER.replace("%p, %d", "%p, %d, bias=%b"), "gu d b")
    refused = assert_unchanged(STEP, text).refused("group-swiglu")
    assert refused == "the down projection is another"


def test_experts_that_change_the_width_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARAMS, "d", "[5, 6]")
    text = mapped(TOGETHER.replace("%d : f32[B, T, 4]", "%d : f32[B, T, 5]"), width=5)
    refused = assert_unchanged(STEP, text).refused("group-swiglu")
    assert refused == "the experts change the type of the tokens"


def test_gate_and_up_of_two_widths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARAMS, "uw", "[1, 4]")
    text = mapped(APART.replace("%uw : f32[B, T, 6]", "%uw : f32[B, T, 1]"), "gw uw d")
    refused = assert_unchanged(STEP, text).refused("group-swiglu")
    assert refused == "gate and up differ in width"

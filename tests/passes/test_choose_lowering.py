"""`choose-lowering`: what the cost model says is done, told, and heeded by `compact-tokens`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from liquidc.errors import InputError
from liquidc.ir.rewriter import Statistics
from liquidc.machine import DEFAULT, read_table
from liquidc.passes.base import PassContext
from liquidc.passes.choose_lowering import ChooseLowering
from liquidc.passes.compact_tokens import CompactTokens
from tests.passes.filecheck import Rewritten, assert_idempotent, assert_unchanged, run_pass

TEXT = """
module @m {gates = 1, layers = 1}
weight @w : f32[8, 8] = tensor("w", f32[8, 8])
func @prefill(%x: f32[B, T, 8], %score: f32[B, T], %valid: bool[B, T], %positions: i64[B, T],
    %force: i8[], %bias: f32[B], %floor: i64[B], %executed: i64[B, T]) -> (y: f32[B, T, 8]) {
  %m, %p = depth_gate %score, %valid, %positions, %force, %bias, %floor, %executed,
      layer=0, gate=0, remaining=1, threshold=0.5 : bool[B, T], f32[B, T]
  %any = any %m, dims=[0, 1] : bool[]
  %y = if %any, label="layer0", role="gate", gate=0, layer=0, region=0 : f32[B, T, 8] {
    %w = weight weight="w" : f32[8, 8]
    %h = linear %x, %w : f32[B, T, 8]
    %wide = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %zero = constant value=[0.0] : f32[]
    %kept = where %wide, %h, %zero : f32[B, T, 8]
    %sum = add %x, %kept : f32[B, T, 8]
    yield %sum
  } else {
    yield %x
  }
  return %y
}
"""
FREE = replace(
    read_table(DEFAULT), product=(0.0,) * 9, conditional=0.0, op=0.0, find_rows=0.0, move_row=0.0
)


def lowered(rate: float, text: str = TEXT, **times: float) -> Rewritten:
    """The lowering where only the named times are not 0."""
    product = times.pop("product", 0.0)
    table = replace(FREE, product=tuple(product * n for n in FREE.rows), **times)
    context, step = PassContext(machine=table), ChooseLowering(rate=rate)
    assert_idempotent(step, text, context) if "if %any" in run_pass(step, text, context).text else 0
    return run_pass(step, text, context)


def told(rewritten: Rewritten) -> dict[str, object]:
    return rewritten.statistics.facts["choose-lowering"]["gates"][0]


def test_few_tokens_are_computed_alone_where_work_is_dear() -> None:
    lowered(0.1, product=1.0).check("""
        CHECK: if %any, label="layer0", lowering="compact"
    """)


def test_all_tokens_are_computed_where_moving_rows_is_dear() -> None:
    lowered(0.1, product=1.0, find_rows=1e9).check("""
        CHECK: if %any, label="layer0", lowering="branch"
    """)


def test_no_conditional_where_it_costs_more_than_it_saves() -> None:
    lowered(0.9, product=0.001, conditional=1e6).check("""
        CHECK: depth_gate
        CHECK-NOT: if
        CHECK: %kept = where %wide, %h, %zero
        CHECK: return
    """)


def test_an_arm_without_its_mask_keeps_the_conditional() -> None:
    unmasked = TEXT.replace("add %x, %kept", "add %x, %h")
    entry = told(lowered(0.9, unmasked, conditional=1e6, find_rows=1.0))
    assert entry["lowering"] == "branch"
    assert "no mask: result 0 of a skipped token" in str(entry["reason"])
    assert set(entry["us"]) == {"branch", "compact"}  # pyright: ignore


def test_a_function_of_one_token_has_nothing_to_compact() -> None:
    one = TEXT.replace("@prefill", "@decode").replace("B, T", "1, 1").replace('"B", "T"', "1, 1")
    one = one.replace("f32[B]", "f32[1]").replace("i64[B]", "i64[1]")
    entry = told(lowered(0.1, one, product=1.0))
    assert (entry["lowering"], entry["calls"]) == ("branch", "1 call of 1 token")
    assert "compact" not in entry["us"]  # pyright: ignore


def test_what_is_told() -> None:
    entry = told(lowered(0.1, product=1.0))
    assert entry["calls"] == "1 call of 128 tokens and 128 calls of 1 token"
    assert entry["run_rate"] == 0.1
    facts = lowered(0.1).statistics.facts["choose-lowering"]
    assert facts["machine"]["name"] == FREE.name
    assert facts["rates"] == "assumed"


def test_compact_tokens_leaves_a_branch_alone() -> None:
    branch = TEXT.replace('label="layer0"', 'label="layer0", lowering="branch"')
    refused = assert_unchanged(CompactTokens(), branch)
    assert refused.refused("compact-tokens") == "it was chosen to stay a branch"
    compact = TEXT.replace('label="layer0"', 'label="layer0", lowering="compact"')
    assert "gather_rows" in run_pass(CompactTokens(), compact).text


def test_an_unknown_lowering_is_refused() -> None:
    with pytest.raises(Exception, match="lowering is branch or compact, not 'quick'"):
        run_pass(CompactTokens(), TEXT.replace('"layer0"', '"layer0", lowering="quick"'))


def test_options() -> None:
    for wrong in ({"rate": 2}, {"prompt": 0}, {"generated": -1}):
        with pytest.raises(InputError):
            ChooseLowering(**wrong)  # pyright: ignore


def test_without_gates_nothing_is_told() -> None:
    plain = "module @m\nfunc @prefill(%x: f32[B]) -> (y: f32[B]) {\n  return %x\n}\n"
    rewritten = assert_unchanged(ChooseLowering(), plain)
    assert rewritten.statistics.facts == Statistics().facts

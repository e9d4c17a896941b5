"""The helper itself: it fails when it should."""

from __future__ import annotations

import pytest

from liquidc.ir.rewriter import Statistics
from liquidc.passes.eliminate_dead import EliminateDead
from tests.passes.filecheck import assert_idempotent, assert_unchanged, file_check, run_pass

TEXT = """
module @m
func @f(%x: f32[4]) -> (y: f32[4]) {
  %a = silu %x : f32[4]
  %b = neg %x : f32[4]
  return %a
}
"""


def test_a_missing_line_fails_with_the_report() -> None:
    with pytest.raises(AssertionError, match=r"Couldn't match .gelu"):
        file_check(TEXT, "CHECK: gelu")


def test_an_excluded_line_fails() -> None:
    with pytest.raises(AssertionError, match="excluded string found"):
        file_check(TEXT, "CHECK-NOT: silu")


def test_text_without_checks_fails() -> None:
    with pytest.raises(AssertionError, match="No check strings"):
        file_check(TEXT, "silu")


def test_captured_names_are_compared() -> None:
    file_check(TEXT, "CHECK: [[A:%\\w+]] = silu\nCHECK: return [[A]]")
    with pytest.raises(AssertionError):
        file_check(TEXT, "CHECK: [[B:%\\w+]] = neg\nCHECK: return [[B]]")


def test_a_change_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_unchanged(EliminateDead(), TEXT)
    with pytest.raises(AssertionError, match="fired"):
        run_pass(EliminateDead(), TEXT).refused("eliminate-dead")


def test_a_second_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_idempotent(EliminateDead(), TEXT)

    def counts(self: object, module: object, statistics: Statistics, context: object) -> None:
        statistics.fired["again"] += 1

    monkeypatch.setattr(EliminateDead, "apply", counts)
    with pytest.raises(AssertionError):
        assert_idempotent(EliminateDead(), TEXT)

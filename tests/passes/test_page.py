"""docs/passes.md agrees with the passes."""

from __future__ import annotations

from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from tests.passes.page import PAGE, render, row, rule_name, rules_of, summary


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m tests.passes.page`"


def test_every_pass_has_a_row_a_section_and_an_example() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, kind in PASSES.items():
        assert row(name, kind) in text
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert summary(kind) in section
        assert "Before:\n\n```\n" in section
        assert "After:\n\n```\n" in section


def test_every_rule_is_named() -> None:
    rules = [rule for kind in PASSES.values() for rule in rules_of(kind)]
    assert len(rules) >= 7
    assert all(f"* `{rule_name(rule)}`: " in PAGE.read_text(encoding="utf-8") for rule in rules)


def test_every_pass_says_one_sentence_and_no_lossy_one_is_run_unasked() -> None:
    for name, kind in PASSES.items():
        assert kind.name == name
        assert summary(kind).endswith(".")
        assert not (name in DEFAULT_PIPELINE and kind.contract == "lossy")

"""Runs a pass over IR text and compares what it prints with CHECK lines, in this process.

rewritten = run_pass(FoldConstants(), '''...IR...''')
rewritten.check('''
    CHECK: %0 = constant
    CHECK-NOT: add
''')
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import DumpInputKind, Options
from filecheck.parser import Parser, pattern_for_opts

from liquidc.ir import Module, parse_module, print_module, verify
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class Rewritten:
    """A module after a pass, and what the pass did."""

    module: Module
    text: str
    statistics: Statistics

    def check(self, checks: str) -> None:
        """Fail unless the text matches the CHECK lines."""
        file_check(self.text, checks)

    def refused(self, rule: str) -> str:
        """Why `rule` did not fire where it came closest."""
        assert rule not in self.statistics.fired, f"{rule} fired"
        return self.statistics.near_misses[rule].reason


def run_pass(step: Pass, text: str, context: PassContext | None = None) -> Rewritten:
    """Parse and verify `text`, run `step`, verify the result and print it."""
    module = parse_module(text)
    verify(module)
    statistics = Statistics()
    step.run(module, statistics, context)
    verify(module)
    printed = print_module(module)
    assert print_module(parse_module(printed)) == printed
    return Rewritten(module, printed, statistics)


def assert_unchanged(step: Pass, text: str, context: PassContext | None = None) -> Rewritten:
    """Run `step`, which must leave the module as it is; gives its statistics."""
    rewritten = run_pass(step, text, context)
    assert rewritten.text == print_module(parse_module(text))
    return rewritten


def assert_idempotent(step: Pass, text: str, context: PassContext | None = None) -> None:
    """A second run changes nothing and no rule fires in it."""
    once = run_pass(step, text, context)
    again = assert_unchanged(step, once.text, context)
    assert not +again.statistics.fired


def file_check(text: str, checks: str) -> None:
    """Fail, with the matcher's report, unless `text` matches the CHECK lines in `checks`."""
    options = Options("checks", "text", dump_input=DumpInputKind.NEVER)
    parser = Parser(options, io.StringIO(checks), *pattern_for_opts(options))
    matcher = Matcher(options, FInput("text", text), parser)
    matcher.stderr.close()
    matcher.stderr = io.StringIO()
    if matcher.run():
        raise AssertionError(f"{matcher.stderr.getvalue()}\nin:\n{text}")

"""What a pass requires and ensures is checked around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from liquidc.errors import InputError, InternalError
from liquidc.ir import Module, parse_module
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import FACTS, Pass, PassContext
from liquidc.passes.stack_experts import StackExperts
from tests.passes.experts import chain, region

TEXT = chain(region(0, "total"), region(1, "y0"))


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"
    contract: ClassVar[Literal["bitwise", "reassociates"]] = "bitwise"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        statistics.fired["nothing"] += 1


class Needs(Nothing):
    requires = ("no-expert-regions",)


class Promises(Nothing):
    ensures = ("no-expert-regions",)


def test_the_fact_holds_once_experts_are_stacked() -> None:
    module = parse_module(TEXT)
    assert not FACTS["no-expert-regions"](module)
    StackExperts().run(module, Statistics())
    assert FACTS["no-expert-regions"](module)
    Needs().run(module, Statistics())


def test_a_pass_does_not_start_without_what_it_requires() -> None:
    statistics = Statistics()
    with pytest.raises(InputError, match="nothing needs no-expert-regions: run another pass"):
        Needs().run(parse_module(TEXT), statistics)
    assert not statistics.fired


def test_a_pass_that_breaks_its_promise_is_our_error() -> None:
    with pytest.raises(InternalError, match="nothing did not establish no-expert-regions"):
        Promises().run(parse_module(TEXT), Statistics())

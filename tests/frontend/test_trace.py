"""The traced IR, run by the interpreter, against the independent float64 oracle."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.parts import PartTracer
from liquidc.frontend.trace import trace
from liquidc.ir import Module, parse_module, print_module, verify
from liquidc.ir.interpreter import Interpreter
from tests.oracle.drive import Arrays, drive
from tests.oracle.engines import model as built
from tests.oracle.grid import Case, edge_cases, grid
from tests.oracle.reference import assert_matches, reference, tolerance
from tests.traces import export

CASES = {case.name: case for case in (*grid(), *edge_cases())}


class Weights:
    """A weight source over the arrays of a case."""

    def __init__(self, case: Case) -> None:
        self.tensors = {name: torch.from_numpy(w) for name, w in case.weights().items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one tensor."""
        return self.tensors[name][start:stop]


def traced(case: Case) -> Module:
    """The IR of a case's model."""
    with torch.device("meta"):
        model = LiquidForCausalLM(LiquidConfig.from_dict(case.config))
    return trace(model)


@cache
def traced_by_name(name: str) -> Module:
    """The IR of a case, to be cloned before it is changed."""
    return traced(CASES[name])


def stepper(interpreter: Interpreter, function: str) -> Any:
    """`drive`'s step over an interpreter."""

    def step(inputs: Arrays) -> Arrays:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
        return {name: t.numpy() for name, t in interpreter.run(function, tensors).items()}

    return step


@pytest.mark.parametrize("name", CASES)
def test_interpreted_trace_matches_the_oracle(name: str) -> None:
    case = CASES[name]
    module = traced_by_name(name)
    text = print_module(module)
    again = parse_module(text)
    verify(again)
    assert print_module(again) == text
    exact = Interpreter(again, Weights(case), exact=True)
    for expected in reference(case):
        for function, chunk in (("prefill", None), ("prefill", 3), ("decode", 1)):
            outputs = drive(case, expected.batch, stepper(exact, function), chunk)
            assert_matches(expected, outputs, tolerance(case.config, np.float64))
            np.testing.assert_array_equal(outputs["kv_len"], expected.kv_len)
    single = Interpreter(again, Weights(case))
    expected = reference(case)[0]
    outputs = drive(case, expected.batch, stepper(single, "prefill"))
    assert_matches(expected, outputs, tolerance(case.config))


def test_kept_exports_give_the_same_ir(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests' memory of exports rests on; the devices differ too."""
    case = CASES[next(iter(CASES))]
    kept = print_module(trace(built(case)))
    assert print_module(traced(case)) == kept
    monkeypatch.setattr(PartTracer, "export", export)
    assert print_module(traced(case)) == kept
    assert print_module(trace(built(case))) == kept

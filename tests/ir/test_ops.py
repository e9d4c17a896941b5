"""Every op: its example verifies, means what torch computes, refuses operands that don't fit."""

from __future__ import annotations

import pytest
import torch

from liquidc.errors import IRError
from liquidc.ir import DType, TensorType, parse_module, print_module, verify
from liquidc.ir.core import OPS
from liquidc.ir.interpreter import Interpreter
from tests.ir.examples import EXAMPLES, IN_GENERATED


class NoWeights:
    """A source for modules without weights."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise KeyError(name)


def test_every_op_has_an_example() -> None:
    assert {*EXAMPLES, *IN_GENERATED} == OPS.keys()
    assert not EXAMPLES.keys() & IN_GENERATED


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    example = EXAMPLES[name]
    module = example.module()
    verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)) == text
    for seed in range(3):
        inputs = example.inputs(seed)
        got = Interpreter(module, NoWeights()).run("prefill", inputs)
        results = module.functions["prefill"].returned
        for tensor, value in zip(got.values(), results, strict=True):
            assert tensor.dim() == value.type.rank
        if example.compute is not None:
            wanted = example.compute(*inputs.values())
            torch.testing.assert_close(got["y0"], wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_renumber_leaves_negative_numbers_and_wants_a_table_of_experts() -> None:
    module = EXAMPLES["renumber"].module()
    (name,) = EXAMPLES["renumber"].inputs(0)
    index = torch.tensor([[[2, -1], [-1, 0]]])
    got = Interpreter(module, NoWeights()).run("prefill", {name: index})["y0"]
    assert got.tolist() == [[[1, -1], [-1, 2]]]
    for table in ((), (0, -1)):
        module.functions["prefill"].body.ops[0].set_attribute("table", table)
        with pytest.raises(IRError, match="the table must hold the numbers of experts"):
            verify(module)


@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if e.args])
def test_operands_that_do_not_fit(name: str) -> None:
    """No op takes a seven-dimensional operand of an odd type in place of its first one."""
    module = EXAMPLES[name].module()
    function = module.functions["prefill"]
    op = function.body.ops[0]
    if not op.operands:
        return
    verify(module)
    op.operands[0].type = TensorType(DType.I8, (3, 5, 7, 9, 11, 13, 15))
    with pytest.raises(IRError):
        verify(module)

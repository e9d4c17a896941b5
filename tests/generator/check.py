"""What every pass must keep, checked on one example.

A `bitwise` pass is compared in the module's own types, bit by bit. A `reassociates` pass is
compared in float64: decisions and integers exactly, floats within `bound`. No pass but those that
say so may run an arm that was skipped before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from liquidc.errors import UnsupportedError
from liquidc.ir import Module, parse_module, print_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.choose_lowering import ChooseLowering
from liquidc.passes.fix_depth import FixDepth
from liquidc.passes.hoist_common import HoistCommon
from liquidc.passes.registry import PASSES
from liquidc.passes.specialize_decode import SpecializeDecode
from liquidc.passes.specialize_depth import SpecializeDepth
from liquidc.passes.speculate import HIT, TRIED
from tests.generator.identities import Identity, assert_identities, identity
from tests.generator.modules import Example, Inputs

STEPS: dict[str, Pass] = {
    **{name: kind() for name, kind in PASSES.items() if kind.contract != "lossy"},
    "choose-lowering{prompt=100000}": ChooseLowering(prompt=100000),
    "hoist-common{append=arm}": HoistCommon(append="arm"),
    "specialize-decode{batch=1}": SpecializeDecode(batch=1),
    "specialize-depth{hot=0}": SpecializeDepth(always=0.5, hot=0.0),
}
"""Every pass that keeps the results, and those with options once more."""
Outputs = dict[str, torch.Tensor]
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
MARGIN = 16
"""A pass may add this many times the rounding that the module has anyway."""
RUNS_MORE = (ChooseLowering, FixDepth, SpecializeDepth)
"""Passes that may compute, and not use, what was skipped; x + 0 takes a zero's sign there."""


@dataclass(frozen=True)
class Run:
    """Results of a call, and what the conditionals are whose first arm ran."""

    outputs: Outputs
    ran: Counter[Identity]


def run(module: Module, example: Example, function: str, inputs: Inputs, *, exact: bool) -> Run:
    """Interpret a function."""
    interpreter = Interpreter(module, example, exact=exact)
    outputs = interpreter.run(function, inputs)
    return Run(outputs, Counter(identity(op) for op in interpreter.ran if op.role != "path"))


def transformed(step: Pass, example: Example, statistics: Statistics | None = None) -> Module:
    """The module after the pass; valid, and the same after printing and parsing."""
    module = example.module.clone()
    try:
        step.run(module, statistics or Statistics(), PassContext(example.profile, example))
    except UnsupportedError:  # not every module can do without control flow
        return example.module.clone()
    verify(module)
    text = print_module(module)
    if text != print_module(example.module):
        assert print_module(parse_module(text)) == text
    return module


def check(step: Pass, example: Example) -> Example:
    """Assert that the pass keeps its contract on all calls; gives the example after it."""
    after = transformed(step, example)
    assert_identities(step, example.module, after)
    if print_module(after) == print_module(example.module):
        return replace(example, module=after)
    exact = step.contract == "reassociates"
    one_row = isinstance(step, SpecializeDecode) and step.batch == 1
    for function, regime, inputs in example.calls:
        inputs = first_row(inputs) if one_row and function == "decode" else inputs
        old = run(example.module, example, function, inputs, exact=exact)
        new = run(after, example, function, inputs, exact=exact)
        assert [name for name in new.outputs if name not in (TRIED, HIT)] == list(old.outputs)
        if not isinstance(step, RUNS_MORE):
            assert new.ran <= old.ran, f"@{function}, {regime}: {new.ran - old.ran} ran"
        allowed = 0.0
        if exact:
            single = run(example.module, example, function, inputs, exact=False)
            allowed = bound(example.module, old.outputs, single.outputs)
        for name, value in old.outputs.items():
            where = f"@{function}, {regime}: {name}"
            if value.is_floating_point() and exact:
                assert_close(value, new.outputs[name], allowed, where)
            elif value.is_floating_point() and isinstance(step, RUNS_MORE):
                assert_same(value + 0.0, new.outputs[name] + 0.0, where)
            else:
                assert_same(value, new.outputs[name], where)
    return replace(example, module=after)


def bound(module: Module, exact: Outputs, single: Outputs) -> float:
    """How far float64 results may move when sums are ordered differently.

    The error of a float32 run, in units of float32's rounding, says how far the module magnifies
    rounding; a reassociation in float64 adds no more than `MARGIN` times that, plus one rounding
    for every op where the float32 run happens to be right.
    """
    floats = [name for name, value in exact.items() if value.is_floating_point()]
    error = max(float((exact[n] - single[n]).abs().max()) for n in floats)
    size = max(float(exact[name].abs().max()) for name in floats)
    ops = sum(1 for _ in module.walk())
    magnified = MARGIN * error / ROUNDING[torch.float32] + ops * size
    return magnified * ROUNDING[torch.float64]


def assert_close(old: torch.Tensor, new: torch.Tensor, allowed: float, where: str) -> None:
    """Equal shapes and types; elements within `allowed`."""
    assert (old.dtype, old.shape) == (new.dtype, new.shape), where
    difference = float((old - new).abs().max())
    assert difference <= allowed, f"{where} differs by {difference}, more than {allowed}"


def assert_same(old: torch.Tensor, new: torch.Tensor, where: str) -> None:
    """Equal bit by bit."""
    assert (old.dtype, old.shape) == (new.dtype, new.shape), where
    assert old.numpy().tobytes() == new.numpy().tobytes(), f"{where} is not the same"


def first_row(inputs: Inputs) -> Inputs:
    """The batch cut to its first row."""
    whole = {"gate_force": inputs["gate_force"], "kv_len": inputs["kv_len"][:, :1]}
    return {name: x[:1] for name, x in inputs.items()} | whole

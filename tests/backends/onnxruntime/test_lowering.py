"""Each op's lowering, and random modules', against the interpreter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from liquidc.backends.base import Choices
from liquidc.backends.onnxruntime.emit import EMIT, lower, place
from liquidc.backends.weights_file import NAME, write_weights
from liquidc.errors import UnsupportedError
from liquidc.ir import DType, Module, ops, parse_module
from liquidc.ir.core import OPS
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import WeightSource
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from tests.generator.check import ROUNDING, bound
from tests.generator.modules import example as generated
from tests.ir.examples import EXAMPLES

SEEDS = range(60)
OTHERS = (DType.F64, DType.F16, DType.BF16)
"""ONNX Runtime's CPU has few operators in these types; models are compiled in float32."""
FLOAT32 = ROUNDING[torch.float32] / ROUNDING[torch.float64]
"""What turns a bound for reassociated float64 into one for float32."""


def session(
    module: Module, source: WeightSource, directory: Path, choices: Choices | None = None
) -> ort.InferenceSession:
    """@prefill as ONNX Runtime has it."""
    lowered = lower(module, choices=choices)
    offsets = write_weights(directory / NAME, lowered.weights, source, lambda count: None)
    path = directory / "model.onnx"
    path.write_bytes(place(lowered, NAME, offsets).SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(made: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by name."""
    names = [output.name for output in made.get_outputs()]
    known = {node.name for node in made.get_inputs()}
    given = {name: np.array(t.numpy(), order="C") for name, t in inputs.items() if name in known}
    arrays = [torch.from_numpy(np.array(array)) for array in made.run(None, given)]
    return dict(zip(names, arrays, strict=True))


def taken(cache: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """A cache [B, KV, S, hd] without the slots that are not taken: padding may lie there."""
    slots = torch.arange(cache.shape[2]) < length[:, None]
    return cache * slots[:, None, :, None]


class NoWeights:
    """A source for modules without weights."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise KeyError(name)


def test_every_op_is_lowered() -> None:
    structural = {ops.Weight, ops.If, ops.Yield, ops.Return}
    assert EMIT.keys() | structural == set(OPS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_op(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    module = example.module()
    made = session(module, NoWeights(), tmp_path)
    for seed in range(3):
        inputs = example.inputs(seed)
        want = Interpreter(module, NoWeights()).run("prefill", inputs)
        got = run(made, inputs)
        if name == "append":
            length = inputs["n"] + inputs["m"].sum(1)
            got, want = ({"y0": taken(side["y0"], length)} for side in (got, want))
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("optimised", [False, True], ids=["plain", "passes"])
def test_generated_modules(optimised: bool, tmp_path: Path) -> None:
    """Decisions, experts and lengths exactly; floats within what rounding explains."""
    classes: set[type] = set()
    tried = 0
    for seed in SEEDS:
        example = generated(random.Random(seed))
        module = example.module.clone()
        module.functions = {"prefill": module.functions["prefill"]}
        if any(v.dtype in OTHERS for op in module.walk() for v in op.results):
            continue
        if optimised:
            for name in DEFAULT_PIPELINE:
                PASSES[name]().run(module, Statistics())
        classes |= {type(op) for op in module.walk()}
        directory = tmp_path / str(seed)
        directory.mkdir()
        made = session(module, example, directory)
        for function, regime, inputs in example.calls:
            if function != "prefill":
                continue
            exact = Interpreter(example.module, example, exact=True).run("prefill", inputs)
            single = Interpreter(example.module, example).run("prefill", inputs)
            allowed = bound(example.module, exact, single) * FLOAT32
            for key, value in run(made, inputs).items():
                where = f"seed {seed}, {regime}: {key}"
                wanted = exact[key]
                if key.endswith((".key", ".value")):
                    length = single["present.kv_len"][int(key.split(".")[1])]
                    value, wanted = taken(value, length), taken(wanted, length)
                if value.is_floating_point():
                    error = (value - wanted).abs().max() if value.numel() else 0.0
                    assert error <= allowed, f"{where}: {error}, {allowed} allowed"
                elif value.dtype == torch.int8:  # near a tie, float32 may round the other way
                    assert (value.int() - wanted.int()).abs().max() <= 1, where
                else:
                    assert torch.equal(value, single[key]), where
        tried += 1
    assert tried >= 20
    assert ops.If in classes
    assert ops.GroupedExperts in classes or not optimised


def test_an_expert_that_looks_at_other_tokens() -> None:
    """Its text is valid, but no subset of the tokens can compute it: refused by name."""
    module = parse_module(
        "module @m\n\n"
        "func @prefill(%x: f32[B, T, 4], %i: i64[B, T, 1], %w: f32[B, T, 1], %p: f32[2, 4]) "
        "-> (y: f32[B, T, 4]) {\n"
        "  %y = map_experts %x, %i, %w, [%p] : f32[B, T, 4] "
        "(%e: f32[B, T, 4], %q: f32[4]) {\n"
        "    %z = add %e, %x : f32[B, T, 4]\n    yield %z\n  }\n  return %y\n}\n"
    )
    with pytest.raises(UnsupportedError, match=r"uses %x of all tokens"):
        lower(module)

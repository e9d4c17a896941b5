"""Random modules with gates, caches, experts, and inputs that decide the gates every way."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from liquidc.ir import DType, Module, TensorType, Value, ops, print_module
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.quantize_cache import QuantizeCache
from liquidc.passes.stream import Calibration
from liquidc.profile import Profile
from tests.generator.build import WIDTH, Builder
from tests.generator.expressions import expression
from tests.generator.layers import HEAD, Step, cache_type, layer
from tests.generator.profiles import profile_of

VOCAB, SLOTS, MAX_GATES = 11, 12, 6
REGIMES = ("skip", "run", "mixed")
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A module with its weights, calls (function, regime, inputs) and a profile."""

    module: Module
    tensors: dict[str, torch.Tensor]
    calls: tuple[tuple[str, str, Inputs], ...]
    profile: Profile | None = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows of an example that fails."""
        printer.text(print_module(self.module)[:20_000])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight's tensor: the example is the source of its weights."""
        return self.tensors[name][start:stop]


def example(rng: random.Random) -> Example:
    """A module of one to three layers, and calls of @prefill and @decode in every regime.

    The caches of some hold codes.
    """
    made = float_example(rng)
    if rng.randrange(100) < 30:
        made = coded(made, random.Random(rng.getrandbits(16)))
    return replace(made, profile=profile_of(made, random.Random(rng.getrandbits(16))))


def coded(made: Example, rng: random.Random) -> Example:
    """An example whose caches hold codes, in its calls too."""
    tensors, module = dict(made.tensors), made.module.clone()
    length = rng.choice((2, 4))
    windows = [[rng.randrange(VOCAB) for _ in range(length)] for _ in range(6)]
    source = replace(made, tensors=tensors)
    calibration = Calibration(windows, "text", source, Kept(tensors), lambda *_: None)
    QuantizeCache().run(module, Statistics(), PassContext(calibration=calibration))
    numbers = torch.Generator().manual_seed(rng.getrandbits(16))
    calls: list[tuple[str, str, Inputs]] = []
    for function, regime, inputs in made.calls:
        codes = {
            name: torch.randint(-128, 128, x.shape, generator=numbers).to(torch.int8)
            for name, x in inputs.items()
            if name.startswith("past.")
        }
        calls.append((function, regime, inputs | codes))
    return Example(module, tensors, tuple(calls))


@dataclass(frozen=True)
class Kept:
    """What calibration stores, beside an example's weights."""

    tensors: dict[str, torch.Tensor]

    def append(self, name: str, type: TensorType, rows: torch.Tensor) -> None:
        """Keep a tensor that is stored at once."""
        assert (tuple(rows.shape), name in self.tensors) == (type.shape, False)
        self.tensors[name] = rows


def float_example(rng: random.Random) -> Example:
    """As `example`, with caches of floats and without a profile."""
    b = Builder(rng)
    layers = rng.choice((1, 2, 2, 3))
    function = b.function("prefill", _signature(layers))
    args = {value.name: value for value in function.args}
    y, step = _body(b, args, layers)
    results: dict[str, Value] = {"y": y}
    for gate, (mask, p) in enumerate(step.gates):
        results |= {f"gates.{gate}": mask, f"gate_p.{gate}": p}
    results |= {f"experts.{number}": index for number, index in step.experts.items()}
    for number, cache in enumerate(step.caches):
        results |= {f"present.{number}.key": cache.key, f"present.{number}.value": cache.value}
    results["present.kv_len"] = b.stacked([cache.length for cache in step.caches])
    if step.gates:
        results["gates"], results["gate_p"] = map(b.stacked, zip(*step.gates, strict=True))
    b.emit(ops.Return(list(results.values())))
    function.result_names = tuple(results)
    b.module.add(function.clone("decode"))
    b.module.attributes |= {"layers": layers, "gates": len(step.gates), "eps": 0.01}
    calls = [("prefill", regime, _inputs(b, layers, regime, False)) for regime in REGIMES]
    calls += [("decode", regime, _inputs(b, layers, regime, True)) for regime in REGIMES]
    return Example(b.module, b.tensors, tuple(calls))


def _signature(layers: int) -> list[tuple[str, TensorType]]:
    args = [
        ("input_ids", TensorType(DType.I64, ("B", "T"))),
        ("lengths", TensorType(DType.I64, ("B",))),
        ("position_start", TensorType(DType.I64, ("B",))),
        ("logit_index", TensorType(DType.I64, ("B", "P"))),
        ("gate_force", TensorType(DType.I8, (MAX_GATES,))),
        ("gate_bias", TensorType(DType.F32, ("B",))),
        ("min_depth", TensorType(DType.I64, ("B",))),
    ]
    for number in range(layers):
        args += [(f"past.{number}.key", cache_type()), (f"past.{number}.value", cache_type())]
    return [*args, ("kv_len", TensorType(DType.I64, (layers, "B")))]


def _body(b: Builder, args: dict[str, Value], layers: int) -> tuple[Value, Step]:
    """Embedding, layers, head; what comes out at the asked positions."""
    count = b.reshape(b.add(ops.Iota(dim="T")), 1, "T")
    positions = b.add(ops.Add(b.reshape(args["position_start"], "B", 1), count))
    valid = b.add(ops.Lt(count, b.reshape(args["lengths"], "B", 1)))
    x = b.add(ops.Embed(args["input_ids"], b.weight(VOCAB, WIDTH)))
    executed = b.add(ops.Broadcast(b.scalar(0, DType.I64), shape=("B", "T")))
    step = Step(args, valid, positions, executed, layers)
    x = expression(b, x, b.rng.randrange(4))
    for number in range(layers):
        x = layer(b, step, x, number)
    return b.add(ops.TakeTokens(b.norm(x), args["logit_index"])), step


def _inputs(b: Builder, layers: int, regime: str, decode: bool) -> Inputs:
    """A ragged batch; the regime decides the gates, or leaves them to the routers."""
    rng = b.rng
    rows, tokens = rng.choice((1, 2, 3)), 1 if decode else rng.choice((1, 2, 5))
    lengths = [tokens if row == 0 else rng.randrange(tokens + 1) for row in range(rows)]
    force = {"skip": (-1,), "run": (1,), "mixed": (0, 0, 0, -1, 1)}[regime]
    shown = rng.choice((1, tokens))
    inputs: Inputs = {
        "input_ids": torch.randint(VOCAB, (rows, tokens), generator=b.numbers),
        "lengths": torch.tensor(lengths),
        "position_start": torch.tensor([rng.randrange(5) for _ in range(rows)]),
        "logit_index": torch.randint(tokens, (rows, shown), generator=b.numbers),
        "gate_force": torch.tensor([rng.choice(force) for _ in range(MAX_GATES)]).to(torch.int8),
        "gate_bias": torch.tensor([rng.choice((0.0, 0.0, 0.5, -0.5)) for _ in range(rows)]),
        "min_depth": torch.tensor([rng.choice((0, 0, 1, layers)) for _ in range(rows)]),
    }
    filled: list[list[int]] = []
    for number in range(layers):
        for part in ("key", "value"):
            inputs[f"past.{number}.{part}"] = torch.randn(rows, 1, SLOTS, HEAD, generator=b.numbers)
        filled.append([rng.randrange(SLOTS - tokens) for _ in range(rows)])
    inputs["kv_len"] = torch.tensor(filled)
    return inputs

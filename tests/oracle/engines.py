"""Engines of the grid's cases, and how `drive` runs them through a runner's own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import liquidc
from liquidc.backends.base import Cache, Runner, RunnerOptions
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.runtime import Engine
from tests.oracle.drive import CAPACITY, Arrays
from tests.oracle.grid import Case


def model(case: Case) -> LiquidForCausalLM:
    """The PyTorch model of a case."""
    built = LiquidForCausalLM(LiquidConfig.from_dict(case.config)).eval()
    tensors = {name: torch.from_numpy(array) for name, array in case.weights().items()}
    built.load_state_dict(tensors, strict=False)
    return built


def engine(case: Case, output: Path, target: str) -> Engine:
    """The engine of a case, on one thread."""
    options = RunnerOptions(threads=1)
    liquidc.compile(model(case), output, target=target).close()
    return liquidc.load(output, options=options)


def stepper(runner: Runner) -> Callable[[Arrays], Arrays]:
    """`drive`'s step over a runner: a batch begins when its cache is empty."""
    caches: list[Cache] = []

    def step(inputs: Arrays) -> Arrays:
        if not inputs["kv_len"].any():
            caches[:] = [runner.new_cache(len(inputs["input_ids"]), CAPACITY)]
        (cache,) = caches
        given = {k: v for k, v in inputs.items() if k != "kv_len" and not k.startswith("past.")}
        outputs = runner.step(given, cache)
        past = {k.replace("past", "present"): v for k, v in inputs.items() if k.startswith("past.")}
        return {**outputs, **past, "present.kv_len": np.array(cache.kv_len)}

    return step

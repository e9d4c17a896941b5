"""Every exact pass on the trained sample: its contract and all decisions, over 10,000 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liquidc import facts
from liquidc.fidelity import GateMetrics
from liquidc.heldout import read_text
from liquidc.ir import Module
from liquidc.ir.interpreter import Interpreter, first_call
from liquidc.ir.rewriter import Statistics
from liquidc.observers import ModelObserver
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fix_depth import FixDepth
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES, PROFILED
from liquidc.passes.specialize_depth import SpecializeDepth
from liquidc.pipeline import open_model
from liquidc.profile import read_profile
from liquidc.profiling import profile_corpus
from liquidc.tokenizer import Tokenizer

SAMPLE = Path(__file__).resolve().parent.parent.parent / "samples" / "tiny-liquid"
TOKENS = 10_000
LOGITS = 1e-4
"""What `verify` allows, relative to the largest logit; each pass alone is far below it."""


def steps() -> list[Pass]:
    """The default passes, those that a profile adds, and the exact ones that must be asked for."""
    names = list(DEFAULT_PIPELINE)
    for name, before in PROFILED.items():
        names.insert(names.index(before), name)
    found: list[Pass] = [PASSES[name]() for name in names]
    at = names.index("group-experts") + 1
    return [*found[:at], SpecializeDepth(hot=0.2), *found[at:]]


def outputs(module: Module, source: Any, windows: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """What @prefill gives for each window."""
    interpreter, function = Interpreter(module, source), module.functions["prefill"]
    found: list[dict[str, Any]] = []
    for window in windows:
        inputs = first_call(function.args, window)
        inputs["logit_index"] = torch.arange(len(window))[None]
        found.append(interpreter.run("prefill", inputs))
    return found


@pytest.mark.slow
def test_every_exact_pass_keeps_its_contract_and_every_decision(tmp_path: Path) -> None:
    opened = open_model(SAMPLE)
    text = (SAMPLE / "heldout.txt").read_text()
    (tmp_path / "corpus.txt").write_text(text[-8_000:])
    observer = ModelObserver(opened, SAMPLE / "tokenizer.json")
    profile_corpus(observer, tmp_path / "corpus.txt", tmp_path / "profile.json")
    context = PassContext(read_profile(tmp_path / "profile.json"), opened.weights)
    held = read_text(SAMPLE / "heldout.txt", Tokenizer(SAMPLE / "tokenizer.json"), None, None)
    windows = list(held.windows[: -(-TOKENS // len(held.windows[0]))])
    assert sum(map(len, windows)) >= TOKENS
    module = opened.trace()
    gates = facts.model_info(module, "", "").gates
    before = outputs(module, opened.weights, windows)
    changed: set[str] = set()
    for step in [*steps(), FixDepth()]:
        if isinstance(step, FixDepth):  # it takes the model whole
            module, before = opened.trace(), outputs(opened.trace(), opened.weights, windows)
        statistics = Statistics()
        step.run(module, statistics, context)
        changed |= {step.name} if +statistics.fired else set()
        after = outputs(module, opened.weights, windows)
        metrics = GateMetrics(gates)
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            decided = [
                (run["gate_p"][:, 0].numpy(), run["gates"][:, 0].numpy()) for run in (new, old)
            ]
            metrics.add(number, *decided[0], *decided[1])
            a, b = old["logits"].numpy(), new["logits"].numpy()
            if step.contract == "bitwise":
                assert a.tobytes() == b.tobytes(), step.name
            assert np.abs(a - b).max() <= LOGITS * np.abs(a).max(), step.name
            assert (old["experts"] == new["experts"]).all(), step.name
        told = metrics.report()
        assert told["gate_agreement"] == 1, (step.name, told)
        assert told["gate_decisions"] == len(gates) * sum(map(len, windows))
        before = after
    assert {"group-experts", "order-experts", "fix-depth", "fuse-linear"} <= changed
    assert {"specialize-depth", "choose-lowering", "compact-tokens"} <= changed

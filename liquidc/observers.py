"""What decides a profile's numbers: a model in the interpreter, or an engine of any target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from liquidc import facts
from liquidc.errors import InputError
from liquidc.inputs import ModelInput
from liquidc.ir import Op, ops
from liquidc.ir.experts import experts_held, identity_experts, layers_of_experts
from liquidc.ir.interpreter import Frame, Interpreter, first_call
from liquidc.ir.rewriter import Statistics
from liquidc.ir.semantics import expert_weight, router_scores
from liquidc.manifest import ModelInfo
from liquidc.passes.registry import DEFAULT_PIPELINE
from liquidc.passplan import plan_passes, run_passes
from liquidc.profile import UNIT
from liquidc.runtime import Engine
from liquidc.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Observation:
    """One sequence of T tokens.

    Attributes:
        gates: bool[G, T].
        gate_p: f32[G, T].
        experts: i64[L, T, k], -1 where none; empty without experts.
        entropy: by layer with experts, see `liquidc.profile.ExpertProfile`.
        saliency: likewise.
    """

    gates: NDArray[np.bool_]
    gate_p: NDArray[np.float32]
    experts: NDArray[np.int64]
    entropy: dict[int, int] = field(default_factory=dict[int, int])
    saliency: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])


class Observer(Protocol):
    """Runs sequences."""

    @property
    def model(self) -> ModelInfo:
        """What is observed."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model."""
        ...

    def observe(self, ids: Sequence[int]) -> Observation:
        """Run one sequence from an empty cache."""
        ...


class EngineObserver:
    """An engine; it does not show the scores of its routers and the outputs of its experts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def model(self) -> ModelInfo:
        """See `Observer`."""
        return self._engine.manifest.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `Observer`."""
        return self._engine.tokenizer

    def observe(self, ids: Sequence[int]) -> Observation:
        """See `Observer`."""
        result = self._engine.evaluate(ids)
        return Observation(result.gates[:, 0], result.gate_p[:, 0], result.experts[:, 0])


class ModelObserver:
    """A model, traced, after the default passes, in the interpreter.

    Args:
        opened: the model.
        tokenizer: a tokenizer.json; None if there is none.
    """

    def __init__(self, opened: ModelInput, tokenizer: Path | None) -> None:
        module = opened.trace()
        module.functions = {"prefill": facts.main_function(module)}
        # An expert's part is one of those that were chosen: shared experts stay apart.
        plan = plan_passes(DEFAULT_PIPELINE, ("fuse-shared-experts",))
        module = run_passes(module, plan, Statistics())
        self._info = facts.model_info(module, opened.type, opened.sha256)
        self._tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._function = module.functions["prefill"]
        layer_of = layers_of_experts(self._function)
        self._interpreter = _Watching(module, opened.weights, layer_of=layer_of)

    @property
    def model(self) -> ModelInfo:
        """See `Observer`."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `Observer`."""
        return self._tokenizer

    def observe(self, ids: Sequence[int]) -> Observation:
        """See `Observer`."""
        self._interpreter.entropy.clear()
        self._interpreter.saliency.clear()
        out = self._interpreter.run("prefill", self.inputs(ids))
        count = len(ids)
        none = torch.zeros(0, 1, count)
        experts = out.get("experts", torch.zeros(0, 1, count, 0, dtype=torch.int64))
        return Observation(
            out.get("gates", none.bool())[:, 0].numpy(),
            out.get("gate_p", none)[:, 0].numpy(),
            experts[:, 0].numpy(),
            dict(self._interpreter.entropy),
            {layer: tuple(s) for layer, s in self._interpreter.saliency.items()},
        )

    def inputs(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """The arguments of @prefill for one sequence on an empty cache."""
        return first_call(self._function.args, ids)


@dataclass(slots=True)
class _Watching(Interpreter):
    """Keeps the entropy of each router and the size of each expert's contribution."""

    layer_of: dict[Op, int] = field(default_factory=dict[Op, int])
    entropy: dict[int, int] = field(default_factory=dict[int, int])
    saliency: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def _op(self, op: Op, frame: Frame) -> Sequence[torch.Tensor]:
        layer = self.layer_of.get(op)
        if layer is not None and isinstance(op, ops.Route):
            self.entropy[layer] = _entropy(op, frame)
        elif layer is not None and isinstance(op, ops.GroupedExperts):
            self.saliency[layer] = self._saliency(op, frame)
        return Interpreter._op(self, op, frame)

    def _saliency(self, op: ops.GroupedExperts, frame: Frame) -> list[int]:
        """By expert, Σ ‖its contribution‖, the weights of a token normalised to sum to 1."""
        index, weight = frame.values[op.index], frame.values[op.weight]
        total = weight.sum(-1).double()
        scale = torch.where(total > 0, 1 / total, 0.0) if op.apply == "output" else total * 0 + 1
        sums: list[int] = []
        held = experts_held(op)
        for expert in range(held):
            frame.values[op.index] = torch.where(index == expert, index, -1)
            (y,) = Interpreter._op(self, op, frame)
            sums.append(units(y.double().norm(dim=-1) * scale))
        frame.values[op.index] = index
        size = frame.values[op.x].double().norm(dim=-1) * scale
        for expert in range(held, held + identity_experts(op)):
            sums.append(units(expert_weight(index, weight, expert).double().abs() * size))
        return sums


def _entropy(op: ops.Route, frame: Frame) -> int:
    """Sum over the tokens shown of the entropy of the scores, normalised to sum to 1."""
    scores = router_scores(frame.values[op.logits].double(), op.score)
    if op.score == "identity":
        scores = scores.softmax(-1)
    share = scores / scores.sum(-1, keepdim=True)
    bits = -(share * share.clamp_min(1e-300).log2()).sum(-1)
    return units(bits[frame.values[op.mask]])


def units(values: torch.Tensor) -> int:
    """The sum of real numbers, each rounded to a multiple of 1 / UNIT, in these units.

    Raises:
        InputError: one of them is not a number.
    """
    if not bool(values.isfinite().all()):
        raise InputError("the model computes numbers that are not finite on this text")
    return int((values * UNIT).round().to(torch.int64).sum())

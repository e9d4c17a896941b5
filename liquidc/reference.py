"""The PyTorch model as the numeric reference of an engine: float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from liquidc.errors import InputError
from liquidc.frontend.model import LiquidCache, LiquidForCausalLM, LiquidOutput
from liquidc.ir.weights import WeightSource


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """One sequence: logits f32[T, V], gates bool[G, T], gate_p f32[G, T], experts i64[L, T, k]."""

    logits: NDArray[np.float32]
    gates: NDArray[np.bool_]
    gate_p: NDArray[np.float32]
    experts: NDArray[np.int64] | None


class Reference:
    """A reference model.

    Args:
        model: in evaluation mode and float32.
        source: the checkpoint that it was read from.
    """

    def __init__(self, model: LiquidForCausalLM, source: WeightSource | None = None) -> None:
        self.model = model.eval().float()
        self.source = source

    @classmethod
    def load(cls, directory: Path, sha256: str) -> Reference:
        """The model in `directory`, which must be the one with this hash.

        Raises:
            InputError: it is another one, or can't be read.
        """
        from liquidc.frontend.families import open_model

        opened = open_model(directory)
        found = opened.source.sha256
        if found != sha256:
            raise InputError(
                f"{directory}: not the model that the engine was compiled from (its hash is "
                f"{found[:12]}…, the engine's {sha256[:12]}…); give the right one with --model DIR"
            )
        return cls(opened.load(), opened.source)

    @torch.no_grad()
    def evaluate(self, ids: Sequence[int], force: Sequence[int] | None = None) -> ReferenceResult:
        """Everything for every position of one sequence; `force` as `gate_force`."""
        return _result(self.model(torch.tensor([list(ids)]), gate_force=_force(force)))

    @torch.no_grad()
    def replay(
        self,
        ids: Sequence[int],
        natural: ReferenceResult,
        first: int,
        routes: NDArray[np.bool_],
        force: Sequence[int] | None = None,
    ) -> ReferenceResult:
        """As `natural` before token `first`; from there on, each token on the given routes.

        Args:
            ids: the sequence.
            natural: the result of `evaluate`.
            first: the first token whose gates are forced.
            routes: bool[G, T].
            force: as `evaluate`, for the tokens before `first`.
        """
        cache: LiquidCache | None = self.model.new_cache(1, len(ids))
        if first:
            head = torch.tensor([list(ids[:first])])
            cache = self.model(head, cache, gate_force=_force(force)).cache
        steps: list[ReferenceResult] = []
        for token in range(first, len(ids)):
            forced = torch.tensor(np.where(routes[:, token], 1, -1).astype(np.int8))
            output = self.model(torch.tensor([[ids[token]]]), cache, gate_force=forced)
            cache = output.cache
            steps.append(_result(output))
        parts = [_cut(natural, first), *steps]
        return ReferenceResult(
            np.concatenate([part.logits for part in parts], 0),
            np.concatenate([part.gates for part in parts], 1),
            np.concatenate([part.gate_p for part in parts], 1),
            None if natural.experts is None else _join([part.experts for part in parts]),
        )

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, force: Sequence[int] | None = None
    ) -> list[list[int]]:
        """`count` tokens after each prompt of equal length, the most probable each time."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        cache = self.model.new_cache(len(ids), ids.shape[1] + count)
        made: list[torch.Tensor] = []
        for _ in range(count):
            output = self.model(ids, cache, gate_force=_force(force))
            cache = output.cache
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
        return cast(list[list[int]], torch.cat(made, 1).numpy().tolist())


def _force(force: Sequence[int] | None) -> torch.Tensor | None:
    return torch.tensor(list(force), dtype=torch.int8) if force and any(force) else None


def _result(output: LiquidOutput) -> ReferenceResult:
    experts = output.experts
    return ReferenceResult(
        output.logits[0].numpy(),
        output.gates[:, 0].numpy(),
        output.gate_p[:, 0].numpy(),
        None if experts is None else experts[:, 0].numpy(),
    )


def _cut(result: ReferenceResult, stop: int) -> ReferenceResult:
    experts = result.experts
    return ReferenceResult(
        result.logits[:stop],
        result.gates[:, :stop],
        result.gate_p[:, :stop],
        None if experts is None else experts[:, :stop],
    )


def _join(parts: list[Any]) -> NDArray[np.int64]:
    return np.concatenate(parts, 1)

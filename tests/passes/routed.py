"""IR text of a router with its experts, and profiles of them, for tests of lossy expert passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from liquidc.passes.base import PassContext
from liquidc.profile import UNIT, ExpertProfile, Paths, Profile, ProfiledModel

SHAPES = {
    "r": "[4, 8]",
    "rb": "[4]",
    "b": "[4]",
    "e": "[4]",
    "gu": "[4, 12, 8]",
    "d": "[4, 8, 6]",
}
WEIGHTS = "".join(f'weight @{n} : f32{s} = tensor("{n}", f32{s})\n' for n, s in SHAPES.items())
READ = "".join(f'\n  %{n} = weight weight="{n}" : f32{s}' for n, s in SHAPES.items())
GROUPED = "%y = grouped_experts %x, %i, %s, %gu, %d : f32[B, T, 8]"
MAPPED = """%y = map_experts %x, %i, %s, [%d] : f32[B, T, 8] (%t: f32[B, T, 8], %p: f32[8, 6]) {
    %h = slice %t, dim=2, start=0, stop=6 : f32[B, T, 6]
    %o = linear %h, %p : f32[B, T, 8]
    yield %o
  }"""
LOGITS = "%l = linear %x, %r : f32[B, T, 4]"


class Tensors:
    """A weight source of random tensors by name."""

    def __init__(self, seed: int = 0) -> None:
        numbers = torch.Generator().manual_seed(seed)
        sizes = {name: [int(n) for n in s.strip("[]").split(",")] for name, s in SHAPES.items()}
        self.tensors = {n: torch.randn(size, generator=numbers) for n, size in sizes.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


INPUTS = {
    "x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)),
    "m": torch.tensor([[True] * 5, [True, True, False, False, False]]),
}


def layer(*, logits: str = LOGITS, route: str = "k=2", holder: str = GROUPED) -> str:
    """A function of one layer of four experts."""
    return f"""
module @m
{WEIGHTS}
func @f(%x: f32[B, T, 8], %m: bool[B, T]) -> (y: f32[B, T, 8], experts: i64[B, T, 2]) {{{READ}
  {logits}
  %i, %s = route %l, %m, {route} : i64[B, T, 2], f32[B, T, 2]
  {holder}
  return %y, %i
}}
"""


def profiled(
    load: Sequence[int],
    scores: Sequence[float] | None = None,
    layers: int = 1,
    pairs: Mapping[tuple[int, int], int] | None = None,
) -> PassContext:
    """What a profile says whose experts have this load and REAP score, two for a token.

    `pairs` says which two tokens use together.
    """
    count = len(load)
    saliency = None
    if scores is not None:
        saliency = tuple(round(n * s * UNIT) for n, s in zip(load, scores, strict=True))
    both = {**(pairs or {}), **{(j, i): n for (i, j), n in (pairs or {}).items()}}
    together = tuple(tuple(both.get((i, j), 0) for j in range(count)) for i in range(count))
    tokens = sum(load) // 2
    experts = tuple(
        ExpertProfile(number, 2, tokens, tuple(load), together, None, saliency)
        for number in range(layers)
    )
    model = ProfiledModel("0" * 64, "test", layers)
    return PassContext(Profile(model, tokens, {}, (), (), Paths(0, {"": tokens}), experts))

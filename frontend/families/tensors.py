"""The tensors of a foreign checkpoint, and the expressions that families make of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from liquidc.errors import CheckpointError
from liquidc.ir.types import TensorType
from liquidc.ir.weight_maths import Take
from liquidc.ir.weights import (
    Concat,
    Slice,
    Stored,
    Transpose,
    WeightExpr,
    WeightSource,
    stack,
)

_DECODER = ("embed_tokens.", "layers.", "norm.")
"""How the names of a decoder begin that is stored without its head."""
BLOCK = 1 << 22
"""Elements that are compared at a time."""


class Tensors:
    """What a checkpoint holds, by the names of a whole model; remembers what was used.

    As in transformers, `model.` may be missing before a name of the decoder, or be there once more.

    Args:
        directory: named in messages.
        types: of its tensors.
        prefix: that may stand before the names of the text model (`language_model.`).
    """

    def __init__(self, directory: Path, types: Mapping[str, TensorType], prefix: str = "") -> None:
        self.directory, self._types, self._prefix = directory, types, prefix
        self._stored: dict[str, str] = {}
        for stored in types:
            name = self._whole(stored)
            if name == stored or name not in self._stored:
                self._stored[name] = stored
        self.used: set[str] = set()

    def _whole(self, stored: str) -> str:
        """The name in a whole model."""
        name = stored.removeprefix(self._prefix)
        if name.startswith(_DECODER):
            return f"model.{name}"
        again = name.removeprefix("model.")
        return again if again.startswith(("model.", "lm_head.")) else name

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> WeightExpr:
        """A tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self._stored:
            raise CheckpointError(f"{self.directory}: the tensor {self._prefix}{name} is missing")
        stored = self._stored[name]
        self.used.add(stored)
        return Stored(stored, self._types[stored])

    def like(self, name: str, first: str) -> WeightExpr:
        """A tensor of the same shape as that of the first expert.

        Raises:
            CheckpointError: it has another one, or there is none.
        """
        found, want = self[name], self[first]
        if found.sizes != want.sizes:
            raise CheckpointError(
                f"{self.directory}: the tensor {self._stored[name]} has the shape "
                f"{list(found.sizes)}, that of expert 0 {list(want.sizes)}"
            )
        return found

    def numbers(self, pattern: str) -> tuple[int, ...]:
        """The numbers that stand for the group of `pattern` in names, in ascending order."""
        shape = re.compile(pattern)
        return tuple(sorted({int(m[1]) for name in self._stored if (m := shape.fullmatch(name))}))

    def unused(self, ignored: Iterable[str] = ()) -> list[str]:
        """Names that nobody asked for; `ignored` are patterns of those that need not be told."""
        patterns = [re.compile(pattern) for pattern in ignored]
        left = sorted(self._types.keys() - self.used)
        return [name for name in left if not any(p.fullmatch(name) for p in patterns)]


def same_values(a: WeightExpr, b: WeightExpr, source: WeightSource) -> bool:
    """Whether two matrices hold the same numbers, whatever their element types.

    They are read some rows at a time, up to the first difference.
    """
    if a.sizes != b.sizes or len(a.sizes) != 2:
        return False
    step = max(1, BLOCK // max(1, a.sizes[1]))
    for start in range(0, a.sizes[0], step):
        span = ((start, min(start + step, a.sizes[0])), (0, a.sizes[1]))
        if not torch.equal(a.read(source, span).double(), b.read(source, span).double()):
            return False
    return True


def experts(t: Tensors, prefix: str, stacked: str, parts: Sequence[str], count: int) -> WeightExpr:
    """The stacked tensor [E, ...] of experts.

    Args:
        t: the checkpoint.
        prefix: before both names (`model.layers.3.mlp.experts.`).
        stacked: the name of the stacked tensor, which is taken if it is there.
        parts: names of one expert's tensors, put one below the other (`gate_proj.weight`).
        count: of experts, if they are stored one by one.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the first expert's.
    """
    if prefix + stacked in t:
        return t[prefix + stacked]
    each: list[WeightExpr] = []
    for number in range(count):
        rows = [t.like(f"{prefix}{number}.{part}", f"{prefix}0.{part}") for part in parts]
        each.append(rows[0] if len(rows) == 1 else Concat(tuple(rows), 0))
    return stack(each)


def halves(x: WeightExpr, dim: int) -> tuple[WeightExpr, WeightExpr]:
    """The first and the second half of a dimension."""
    size = x.sizes[dim]
    return Slice(x, dim, 0, size // 2), Slice(x, dim, size // 2, size)


def apart(x: WeightExpr, dim: int) -> WeightExpr:
    """Even entries of a dimension before odd ones: gate and up rows that were interleaved."""
    size = x.sizes[dim]
    return Take(x, dim, (*range(0, size, 2), *range(1, size, 2)))


def half_rotation(x: WeightExpr, width: int) -> WeightExpr:
    """Rows of a query or key projection, from pairs side by side to halves of a head.

    Rotating components 2i and 2i + 1 of a head together is rotating i and i + hd / 2 after its rows
    were put in this order, and scores are sums over a head's components in any order.
    """
    order = (*range(0, width, 2), *range(1, width, 2))
    heads = x.sizes[0] // width
    return Take(x, 0, tuple(head * width + i for head in range(heads) for i in order))


def swapped(x: WeightExpr) -> WeightExpr:
    """[E, in, out] as [E, out, in]."""
    return Transpose(x, (0, 2, 1))

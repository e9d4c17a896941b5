"""weights.bin: the weights of an engine one after the other, aligned, readable by mapping.

Weights are evaluated in blocks of rows while they are written, so memory is bounded by the block.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc.backends.base import Journal, StoredWeight
from liquidc.errors import EngineError
from liquidc.ir.types import TensorType
from liquidc.ir.weights import (
    WeightExpr,
    WeightSource,
    byte_size,
    evaluate,
    sizes,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

NAME = "weights.bin"
ALIGNMENT = 4096
"""Every weight starts at a multiple of this many bytes: a page, so that it can be mapped alone."""

KEPT = 64 * 1024 * 1024
"""Bytes of whole weights after which the journal is told."""


def layout(weights: Mapping[str, WeightExpr]) -> dict[str, int]:
    """The offset of each weight, in the order given."""
    offsets: dict[str, int] = {}
    end = 0
    for name, expr in weights.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + byte_size(expr.type)
    return offsets


def write_weights(
    path: Path,
    weights: Mapping[str, WeightExpr],
    source: WeightSource,
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> dict[str, int]:
    """Write the weights; those that the journal knows to be complete are in the file already.

    Args:
        path: the file to write.
        weights: in the order in which they are stored.
        source: where their tensors are read.
        advance: called with the number of bytes after each block.
        journal: told when a weight is complete, unless there is little since it was told last.

    Returns:
        The offset of each weight.
    """
    import torch

    offsets = layout(weights)
    kept = 0 if journal is None else journal.held(path)
    with path.open("r+b" if kept else "wb") as file:
        file.seek(kept)
        for name, expr in weights.items():
            if offsets[name] + byte_size(expr.type) <= kept:
                advance(byte_size(expr.type))
                continue
            file.write(b"\0" * (offsets[name] - file.tell()))
            for block in evaluate(expr, source):
                data: Any = block.reshape(-1).view(torch.uint8).numpy()
                file.write(data)
                advance(data.nbytes)
            if journal is not None and file.tell() >= kept + KEPT:
                file.flush()
                journal.keep(path)
                kept = file.tell()
    if journal is not None and path.stat().st_size > kept:
        journal.keep(path)
    return offsets


class WeightsFile:
    """The weights of an engine, mapped; a `WeightSource`.

    Args:
        path: the file.
        types: what each weight is, by name; their sizes are numbers.
        offsets: where each lies.

    Raises:
        EngineError: a weight lies nowhere in the file.
    """

    def __init__(
        self, path: Path, types: Mapping[str, TensorType], offsets: Mapping[str, int]
    ) -> None:
        self._types, self._offsets = types, offsets
        size = path.stat().st_size
        for name, type in types.items():
            offset = offsets.get(name, -1)
            if offset < 0 or offset + byte_size(type) > size:
                raise EngineError(f"{path}: the weight {name} does not lie in it")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of a weight; a scalar counts as one row."""
        import torch

        dtype = torch_dtype(self._types[name].dtype)
        shape = sizes(self._types[name].shape) or (1,)
        row = math.prod(shape[1:])
        offset = self._offsets[name] + start * row * dtype.itemsize
        flat = bytearray(self._map[offset : offset + (stop - start) * row * dtype.itemsize])
        return torch.frombuffer(flat, dtype=dtype).reshape(stop - start, *shape[1:])

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


def stored_weights(
    path: Path, weights: Mapping[str, WeightExpr], offsets: Mapping[str, int]
) -> dict[str, StoredWeight]:
    """Weights that were written to a file, by name.

    Args:
        path: the file.
        weights: what each holds.
        offsets: where each lies.
    """
    file = WeightsFile(path, {name: expr.type for name, expr in weights.items()}, offsets)
    return {
        name: StoredWeight(expr, partial(file.read_rows, name)) for name, expr in weights.items()
    }

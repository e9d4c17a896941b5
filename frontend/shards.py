"""Writing safetensors row block by row block: in one file, or in shards with an index.

The library's own writer takes whole tensors in memory. Its format is the length of a JSON header in
8 bytes, the header, and the tensors without holes between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from liquidc.frontend.checkpoint import DTYPES, INDEX, SINGLE
from liquidc.ir.types import TensorType
from liquidc.ir.weights import WeightExpr, WeightSource, byte_size, evaluate
from liquidc.records import canonical

SHARD_BYTES = 5_000_000_000
"""Bytes of a shard at most, but for a tensor that is larger; what transformers writes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    directory: Path,
    weights: Mapping[str, WeightExpr],
    source: WeightSource,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Write model.safetensors, or shards and their index, into a directory.

    The same weights give the same bytes. Memory is bounded by a block of rows.

    Args:
        directory: where to.
        weights: the tensors, by name, in the order in which they fill the shards.
        source: where they are read.
        shard_bytes: a shard is closed before it would be larger.
        advance: called with the number of bytes after each block.

    Returns:
        Names of the files.
    """
    shards: list[dict[str, TensorType]] = [{}]
    size = 0
    for name, expr in weights.items():
        more = byte_size(expr.type)
        if size + more > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = expr.type
        size += more
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = files if count > 1 else [SINGLE]
    for file, types in zip(files, shards, strict=True):
        write_safetensors(
            directory / file, types, lambda name: evaluate(weights[name], source), advance
        )
    if count == 1:
        return files
    total = sum(byte_size(expr.type) for expr in weights.values())
    places = {name: file for file, types in zip(files, shards, strict=True) for name in types}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_bytes(canonical(index))
    return [*files, INDEX]


def write_safetensors(
    path: Path,
    types: Mapping[str, TensorType],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write one file.

    Args:
        path: the file.
        types: of its tensors, by name.
        blocks: the elements of a tensor, in order, some rows at a time.
        advance: called with the number of bytes after each block.
    """
    # Large elements first, as the library does it: so every tensor is aligned.
    order = sorted(types, key=lambda name: (-types[name].dtype.bytes, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + byte_size(types[name])
        header[name] = {
            "dtype": _NAMES[types[name].dtype],
            "shape": list(types[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in blocks(name):
                data: Any = block.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data)
                if advance is not None:
                    advance(data.nbytes)

"""Any checkpoint that is supported, written as a Liquid Transformer: `export_checkpoint`.

The directory holds what `compile` reads and what, after `import liquidc.hf`, `transformers` loads:
config.json, safetensors in shards, and the files of the tokenizer and of generation as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from liquidc.directory import check_output, whole_directory
from liquidc.errors import InputError
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.families import Checkpoint, open_model
from liquidc.frontend.shards import SHARD_BYTES, write_weights
from liquidc.heldout import Report
from liquidc.inputs import DirectoryInput
from liquidc.ir.types import DType
from liquidc.ir.weights import WeightExpr, WeightSource, byte_size, cast
from liquidc.records import canonical

MB = 1_000_000
ARCHITECTURE = "LiquidForCausalLM"
DTYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint that was written.

    Attributes:
        directory: where it is.
        config: its config.
        files: names of its files, sorted.
        bytes: of all tensors.
    """

    directory: Path
    config: LiquidConfig
    files: tuple[str, ...]
    bytes: int


def export_checkpoint(
    model: Path,
    output: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    report: Report = lambda what, done, total: None,
) -> Exported:
    """Write the checkpoint directory `model` as one of `model_type` liquid.

    Args:
        model: of any family that is supported.
        output: the directory to be.
        dtype: element type of the weights: float32, bfloat16 or float16; by default the config's.
        shard_bytes: of a file of weights, at most.
        force: replace a checkpoint that is there.
        report: told how many of the megabytes of weights are written.

    Raises:
        InputError: the model is not supported or damaged, or the output can't be written.
    """
    check_output(output, force=force)
    files = checkpoint_files(model)
    found = open_model(model)
    config = found.config if dtype is None else replace(found.config, dtype=dtype)
    return write_checkpoint(
        output,
        config,
        typed(found, config.dtype),
        found.source,
        files,
        shard_bytes=shard_bytes,
        force=force,
        report=report,
    )


def typed(found: Checkpoint, dtype: str) -> dict[str, WeightExpr]:
    """The weights in the element type `dtype`."""
    return {name: cast(expr, DTYPES[dtype]) for name, expr in found.weights.items()}


def checkpoint_files(model: Path) -> dict[str, bytes]:
    """What a checkpoint keeps beside config and weights: the tokenizer's and generation's files.

    Raises:
        InputError: one is damaged.
    """
    return {n: data for n, data in DirectoryInput(model).files().items() if n != "config.json"}


def write_checkpoint(
    output: Path,
    config: LiquidConfig,
    weights: Mapping[str, WeightExpr],
    source: WeightSource,
    files: Mapping[str, bytes],
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    report: Report = lambda what, done, total: None,
) -> Exported:
    """Write a Liquid checkpoint; it is there whole or not at all.

    Args:
        output: the directory to be.
        config: of the model.
        weights: of each of its parameters.
        source: where their tensors are read.
        files: contents of further files, by name.
        shard_bytes: of a file of weights, at most.
        force: replace a checkpoint that is there.
        report: told how many of the megabytes of weights are written.

    Raises:
        InputError: it can't be written.
    """
    if shard_bytes < 1:
        raise InputError(f"a shard of {shard_bytes} bytes holds nothing; give at least 1")
    total = sum(byte_size(expr.type) for expr in weights.values())
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report("MB written", done // MB, total // MB)

    told = {**config.to_dict(), "architectures": [ARCHITECTURE]}
    with whole_directory(output, force=force) as directory:
        names = write_weights(directory, weights, source, shard_bytes=shard_bytes, advance=advance)
        for name, data in {**files, "config.json": canonical(told)}.items():
            (directory / name).write_bytes(data)
            names.append(name)
    return Exported(output, config, tuple(sorted(names)), total)

"""Checkpoint directories: safetensors files beside a config.json, read lazily and checked.

The safetensors library checks the headers (it refuses wrong lengths, overlaps and holes); here
their content is compared with what the index says. Rows are read into memory of
their own: the library maps files, and every mapped page that was touched counts as resident.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from liquidc.errors import CheckpointError
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import torch_dtype
from liquidc.records import canonical

if TYPE_CHECKING:
    from torch import nn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": DType.F64,
    "F32": DType.F32,
    "F16": DType.F16,
    "BF16": DType.BF16,
    "I64": DType.I64,
    "I32": DType.I32,
    "I8": DType.I8,
    "U8": DType.U8,
    "BOOL": DType.BOOL,
}
"""Names of safetensors by element type; others (float8, float4) have no lowering yet."""
_BLOCK = 1 << 24
"""Bytes that are hashed at a time."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor is: its file, element type by the name of safetensors, shape, first byte."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class CheckpointSource:
    """The tensors of a directory by name, read row by row; a `WeightSource`.

    Raises:
        CheckpointError: weights are missing, damaged or in a format that is not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = {path.name: _read_header(path) for path in _weight_files(directory)}
        self._files = sorted(files)
        self._entries = _merge(directory, files)

    @cached_property
    def sha256(self) -> str:
        """Hash of config.json and the weight files, in the order of their names."""
        digest = hashlib.sha256()
        for name in ("config.json", *self._files):
            with (self.directory / name).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def types(self) -> dict[str, TensorType]:
        """Element type and shape of every tensor.

        Raises:
            CheckpointError: an element type is not supported.
        """
        return {name: self._type(name) for name in sorted(self._entries)}

    def _type(self, name: str) -> TensorType:
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self._where(name)} has elements of {entry.dtype}; "
                f"liquidc reads {', '.join(DTYPES)}: convert the checkpoint"
            )
        return TensorType(DTYPES[entry.dtype], entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of a tensor as stored; a scalar counts as one row.

        Raises:
            CheckpointError: they hold NaN or infinity, or the file is shorter than it was, or the
                tensor is none of the checkpoint's.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        entry, dtype = self._entries[name], self._type(name).dtype
        inner = entry.shape[1:]
        row = math.prod(inner) * dtype.bytes
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        with (self.directory / entry.file).open("rb") as file:
            file.seek(entry.offset + start * row)
            if file.readinto(cast(Any, data.numpy())) != len(data):
                raise CheckpointError(f"{self._where(name)} ends early; the file was changed")
        rows = data.view(torch_dtype(dtype)).reshape(stop - start, *inner)
        if not _finite(rows):
            raise CheckpointError(f"{self._where(name)} holds NaN or infinity; nothing can use it")
        return rows

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        shape = self._entries[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def _where(self, name: str) -> str:
        return f"{self.directory / self._entries[name].file}: the tensor {name}"


def _finite(rows: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; the extremes show it, and are found much faster."""
    if not rows.is_floating_point() or not rows.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(rows))


def save(model: nn.Module, config: Mapping[str, Any], directory: Path) -> None:
    """Write config.json and model.safetensors: aside, then file by file into place.

    The same model gives the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        save_file(dict(sorted(tensors.items())), aside / SINGLE, metadata={"format": "pt"})
        (aside / SINGLE).chmod(0o644)
        (aside / "config.json").write_bytes(canonical(dict(config)))
        for name in (SINGLE, "config.json"):
            (aside / name).replace(directory / name)
    finally:
        shutil.rmtree(aside)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, in the order of their names."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a model directory")
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        return [directory / name for name in sorted(set(_read_index(directory).values()))]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: a pickle can run code, so it is not opened; convert it: "
            "load it where you trust it and write model.safetensors with "
            "safetensors.torch.save_model(model, 'model.safetensors')"
        )
    raise CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}; give a model directory")


def _read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor, by a sharded checkpoint's index.

    Raises:
        CheckpointError: the index is no index, or names something outside the directory.
    """
    path = directory / INDEX
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    entries = cast(dict[str, Any], content).get("weight_map") if type(content) is dict else None
    if type(entries) is not dict or not entries:
        raise CheckpointError(f"{path}: has no weight_map from tensors to files")
    for name, file in cast(dict[str, Any], entries).items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is no plain file name")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is not .safetensors")
        if (directory / file).resolve().parent != directory.resolve():
            raise CheckpointError(
                f"{directory / file}: a link out of the directory; put the file itself there"
            )
    return cast(dict[str, str], entries)


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file, by its header (its length in 8 bytes, then JSON).

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, download it again")
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}); download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from None
    header.pop("__metadata__", None)
    return {
        name: _Entry(
            path.name, told["dtype"], tuple(told["shape"]), 8 + length + told["data_offsets"][0]
        )
        for name, told in header.items()
    }


def _merge(directory: Path, files: Mapping[str, Mapping[str, _Entry]]) -> dict[str, _Entry]:
    """The tensors of all files.

    Raises:
        CheckpointError: two files hold a tensor, or the index names one that its file lacks.
    """
    merged: dict[str, _Entry] = {}
    for file, entries in files.items():
        for name, entry in entries.items():
            if name in merged:
                raise CheckpointError(
                    f"{directory}: {name} is both in {merged[name].file} and {file}"
                )
            merged[name] = entry
    if SINGLE not in files:
        for name, file in _read_index(directory).items():
            if name not in files[file]:
                raise CheckpointError(f"{directory / file}: lacks {name}, which {INDEX} puts there")
    return merged

"""Checkpoint directories: safetensors files beside a config.json, read lazily and checked.

Headers are checked here, by the rules of the format (https://github.com/huggingface/safetensors,
"Format"), and not by the library, which refuses a whole file for one tensor of an element type that
it does not know. Rows are read into memory of their own: the library maps files, and every mapped
page that was touched counts as resident. Files may be links; an index only names files beside it.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file

from liquidc.errors import CheckpointError
from liquidc.files import check_regular, open_regular
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import torch_dtype
from liquidc.records import MAX_JSON_BYTES, canonical, loads, read_json

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
"""Element types that can be read, by their names in safetensors; others are left alone."""
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
            check_regular(self.directory / name, CheckpointError)
            with (self.directory / name).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def types(self) -> Mapping[str, TensorType]:
        """Element type and shape of every tensor.

        A lookup raises `CheckpointError` if the element type is not supported: tensors that nothing
        reads may have any.
        """
        return _Types(self)

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._entries)

    def type_of(self, name: str) -> TensorType:
        """Element type and shape of a tensor.

        Raises:
            CheckpointError: the element type is not supported.
            KeyError: there is no such tensor.
        """
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
        entry, dtype = self._entries[name], self.type_of(name).dtype
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


class _Types(Mapping[str, TensorType]):
    """See `CheckpointSource.types`."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source, self._names = source, dict.fromkeys(source.names())

    def __getitem__(self, name: str) -> TensorType:
        return self._source.type_of(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
    if os.path.lexists(directory / SINGLE):
        return [directory / SINGLE]
    if os.path.lexists(directory / INDEX):
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
    content = read_json(path, CheckpointError)
    entries = cast(dict[str, Any], content).get("weight_map") if type(content) is dict else None
    if type(entries) is not dict or not entries:
        raise CheckpointError(f"{path}: has no weight_map from tensors to files")
    for name, file in cast(dict[str, Any], entries).items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is no plain file name")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is not .safetensors")
    return cast(dict[str, str], entries)


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file, by its header (its length in 8 bytes, then JSON).

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, download it again")
    try:
        with open_regular(path, CheckpointError) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_JSON_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = loads(file.read(length).decode())
        return _entries(path.name, header, 8 + length, size)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}); download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from None


def _entries(file: str, header: Any, start: int, size: int) -> dict[str, _Entry]:
    """The tensors of a header, whose bytes must fill the file from `start` on without holes.

    Raises:
        ValueError: the header is damaged.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    entries: dict[str, _Entry] = {}
    places: list[tuple[int, int, str]] = []
    for name, told in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            continue
        fields = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
        dtype, shape = fields.get("dtype"), _sizes(fields.get("shape"))
        offsets = _sizes(fields.get("data_offsets"))
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
            raise ValueError(f"{name!r:.80} has no dtype, shape and data_offsets")
        begin, end = offsets
        if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].bytes:
            raise ValueError(
                f"{name!r:.80} has {end - begin} bytes for {dtype} {list(shape)!s:.80}"
            )
        places.append((begin, end, name))
        entries[name] = _Entry(file, dtype, shape, start + begin)
    at = 0
    for begin, end, name in sorted(places):
        if begin != at or end < begin:
            raise ValueError(f"{name!r:.80} begins at byte {begin}, not at {at}")
        at = end
    if start + at != size:
        raise ValueError(f"{start + at} bytes of tensors in a file of {size}")
    return entries


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of integers that are 0 or more; None if it is none."""
    items = cast("list[Any]", value) if isinstance(value, list) else [None]
    good = all(type(item) is int and 0 <= item < 1 << 63 for item in items)
    return tuple(cast("list[int]", items)) if good else None


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

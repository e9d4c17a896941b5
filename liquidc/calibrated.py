"""Tensors that calibration made, in a directory of their own until the engine is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch

from liquidc.errors import InputError
from liquidc.ir.quantised import CALIBRATED
from liquidc.ir.types import TensorType
from liquidc.ir.weights import WeightSource, torch_dtype
from liquidc.journal import Journal


class CalibratedSource:
    """A model's weights, and the codes, scales and zero points that were made of them.

    Args:
        model: where the model's weights are.
        directory: made when something is stored; who made the source removes it.
        journal: keeps what is stored; None if nothing needs to be continued.
    """

    def __init__(
        self, model: WeightSource, directory: Path, journal: Journal | None = None
    ) -> None:
        self._model, self._directory, self._journal = model, directory, journal
        self._types: dict[str, TensorType] = {}
        self._stored: dict[str, int] = {}

    def stored(self, name: str, type: TensorType) -> int:
        """How many elements of the tensor `name` of the type `type` there are already."""
        if name not in self._stored:
            held = 0 if self._journal is None else self._journal.held(self._path(name))
            self._types[name], self._stored[name] = type, held // type.dtype.bytes
        return self._stored[name]

    def append(self, name: str, type: TensorType, rows: torch.Tensor) -> None:
        """Add elements to the tensor `name` of the type `type`, in their order."""
        self._stored[name] = self.stored(name, type) + rows.numel()
        self._directory.mkdir(exist_ok=True)
        with self._path(name).open("ab") as file:
            file.write(cast(Any, rows.contiguous().numpy()))
        if self._journal is not None:
            self._journal.keep(self._path(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `WeightSource`.

        Raises:
            InputError: codes that this compile has not made.
        """
        if not name.startswith(CALIBRATED):
            return self._model.read_rows(name, start, stop)
        if name not in self._types:
            raise InputError(f"{name}: calibrated codes are not kept; compile from the model")
        type = self._types[name]
        _, *inner = type.shape
        shape = (stop - start, *(int(size) for size in inner))
        row = math.prod(shape[1:]) * type.dtype.bytes
        data = torch.empty(shape[0] * row, dtype=torch.uint8)
        with self._path(name).open("rb") as file:
            file.seek(start * row)
            if file.readinto(cast(Any, data.numpy())) != len(data):
                raise InputError(f"{name}: calibrated codes end early; is the disk full?")
        return data.view(torch_dtype(type.dtype)).reshape(shape)

    def _path(self, name: str) -> Path:
        return self._directory / name.removeprefix(CALIBRATED)

"""Checkpoint directories that we write: there whole, or not at all."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from liquidc.directory_writer import DirectoryWriter
from liquidc.durable import sync
from liquidc.engine import list_files
from liquidc.errors import EngineError, InputError
from liquidc.frontend.checkpoint import INDEX
from liquidc.inputs import COPIED, model_type

CONFIG = "config.json"


class CheckpointWriter(DirectoryWriter):
    """Writes a Liquid checkpoint; see `DirectoryWriter`."""

    noun: ClassVar[str] = "a checkpoint"
    last: ClassVar[str] = CONFIG

    @staticmethod
    def refuse_unless_ours(path: Path) -> None:
        """See `DirectoryWriter.refuse_unless_ours`."""
        _refuse_unless_checkpoint(path)


def check_output(output: Path, *, force: bool = False) -> None:
    """Find out that a checkpoint can't be written there, before any work is done.

    Args:
        output: the directory to be.
        force: one that is there is replaced, if it is a checkpoint and nothing else.

    Raises:
        InputError: it can't.
    """
    CheckpointWriter(output, force=force).check()


@contextmanager
def whole_directory(output: Path, *, force: bool = False) -> Generator[Path]:
    """A directory to fill, which is synced and renamed to `output` when the block ends well.

    Whatever goes wrong before, Ctrl-C included, removes it.

    Raises:
        InputError: see `check_output`; or no space, no permission.
    """
    with CheckpointWriter(output, force=force) as writer:
        yield writer.path
        for name in list_files(writer.path):
            sync(writer.path / name)
        writer.place()


def _refuse_unless_checkpoint(path: Path) -> None:
    """Check that deleting `path` deletes a Liquid checkpoint and nothing else.

    Raises:
        InputError: it is something else, or holds a file that no checkpoint of ours has.
    """
    try:
        kind = model_type(path / CONFIG) if path.is_dir() else ""
        extra = [name for name in list_files(path) if not _ours(name)] if kind else []
    except (InputError, EngineError):
        kind, extra = "", []
    if kind != "liquid":
        raise InputError(f"{path}: not replaced, for it is no checkpoint of model_type liquid")
    if extra:
        raise InputError(f"{path}: not replaced, for {extra[0]} is not part of a checkpoint")


def _ours(name: str) -> bool:
    weights = name.startswith("model") and name.endswith(".safetensors")
    return weights or name in (*COPIED, INDEX, "liquify.json")

"""Checkpoint directories that we write: there whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from liquidc.engine import list_files, sync, writing
from liquidc.errors import EngineError, InputError
from liquidc.frontend.checkpoint import INDEX
from liquidc.inputs import COPIED, model_type
from liquidc.interrupt import Interruptible


def check_output(output: Path, *, force: bool = False) -> None:
    """Find out that a checkpoint can't be written there, before any work is done.

    Args:
        output: the directory to be.
        force: one that is there is replaced, if it is a checkpoint and nothing else.

    Raises:
        InputError: it can't; nothing was changed.
    """
    parent = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not parent.is_dir():
        raise InputError(f"{parent}: not a directory; write elsewhere")
    if os.path.lexists(output):
        if not force:
            raise InputError(f"{output}: exists already; --force replaces it")
        _refuse_unless_checkpoint(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent}: can't be written (permission denied)")


@contextmanager
def whole_directory(output: Path, *, force: bool = False) -> Generator[Path]:
    """A directory to fill, which is synced and renamed to `output` when the block ends well.

    Whatever goes wrong before, Ctrl-C included, removes it.

    Raises:
        InputError: see `check_output`; or no space, no permission.
    """
    output = Path(os.path.realpath(output))
    check_output(output, force=force)
    made = [path for path in output.parents if not path.exists()]
    with Interruptible() as signals, writing(output):
        signals.hold()
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            signals.release()
            yield aside
            for name in (*list_files(aside), "."):
                sync(aside / name)
            aside.chmod(0o755)
            signals.hold()
            if output.exists():
                old = aside.with_name(f"{aside.name}-replaced")
                output.rename(old)
                aside.rename(output)
                shutil.rmtree(old)
            else:
                aside.rename(output)
            sync(output.parent)
        except BaseException:
            signals.hold()
            shutil.rmtree(aside, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise


def _refuse_unless_checkpoint(path: Path) -> None:
    """Check that deleting `path` deletes a Liquid checkpoint and nothing else.

    Raises:
        InputError: it is something else, or holds a file that no checkpoint of ours has.
    """
    try:
        kind = model_type(path / "config.json") if path.is_dir() else ""
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

"""What a compile reads before it computes anything; a dry run reads the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from liquidc.engine import sha256_file
from liquidc.errors import InputError
from liquidc.files import read_utf8
from liquidc.ir import Module, parse_module, verify
from liquidc.ir.parser import MAX_BYTES
from liquidc.machine import read_table
from liquidc.passes.base import PassContext
from liquidc.profile import read_profile
from liquidc.version import __version__, source_hash

if TYPE_CHECKING:
    from liquidc.backends.base import Backend
    from liquidc.inputs import ModelInput
    from liquidc.ir.weights import WeightSource
    from liquidc.plan import CompileOptions


def read_context(options: CompileOptions, model: ModelInput, source: WeightSource) -> PassContext:
    """What the passes may use: profile, weights, machine table.

    Raises:
        InputError: a file is damaged, or the profile is of another model.
    """
    profile = None
    if options.profile is not None:
        profile = read_profile(options.profile)
        profile.check_model(model.sha256, str(options.profile))
    machine = None if options.machine is None else read_table(options.machine)
    return PassContext(profile, source, machine)


def trace_for(model: ModelInput, backend: Backend) -> Module:
    """The model's IR, with the functions that a target wants.

    Raises:
        InputError: the model has none of them, or can't be traced.
    """
    module = model.trace()
    kept = {name: f for name, f in module.functions.items() if name in backend.functions}
    if not kept:
        found = ", ".join(f"@{name}" for name in module.functions)
        raise InputError(
            f"the target {backend.name} needs @{' or @'.join(backend.functions)}, "
            f"the model has {found or 'none'}"
        )
    module.functions = kept
    return module


def read_ir(path: Path) -> Module:
    """A module in text form, verified.

    Raises:
        InputError: it is none.
    """
    module = parse_module(read_utf8(path, InputError, MAX_BYTES), str(path))
    verify(module)
    return module


def check_dump(options: CompileOptions) -> None:
    """Find out that artefacts can't be dumped before any work is done.

    Raises:
        InputError: the directory can't be made or written.
    """
    path = options.dump
    if path is None:
        return
    place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        raise InputError(f"{place}: not a directory; dump elsewhere")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place}: can't be written (permission denied)")


def tools(backend: Backend) -> dict[str, str]:
    """Versions of what shapes an engine's bytes."""
    import torch

    return {"liquidc": __version__, "torch": torch.__version__, **backend.tools()}


def depends_on(options: CompileOptions, model: ModelInput, backend: Backend) -> dict[str, str]:
    """All that an engine's bytes depend on, by the name to use in messages.

    Raises:
        InputError: a file can't be read.
    """
    files = model.files().items()
    return {
        "the model": model.sha256,
        **{name: hashlib.sha256(data).hexdigest() for name, data in files},
        **{f"the option {name}": value for name, value in options.told().items()},
        **{f"the target's {name}": value for name, value in backend.target().items()},
        **{f"the version of {name}": value for name, value in tools(backend).items()},
        "the version of liquidc": f"{__version__} {source_hash()}",
        **_held_out(model.origin),
    }


def _held_out(origin: Path | None) -> dict[str, str]:
    """The text that comes with a model, on which a lossy compile is measured."""
    path = None if origin is None else origin / "heldout.txt"
    return {} if path is None or not path.is_file() else {path.name: sha256_file(path)}

"""What can be compiled: a checkpoint directory, or a module in memory."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from liquidc.errors import ConfigError, InputError, LiquidWarning
from liquidc.files import read_file
from liquidc.generation import GENERATION, read_generation
from liquidc.ir.core import Module
from liquidc.ir.weights import WeightSource
from liquidc.records import canonical, read_object
from liquidc.special_tokens import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

if TYPE_CHECKING:
    import torch

TEMPLATE = "chat_template.jinja"
COPIED = (
    "config.json",
    GENERATION,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    TEMPLATE,
)
"""Files of a model that become part of the engine, where they exist."""


class ModelInput(Protocol):
    """A model to compile.

    Attributes:
        type: its `model_type`, or the name of its class.
        origin: the directory that it came from, for the build log.
    """

    type: str
    origin: Path | None

    @property
    def sha256(self) -> str:
        """Hash of config and weights; reads all of them the first time."""
        ...

    @property
    def weights(self) -> WeightSource:
        """Where the module's weights are read from."""
        ...

    def check(self) -> None:
        """Find out what is wrong without reading a weight.

        Raises:
            InputError: the model can't be compiled.
        """
        ...

    def trace(self) -> Module:
        """The IR."""
        ...

    def files(self) -> dict[str, bytes]:
        """The files to copy, by name."""
        ...


class DirectoryInput:
    """A checkpoint directory: config.json, safetensors, tokenizer.json.

    It is opened once: what `trace` and `weights` use is what was checked.

    Warns:
        LiquidWarning: tensors or fields that nothing uses.

    Raises:
        InputError: it is no directory, its config is not supported, or a tensor is missing.
    """

    def __init__(self, path: Path) -> None:
        from liquidc.frontend.families import open_model

        if not path.is_dir():
            what = "not a directory" if path.exists() else "no such directory"
            raise InputError(f"{path}: {what}; give the directory with config.json and weights")
        self.origin: Path | None = path.resolve()
        self._path = path
        self.type = model_type(path / "config.json")
        self._opened = open_model(path)

    @property
    def sha256(self) -> str:
        """See `ModelInput`."""
        return self._opened.source.sha256

    @property
    def weights(self) -> WeightSource:
        """See `ModelInput`."""
        return self._opened.source

    def check(self) -> None:
        """See `ModelInput`."""
        self.files()

    def trace(self) -> Module:
        """See `ModelInput`."""
        from liquidc.frontend.trace import trace_checkpoint

        return trace_checkpoint(self._opened)

    def files(self) -> dict[str, bytes]:
        """See `ModelInput`."""
        return dict(self._files)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """The files to copy, by name; what is damaged is refused, what is odd is told."""
        paths = {name: self._path / name for name in COPIED if os.path.lexists(self._path / name)}
        found = {name: read_file(path, InputError) for name, path in paths.items()}
        wants, where = read_generation(self._path), self._path / GENERATION
        notes = [f"{where}: {note}" for note in wants.notes]
        notes += [f"{where}: {name} is not followed" for name in wants.unsupported]
        if "tokenizer.json" in found:
            from liquidc.tokenizer import Tokenizer

            notes += Tokenizer(paths["tokenizer.json"]).notes()
        if found.keys() & {TOKENIZER_CONFIG, TEMPLATE}:
            from liquidc.chat import read_chat_template

            if (template := read_chat_template(self._path)) is not None:
                template.check()
        for note in notes:
            warnings.warn(note, LiquidWarning, stacklevel=2)
        return found


class ModuleInput:
    """A module in memory; one that follows `liquidc.frontend.protocol` gets a cache.

    Args:
        module: the model.
        files: contents of tokenizer.json and others, by name.

    Raises:
        InputError: it is no module, or can't be traced by its kind.
    """

    def __init__(self, module: torch.nn.Module, files: Mapping[str, bytes] | None = None) -> None:
        import torch

        from liquidc.frontend.prepare import named_tensors, unwrapped

        if not isinstance(cast(object, module), torch.nn.Module):
            kind = type(module).__name__
            raise InputError(f"a model is a directory or a torch.nn.Module, not of type {kind}")
        module = unwrapped(module)
        self.origin: Path | None = None
        self._module = module
        self._files = dict(files or {})
        config: Any = getattr(module, "config", None)
        self._config: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        self.type = str(self._config.get("model_type", type(module).__name__))
        self._tensors = named_tensors(module)

    @property
    def sha256(self) -> str:
        """See `ModelInput`."""
        digest = hashlib.sha256(canonical({"type": self.type, "config": self._config}))
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bytes_of(tensor))
        return digest.hexdigest()

    @property
    def weights(self) -> WeightSource:
        """See `ModelInput`."""
        return self

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a parameter or buffer; a scalar counts as one row."""
        tensor = self._tensors[name].detach().cpu()
        return (tensor if tensor.dim() else tensor.reshape(1))[start:stop]

    def check(self) -> None:
        """See `ModelInput`.

        Raises:
            CheckpointError: a tensor has no values, or is not finite.
        """
        from liquidc.frontend.prepare import check_tensors

        check_tensors(self._tensors)

    def trace(self) -> Module:
        """See `ModelInput`."""
        from liquidc.frontend.positions import context_of
        from liquidc.frontend.trace import trace

        module = trace(self._module)
        limit = module.attributes.pop("max_positions", None)
        named = self._config.get("max_position_embeddings")
        context = context_of(module, named if type(named) is int else None)
        if known := [n for n in (context, limit) if isinstance(n, int)]:
            module.attributes["max_positions"] = min(known)
        if type(vocabulary := self._config.get("vocab_size")) is int:
            module.attributes["vocab_size"] = vocabulary
        gate: Any = self._config.get("depth_gate")
        if isinstance(gate, dict) and "kv_policy" in gate:
            module.attributes.setdefault("kv_policy", str(cast(Any, gate)["kv_policy"]))
        return module

    def files(self) -> dict[str, bytes]:
        """See `ModelInput`."""
        given = dict(self._files)
        if self._config:
            given.setdefault("config.json", canonical(self._config))
        if unknown := sorted(given.keys() - set(COPIED)):
            raise InputError(f"{unknown[0]} is not part of an engine; known: {', '.join(COPIED)}")
        return given


def model_type(path: Path) -> str:
    """The `model_type` of a config.json.

    Raises:
        ConfigError: it can't be read.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: missing; a model directory has a config.json")
    return str(read_object(path, ConfigError).get("model_type", ""))


def _bytes_of(tensor: torch.Tensor) -> Any:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()

"""What a manifest says about the files of a backend, checked before they are opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from liquidc.errors import EngineError
from liquidc.records import from_json

if TYPE_CHECKING:
    from liquidc.manifest import Manifest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OnnxArtifact:
    """The graphs of an engine for ONNX Runtime.

    Attributes:
        model: file name of the main graph.
        weights: how many tensors the graphs share.
        nodes: how many nodes a graph has, by file name if there are several.
        paths: depth paths that have graphs of their own, a digit for each gate.
        codes_read_by: the operators that read quantized weights.
        guard: the expected path; see `liquidc.cost.guard_info`.
    """

    model: str
    weights: int
    nodes: Any
    paths: tuple[str, ...] = ()
    codes_read_by: tuple[str, ...] = ()
    guard: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One tensor in weights.bin.

    Attributes:
        dtype: its type, as the IR writes it.
        shape: its sizes.
        offset: its first byte.
        holds: the weight expression that it was computed from.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    holds: str


@dataclass(frozen=True, slots=True)
class NullArtifact:
    """The files of an engine for the interpreter.

    Attributes:
        module: file name of the IR.
        weights: the tensors in weights.bin, by name.
        guard: the expected path; see `liquidc.cost.guard_info`.
    """

    module: str
    weights: dict[str, IndexEntry]
    guard: dict[str, Any] | None = None


def read_artifact(kind: type[T], engine: Path, manifest: Manifest) -> T:
    """What the manifest of `engine` says about its backend's files.

    Raises:
        EngineError: it does not say that.
    """
    try:
        return from_json(kind, manifest.artifact, "artifact")
    except ValueError as error:
        raise EngineError(f"{engine}: the manifest is malformed ({error})") from None


def listed(engine: Path, manifest: Manifest, name: str) -> Path:
    """The file `name` of an engine; only files whose hashes were compared may be opened.

    Raises:
        EngineError: the manifest does not list it.
    """
    if name not in manifest.files:
        raise EngineError(f"{engine}: the manifest names {name!r:.80}, which it does not list")
    return engine / name

"""What a manifest says about the files of a backend, checked before they are opened."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from liquidc.errors import EngineError
from liquidc.records import from_json, read_object

if TYPE_CHECKING:
    from liquidc.manifest import Manifest, TensorSpec

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


@dataclass(frozen=True, slots=True)
class NodeTable:
    """What the nodes of one graph count, by their names; see `backends.onnxruntime.nodes`."""

    regions: dict[str, tuple[int, ...]]
    experts: dict[str, tuple[int, ...]]
    fused: dict[str, int]
    tokens: tuple[str, ...]
    path: dict[str, str]


def read_nodes(path: Path, manifest: Manifest, model: str) -> dict[str, Any]:
    """The table of the nodes of a graph, checked against `NodeTable` and the manifest.

    Args:
        path: the file with the tables of all graphs.
        manifest: of the engine.
        model: file name of the graph.

    Raises:
        EngineError: there is no such table, or it names gates or experts that are not there.
    """
    told = read_object(path, EngineError).get(model)
    try:
        table = from_json(NodeTable, told)
    except ValueError as error:
        raise EngineError(f"{path}: not the nodes of {model} ({error})") from None
    gates = range(len(manifest.model.gates))
    layers = {info.layer for info in manifest.model.experts}
    pairs: list[tuple[Container[int], tuple[int, ...]]]
    pairs = [(gates, pair) for pair in table.regions.values()]
    pairs += [(layers, pair) for pair in table.experts.values()]
    pairs += [(layers, (layer, 0)) for layer in table.fused.values()]
    if not all(len(pair) == 2 and pair[0] in known for known, pair in pairs):
        raise EngineError(
            f"{path}: the nodes of {model} are of gates or experts that are not there"
        )
    return cast("dict[str, Any]", told)


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


def check_signature(
    engine: Path,
    manifest: Manifest,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    function: str = "prefill",
) -> None:
    """Compare what a graph takes and returns with the manifest, which callers go by.

    Args:
        engine: the directory, for messages.
        manifest: of the engine.
        inputs: of the graph.
        outputs: of the graph; it may have others that the manifest does not name.
        function: what the graph computes.

    Raises:
        EngineError: a name, an element type or a size differs.
    """
    entry, cache, model = manifest.functions.get(function), manifest.cache, manifest.model
    shape = () if cache is None else cache.shape
    buffers = set[str]() if cache is None else set(cache.buffers)
    sizes = {"gates": len(model.gates), "gate_p": len(model.gates)}
    returned = {spec.name: spec for spec in outputs}
    fits = (
        entry is not None
        and all(_same(spec, entry.input(spec.name)) for spec in inputs)
        and all(_same(spec, returned.get(spec.name)) for spec in entry.outputs)
        and all(_same(spec, spec, shape) for spec in inputs if spec.name in buffers)
        and {spec.name for spec in inputs if spec.name.startswith("past.")} == buffers
        and "logits" in returned
        and returned["logits"].shape[-1] in (model.vocabulary, None)
        and all(returned[name].shape[:1] == (n,) for name, n in sizes.items() if name in returned)
    )
    if not fits:
        raise EngineError(f"{engine}: the manifest does not describe its {function}")


def _same(a: TensorSpec, b: TensorSpec | None, shape: Sequence[int | str] | None = None) -> bool:
    """Whether element types are equal, and dimensions where both are sizes."""
    if b is None:
        return False
    wanted = b.shape if shape is None else shape
    pairs = zip(a.shape, wanted, strict=False)
    known = all(x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int))
    return a.dtype == b.dtype and len(a.shape) == len(wanted) and known

"""manifest.json: what an engine is, what it needs and which bytes it consists of.

The manifest is a function of the inputs alone: no time, no host, no absolute path. It is written
in one canonical form and sealed with its own hash, so that every changed byte is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

from liquidc.errors import EngineError
from liquidc.records import canonical, from_json, parse_json, to_json

FORMAT = "liquidc-engine"
SCHEMA = 2
"""Version of the engine directory. A loader refuses every other one."""

MANIFEST = "manifest.json"
MAX_BYTES = 64 * 1024 * 1024
"""A manifest larger than this is refused unread."""
MAX_LAYERS = 65_536
"""Layers of a model."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an entry point; a dimension is a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One function of the engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input `name`, if the function has it."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output `name`, if the function has it."""
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One of the regions that a gate opens: code that is run if one of its tokens runs.

    Attributes:
        number: among the regions of the gate.
        lowering: a `branch` computes all tokens of a call if one of them runs, `compact` those
            that run.
        masks: the gates that decide which tokens run: those that all of them let run. Empty if
            something else decides too.
        within: the regions around it, by their masks: it is reached if a token runs each of them.
        without: conditionals in whose other arm it stands, by their masks: it is reached if no
            token runs them.
        shown: whether a profile shows how many tokens it computed, and decisions say how many.
    """

    number: int
    lowering: str
    masks: tuple[int, ...]
    within: tuple[tuple[int, ...], ...] = ()
    without: tuple[tuple[int, ...], ...] = ()
    shown: bool = True


@dataclass(frozen=True, slots=True)
class GateInfo:
    """One depth gate; its index in the list is its index in `gate_force` and `gates`.

    `fixed` is 1 or -1 if the gate was decided at compile time: to run for all tokens, or for none.
    `regions` are what it opens; none are left where all tokens are computed under the gate's mask.
    """

    layer: int
    threshold: float
    compare: str
    reserved: int = 0
    fixed: int = 0
    regions: tuple[RegionInfo, ...] = ()

    @property
    def lowering(self) -> str:
        """`branch`, `compact` or `mask`: of several regions, that which computes most tokens."""
        lowerings = {region.lowering for region in self.regions} or {"mask"}
        return "branch" if "branch" in lowerings else lowerings.pop()


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """The sparse experts of one layer.

    `shared` further experts, numbered after the others, are used by every token: a shared expert
    that was fused with them. `places` says, by the number that results give an expert, which of the
    engine's experts computes it; it is empty where that is the same number. The last `identity` of
    the experts give back their input: nothing computes them.
    """

    layer: int
    experts: int
    per_token: int
    shared: int = 0
    places: tuple[int, ...] = ()
    identity: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the model that a runtime needs."""

    sha256: str
    type: str
    layers: int
    vocabulary: int
    gates: tuple[GateInfo, ...]
    experts: tuple[ExpertInfo, ...]
    context: int | None = None


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """The key/value cache: per layer a `key` and a `value` of `shape` and a length per row.

    The layers in `absent` never attend: they have no key and value, and their lengths say nothing.
    """

    layers: int
    dtype: str
    shape: tuple[int | str, ...]
    policy: str
    absent: tuple[int, ...] = ()

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the arguments that hold it: `past.3.key` and so on."""
        present = [layer for layer in range(self.layers) if layer not in self.absent]
        return tuple(f"past.{layer}.{part}" for layer in present for part in ("key", "value"))


@dataclass(frozen=True, slots=True)
class PassInfo:
    """A pass that ran, with its options and what it had to say."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    facts: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CostInfo:
    """Bytes of weights that one token reads.

    `always` is read by every token, `run` and `skip` by gate when the gate's layer runs or is
    skipped, so that any depth level can be priced. Experts count with the k that a token uses.
    """

    always: int
    run: tuple[int, ...]
    skip: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of manifest.json, its format and seal apart."""

    schema: int
    liquidc: str
    model: ModelInfo
    target: dict[str, str]
    passes: tuple[PassInfo, ...]
    functions: dict[str, EntryPoint]
    files: dict[str, FileInfo]
    tools: dict[str, str]
    cost: CostInfo
    artifact: dict[str, Any]
    cache: CacheInfo | None = None
    fidelity: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The file: canonical JSON with format and seal."""
        body = {"format": FORMAT, **to_json(self)}
        return canonical({**body, "seal": _seal(body)})

    @property
    def sha256(self) -> str:
        """Hash of the file, which stands for the whole engine."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@contextmanager
def reading_facts() -> Generator[None]:
    """Read what passes said into the manifest, which no type describes: also a decorator.

    Raises:
        EngineError: it is not what a compile writes.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineError(
            "the engine does not say about its passes what is read here "
            f"({type(error).__name__}: {error!s:.80}); compile it again"
        ) from None


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: the file.
        where: its path, for messages.

    Raises:
        EngineError: it is no manifest, of a newer schema, malformed, or changed after it was
            written.
    """
    body = parse_json(data, where, EngineError)
    entries = cast(dict[str, Any], body) if isinstance(body, dict) else {}
    if entries.get("format") != FORMAT:
        raise EngineError(f"{where}: not the manifest of a liquidc engine")
    schema = entries.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise EngineError(
            f"{where}: schema {schema} is newer than {SCHEMA}, the newest that this liquidc "
            "reads; update liquidc or compile the engine again"
        )
    if type(schema) is int and 0 < schema < SCHEMA:
        raise EngineError(
            f"{where}: schema {schema} is older than {SCHEMA}, the only one that this liquidc "
            "reads; compile the engine again"
        )
    if schema != SCHEMA:
        raise EngineError(f"{where}: schema must be {SCHEMA}, not {schema!r}")
    try:
        written = canonical(entries)
        seal = entries.pop("seal", None)
        sealed = written == data and seal == _seal(entries)
    except ValueError:  # NaN or infinity, which `canonical` never writes
        sealed = False
    if not sealed:
        raise EngineError(f"{where}: changed after it was written; compile the engine again")
    entries.pop("format")
    try:
        manifest = from_json(Manifest, entries)
        _check(manifest)
    except ValueError as error:
        raise EngineError(f"{where}: {error}") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Check what types can't say.

    Raises:
        ValueError: a value is out of range, or contradicts another.
    """
    model, cache = manifest.model, manifest.cache
    for name in manifest.files:
        if not is_safe_name(name):
            raise ValueError(f"the file name {name!r:.80} leads out of the engine")
    if "prefill" not in manifest.functions:
        raise ValueError("functions have no prefill")
    if not 0 <= model.layers <= MAX_LAYERS or model.vocabulary < 1 or (model.context or 1) < 1:
        raise ValueError("model.layers, model.vocabulary or model.context is out of range")
    for number, gate in enumerate(model.gates):
        if not _is_gate(gate, model):
            raise ValueError(f"model.gates[{number}] is not a gate of this model")
    for number, info in enumerate(model.experts):
        counts = (info.per_token, info.shared, info.identity)
        if not 0 <= info.layer < model.layers or not all(0 <= n <= info.experts for n in counts):
            raise ValueError(f"model.experts[{number}] are not experts of this model")
        if info.places and len(info.places) < info.experts - info.identity:
            raise ValueError(f"model.experts[{number}].places lack an expert")
    if {len(manifest.cost.run), len(manifest.cost.skip)} != {len(model.gates)}:
        raise ValueError("cost does not have an entry for each gate")
    if cache is not None:
        if not 0 <= cache.layers <= MAX_LAYERS:
            raise ValueError(f"cache.layers is not from 0 to {MAX_LAYERS}")
        if not all(dim in ("B", "S") or (type(dim) is int and dim > 0) for dim in cache.shape):
            raise ValueError("cache.shape is not of B, S and sizes")


def _is_gate(gate: GateInfo, model: ModelInfo) -> bool:
    """Whether a gate and its regions name layers and gates of the model."""
    regions = gate.regions
    named = {n for r in regions for masks in (r.masks, *r.within, *r.without) for n in masks}
    return (
        0 <= gate.layer < model.layers
        and gate.compare in ("gt", "ge")
        and gate.fixed in (-1, 0, 1)
        and {region.lowering for region in regions} <= {"branch", "compact", "mask"}
        and named <= set(range(len(model.gates)))
    )


def is_safe_name(name: str) -> bool:
    """True for a plain relative path in POSIX form: no `.`, `..`, backslash or drive."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and not path.is_absolute()
        and str(path) == name
        and ".." not in path.parts
        and not any(character in name for character in "\\:\0")
        and name not in (".", MANIFEST)
    )


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()

"""Declares the null target: `link` drops unused weights, `engine` writes module.ir and weights.bin.

Every part of a compile runs with it, on any machine; what it computes is the interpreter's answer,
against which other targets are tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc.backends.artifact import NullArtifact, listed, read_artifact
from liquidc.backends.base import Backend, Runner, RunnerOptions, Stage, StageContext, StoredWeight
from liquidc.backends.weights_file import NAME, stored_weights, write_weights
from liquidc.ir import Module, ops, parse_module, print_module
from liquidc.ir.weights import Stored, sizes

if TYPE_CHECKING:
    from liquidc.manifest import Manifest

MODULE = "module.ir"
FORMAT = "1"
"""Version of module.ir and weights.bin; an engine of another one is refused."""


def link(module: Module, context: StageContext) -> Module:
    """Keep the weights that a function uses, in the order of their first use."""
    del context
    linked = module.clone()
    used = dict.fromkeys(op.weight for op in linked.walk() if isinstance(op, ops.Weight))
    linked.weights = {name: linked.weights[name] for name in used}
    return linked


def write_engine(module: Module, context: StageContext) -> dict[str, Any]:
    """Write both files; returns where each weight lies in weights.bin."""
    path = context.directory / NAME
    offsets = write_weights(path, module.weights, context.source, context.advance, context.journal)
    index = {
        name: {
            "dtype": str(expr.type.dtype),
            "shape": list(sizes(expr.type.shape)),
            "offset": offsets[name],
            "holds": str(expr),
        }
        for name, expr in module.weights.items()
    }
    written = module.clone()
    written.weights = {name: Stored(name, expr.type) for name, expr in module.weights.items()}
    (context.directory / MODULE).write_text(print_module(written), encoding="utf-8")
    return {"module": MODULE, "weights": index}


def load_module(path: Path) -> Module:
    """Read IR text.

    Raises:
        IRError: it is not valid.
    """
    return parse_module(path.read_text(encoding="utf-8"), str(path))


def dump_module(module: Module, path: Path) -> None:
    """Write IR text."""
    path.write_text(print_module(module), encoding="utf-8")


class NullBackend(Backend):
    """The null target."""

    name = "null"
    summary = "IR text run by the interpreter: slow, exact, needs no device"
    functions = ("prefill", "decode")
    leaves_out = ("choose-lowering",)
    stages = (
        Stage("link", ".ir", link, dump_module, load_module),
        Stage("engine", "", write_engine),
    )

    def availability(self) -> str | None:
        """Always."""
        return None

    def target(self) -> dict[str, str]:
        """Name and format."""
        return {"name": self.name, "format": FORMAT}

    def refuses(self, target: Mapping[str, str]) -> str | None:
        """Another format."""
        if target.get("format") != FORMAT:
            return f"it has format {target.get('format')}, this liquidc reads {FORMAT}"
        return None

    def tools(self) -> dict[str, str]:
        """None but the frontend's."""
        return {}

    def stored_weights(self, engine: Path, manifest: Manifest) -> dict[str, StoredWeight]:
        """What the manifest's index says."""
        index = read_artifact(NullArtifact, engine, manifest).weights
        text = "".join(
            f"weight @{name} : {entry.dtype}[{', '.join(map(str, entry.shape))}] = {entry.holds}\n"
            for name, entry in index.items()
        )
        weights = parse_module(f"module @stored\n{text}", "the manifest's weights").weights
        offsets = {name: entry.offset for name, entry in index.items()}
        return stored_weights(listed(engine, manifest, NAME), weights, offsets)

    def runner(self, engine: Path, manifest: Manifest, options: RunnerOptions) -> Runner:
        """The interpreter; options change nothing."""
        from liquidc.backends.null.runner import NullRunner

        del options
        return NullRunner(engine, manifest)


BACKEND = NullBackend()

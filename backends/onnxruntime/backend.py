"""Declares the ONNX Runtime target: `lower` makes the graph, `engine` writes it and its weights."""

from __future__ import annotations

import importlib.metadata as metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc.backends.base import (
    Backend,
    Choices,
    Runner,
    RunnerOptions,
    Stage,
    StageContext,
    StoredWeight,
)
from liquidc.backends.weights_file import NAME, stored_weights, write_weights
from liquidc.errors import InputError
from liquidc.ir import Module, ops
from liquidc.ir.weights import WeightExpr, sizes

if TYPE_CHECKING:
    from liquidc.backends.onnxruntime.emit import Lowered
    from liquidc.manifest import Manifest

MODEL = "model.onnx"
NODES = "nodes.json"
"""Which nodes of the graphs count what; see `nodes`."""
MANY_EXPERTS = 512
"""Experts of all layers from which an operator for each is slower than one for each layer.

A product of no rows takes 0.4 to 0.9 µs of every step. With 8 layers of 128 experts, int4, width
32, one thread: 1.05 ms a token apart, 0.26 ms fused.
"""
OPSETS = "ai.onnx 24, com.microsoft 1"


def lower_module(module: Module, context: StageContext) -> Lowered:
    """IR to ONNX, weights still lazy."""
    from liquidc.backends.onnxruntime.emit import lower

    return lower(module, choices=context.choices)


def dump_lowered(lowered: Lowered, path: Path) -> None:
    """Write the graph alone."""
    path.write_bytes(lowered.model.SerializeToString(deterministic=True))


def load_lowered(path: Path) -> Lowered:
    """Read a graph that `dump_lowered` wrote.

    Raises:
        InputError: it is none.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from liquidc.backends.onnxruntime.emit import read_lowered

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise InputError(f"{path}: not an ONNX model") from None
    if not model.graph.output:
        raise InputError(f"{path}: an ONNX model without outputs; give the dump of the stage lower")
    return read_lowered(model)


def write_engine(lowered: Lowered, context: StageContext) -> dict[str, Any]:
    """Write weights.bin, model.onnx that points into it, and what its nodes are."""
    from liquidc.backends.onnxruntime.emit import place, readers
    from liquidc.backends.onnxruntime.nodes import write_nodes

    path = context.directory / NAME
    offsets = write_weights(path, lowered.weights, context.source, context.advance, context.journal)
    model = place(lowered, NAME, offsets)
    (context.directory / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    write_nodes(context.directory, {MODEL: model.graph})
    codes = {"codes_read_by": found} if (found := readers(model)) else {}
    return {"model": MODEL, "weights": len(offsets), "nodes": len(model.graph.node), **codes}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    summary = "one ONNX graph with a conditional for each gated layer, for ONNX Runtime on CPU"
    functions = ("prefill",)
    # Each expert is a conditional of its own here, and a shared expert needs none: fused, decoding
    # takes 2 % longer (docs/facts.md).
    leaves_out = ("fuse-shared-experts",)
    choices = ("portable_weights", "fused_experts")
    stages = (
        Stage("lower", ".onnx", lower_module, dump_lowered, load_lowered),
        Stage("engine", "", write_engine),
    )

    def availability(self) -> str | None:
        """Needs exactly one of the two packages, in the version that was measured."""
        cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
        if cpu and gpu:
            return "onnxruntime and onnxruntime-gpu overwrite one another: uninstall one of them"
        if not cpu and not gpu:
            return "onnxruntime is not installed: pip install 'liquidc[cpu]'"
        if [int(part) for part in (cpu or gpu or "").split(".")[:2]] < [1, 32]:
            return f"onnxruntime {cpu or gpu} is older than 1.32: pip install 'liquidc[cpu]'"
        return None

    def target(self) -> dict[str, str]:
        """The operator sets, and the oldest ONNX Runtime that has them."""
        return {"name": self.name, "opsets": OPSETS, "onnxruntime": ">=1.32", "provider": "cpu"}

    def refuses(self, target: Mapping[str, str]) -> str | None:
        """Other operator sets, or no ONNX Runtime here."""
        if target.get("opsets") != OPSETS:
            return f"it needs {target.get('opsets')}, this liquidc runs {OPSETS}"
        return self.availability()

    def tools(self) -> dict[str, str]:
        """What writes the graph."""
        return {"onnx": metadata.version("onnx")}

    def hint(self, module: Module, choices: Choices) -> str | None:
        """Many experts are faster as one operator for each layer, where there is one for them."""
        from liquidc.backends.onnxruntime.emit_qmoe import refusal

        main = module.functions["prefill"].body.walk()
        found = [op for op in main if isinstance(op, ops.GroupedExperts)]
        count = sum(sizes(op.gate_up.shape[:1])[0] for op in found)
        if choices.fused_experts or choices.portable_weights or count < MANY_EXPERTS:
            return None
        if any(refusal(op) for op in found):
            return None
        return (
            f"{count} experts become {2 * count} products in the graph; --fused-experts makes them "
            f"{len(found)} operators: a smaller graph and faster steps, but a profile can't tell "
            "which experts ran"
        )

    def stored_weights(self, engine: Path, manifest: Manifest) -> dict[str, StoredWeight]:
        """The initialisers of all graphs, by the expressions in their documentation."""
        import onnx

        from liquidc.backends.onnxruntime.emit import read_lowered
        from liquidc.backends.onnxruntime.settle import stored, weight_name

        weights: dict[str, WeightExpr] = {}
        offsets: dict[str, int] = {}
        for name in sorted(name for name in manifest.files if name.endswith(".onnx")):
            model = onnx.load(engine / name, load_external_data=False)
            weights |= read_lowered(model).weights
            for tensor in stored(model.graph):
                told = {entry.key: entry.value for entry in tensor.external_data}
                offsets[weight_name(tensor)] = int(told["offset"])
        return stored_weights(engine / NAME, weights, offsets)

    def runner(self, engine: Path, manifest: Manifest, options: RunnerOptions) -> Runner:
        """A session with the cache bound in place."""
        from liquidc.backends.onnxruntime.runner import OrtRunner

        return OrtRunner(engine, manifest, options)


BACKEND = OnnxRuntimeBackend()

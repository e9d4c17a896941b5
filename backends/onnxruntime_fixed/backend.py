"""Declares the target of ONNX graphs without control flow: one masked, and one for each hot path.

For execution providers that refuse `If` (MIGraphX, onnxruntime issues 31978 and 29778).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from liquidc.backends.base import Runner, RunnerOptions, Stage, StageContext
from liquidc.backends.onnxruntime.backend import MODEL, OnnxRuntimeBackend
from liquidc.backends.weights_file import NAME, write_weights
from liquidc.ir import Module
from liquidc.ir.weights import WeightExpr

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from liquidc.backends.onnxruntime.emit import Lowered
    from liquidc.manifest import Manifest

PATH = "path_"


def lower_module(module: Module, context: StageContext) -> dict[str, Lowered]:
    """Every function as a graph, by name."""
    from liquidc.backends.onnxruntime.emit import lower

    return {
        name: lower(module, name, branching=False, choices=context.choices)
        for name in module.functions
    }


def write_engine(graphs: dict[str, Lowered], context: StageContext) -> dict[str, Any]:
    """Write weights.bin, which all graphs share, the graphs, and what their nodes are."""
    from liquidc.backends.onnxruntime.emit import place, readers
    from liquidc.backends.onnxruntime.nodes import write_nodes

    weights: dict[str, WeightExpr] = {}
    for lowered in graphs.values():
        weights |= lowered.weights
    path = context.directory / NAME
    offsets = write_weights(path, weights, context.source, context.advance, context.journal)
    nodes: dict[str, int] = {}
    codes: set[str] = set()
    written: dict[str, onnx.GraphProto] = {}
    for name, lowered in graphs.items():
        model = place(lowered, NAME, offsets)
        file = MODEL if name == "prefill" else f"{name}.onnx"
        (context.directory / file).write_bytes(model.SerializeToString(deterministic=True))
        nodes[file] = len(model.graph.node)
        codes.update(readers(model))
        written[file] = model.graph
    write_nodes(context.directory, written)
    paths = [name.removeprefix(PATH) for name in graphs if name.startswith(PATH)]
    told = {"codes_read_by": sorted(codes)} if codes else {}
    return {"model": MODEL, "weights": len(offsets), "nodes": nodes, "paths": paths, **told}


class OnnxRuntimeFixedBackend(OnnxRuntimeBackend):
    """ONNX Runtime without control flow."""

    name = "onnxruntime-fixed"
    summary = "ONNX graphs without control flow, one for each hot depth path and one masked"
    pipeline = (
        "fold-constants",
        "eliminate-common",
        "hoist-common",
        "fold-identity-experts",
        "stack-experts",
        "group-experts",
        "fix-depth",
        "fuse-linear",
        "fold-constants",
        "eliminate-common",
        "eliminate-dead",
    )
    skips = False
    stages = (Stage("lower", "", lower_module), Stage("engine", "", write_engine))

    def runner(self, engine: Path, manifest: Manifest, options: RunnerOptions) -> Runner:
        """Sessions of all graphs, and what chooses among them."""
        from liquidc.backends.onnxruntime_fixed.runner import FixedRunner

        return FixedRunner(engine, manifest, options)


BACKEND = OnnxRuntimeFixedBackend()

"""What nodes are, as data: marks on nodes of the graph, and the engine's table made of them.

ONNX Runtime's profiler reports names of nodes. `nodes.json` says for each graph which of them count
something, so that nothing has to be read out of a name::

    {"model.onnx": {
      "regions": {NAME: [gate, region]},        the product whose rows are the region's tokens
      "experts": {NAME: [layer, expert]},       the first product of an expert
      "fused": {NAME: layer},                   the experts of a layer as one operator
      "tokens": [NAME],                         the look-up of the embedding
      "path": {NAME: "try" | "hit" | "miss"}}}  code for an expected path, and what follows it

The marks are `metadata_props` of nodes, which any change of the graph keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from liquidc.backends.onnxruntime.backend import NODES
from liquidc.backends.onnxruntime.tidy import arms

KEY = "liquidc"
PRODUCTS = ("Gemm", "MatMulNBits")
"""Operators that `emit_quantised.product` makes."""
HIT_OR_MISS = {"then_branch": "hit", "else_branch": "miss"}
SUMS = ("QMoE", "ReduceSum")
"""The last operators of experts, whose first input has a row for each token."""


def mark(node: onnx.NodeProto, role: str, *numbers: int) -> None:
    """Say what a node counts, or what a conditional is: a role, and numbers that belong to it."""
    node.metadata_props.add(key=KEY, value=json.dumps([role, *numbers]))


def mark_witness(nodes: Sequence[onnx.NodeProto], gate: int, region: int) -> None:
    """Mark, of the nodes of a region's witness, the one whose rows are the tokens computed."""
    for kinds in (PRODUCTS, SUMS):
        if found := [node for node in nodes if node.op_type in kinds]:
            mark(found[-1], "gate", gate, region)
            return


def mark_expert(nodes: Sequence[onnx.NodeProto], layer: int | None, expert: int) -> None:
    """Mark, of the nodes of an expert, the first product."""
    if layer is not None and (found := [node for node in nodes if node.op_type in PRODUCTS]):
        mark(found[0], "expert", layer, expert)


def node_table(graph: onnx.GraphProto) -> dict[str, Any]:
    """The names of marked nodes, those in arms among them, and what they count."""
    regions: dict[str, list[int]] = {}
    experts: dict[str, list[int]] = {}
    fused: dict[str, int] = {}
    tokens: list[str] = []
    path: dict[str, str] = {}
    for node in _nodes(graph):
        for role, *numbers in _marks(node):
            match role:
                case "gate" if node.op_type != "If":
                    regions[node.name] = numbers
                case "expert" if node.op_type != "If":
                    experts[node.name] = numbers
                case "fused":
                    (fused[node.name],) = numbers
                case "tokens":
                    tokens.append(node.name)
                case "path" | "commit":
                    part = {"then_branch": "try"} if role == "path" else HIT_OR_MISS
                    for arm in (each for each in node.attribute if each.name in part):
                        path |= {inner.name: part[arm.name] for inner in _nodes(arm.g)}
                case _:
                    pass
    return {
        "regions": regions,
        "experts": experts,
        "fused": fused,
        "tokens": tokens,
        "path": path,
    }


def write_nodes(directory: Path, graphs: Mapping[str, onnx.GraphProto]) -> None:
    """Write the table of graphs by their file."""
    tables = {file: node_table(graph) for file, graph in graphs.items()}
    text = json.dumps(tables, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (directory / NODES).write_text(text + "\n", encoding="utf-8")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for arm in arms(node):
            yield from _nodes(arm)


def _marks(node: onnx.NodeProto) -> Iterator[list[Any]]:
    yield from (json.loads(entry.value) for entry in node.metadata_props if entry.key == KEY)

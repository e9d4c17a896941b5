"""Gives arms inside arms codes of their own.

ONNX Runtime 1.32 rearranges weights for its kernels while loading, but not for a node two
conditionals deep whose weight the model's graph holds: there `MatMulNBits` decodes the weight in
every run, 25 times slower (docs/facts.md). An initialiser of the arm itself is rearranged.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from liquidc.backends.onnxruntime.tidy import arms

PACKED = ("MatMulNBits", "QMoE")
"""Operators that need their weights rearranged."""
AGAIN = "#"
"""What follows the name of a weight where another graph holds it too."""


def settle(graph: onnx.GraphProto) -> None:
    """Move weights that only arms inside arms read there; a graph around that reads one keeps it.

    The same bytes stand behind every initialiser of a weight, so an engine stores it once.
    """
    held = {tensor.name: tensor for tensor in graph.initializer if tensor.doc_string}
    deep: set[str] = set()
    kept = _reads(graph, 0, deep)
    _give(graph, 0, held, deep, kept)
    left = [t for t in graph.initializer if t.name not in deep or t.name in kept]
    del graph.initializer[:]
    graph.initializer.extend(left)


def weight_name(tensor: onnx.TensorProto) -> str:
    """The name of the weight that an initialiser holds."""
    return tensor.name.partition(AGAIN)[0]


def stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initialisers that hold weights, which say so in their documentation; of arms too."""
    yield from (tensor for tensor in graph.initializer if tensor.doc_string)
    for node in graph.node:
        for arm in arms(node):
            yield from stored(arm)


def _reads(graph: onnx.GraphProto, depth: int, deep: set[str]) -> set[str]:
    """What the model's graph must go on to hold; adds to `deep` what arms will hold."""
    kept: set[str] = set()
    for node in graph.node:
        if depth >= 2 and node.op_type in PACKED:
            deep.update(node.input)
        else:
            kept.update(node.input)
        for arm in arms(node):
            kept |= _reads(arm, depth + 1, deep)
    return kept


def _give(
    graph: onnx.GraphProto,
    depth: int,
    held: dict[str, onnx.TensorProto],
    deep: set[str],
    kept: set[str],
) -> None:
    for node in graph.node:
        if depth >= 2 and node.op_type in PACKED:
            for place, name in enumerate(node.input):
                if name in held and name in deep:
                    tensor = onnx.TensorProto()
                    tensor.CopyFrom(held[name])
                    tensor.name = f"{name}{AGAIN}" if name in kept else name
                    node.input[place] = tensor.name
                    if tensor.name not in {known.name for known in graph.initializer}:
                        graph.initializer.append(tensor)
        for arm in arms(node):
            _give(arm, depth + 1, held, deep, kept)

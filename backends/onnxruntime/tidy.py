"""Takes nodes out of an ONNX graph that compute nothing new, in arms too.

Ops are lowered one by one, so shapes are made again in every arm, reshapes follow reshapes, and
what a fused operator replaced stays behind. A decode step of a small model runs hundreds of nodes
of a microsecond each; ONNX Runtime's own optimiser does not look across the graphs of an If.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

CHEAP = {"Reshape", "Cast", "Squeeze", "Unsqueeze", "Shape", "Min"}
"""What is moved out of two arms or more that all compute it: nothing that takes time."""
Key = tuple[Any, ...]


def tidy(graph: onnx.GraphProto) -> None:
    """Change a graph in place; what it computes and the names of its outputs stay."""
    _name_outputs(graph)
    _drop_unused(graph)
    _lift(graph)
    _shorten(_Scope(graph))
    _drop_unused(graph)
    _sink(graph)
    _drop_constants(graph)


@dataclass
class _Scope:
    """A graph, what it can see, and what was made in it so far.

    Attributes:
        graph: the graph.
        outer: the graph around an arm.
        known: first output of a node by what the node computes.
        makers: the node that makes a value.
        constants: the integers of small initialisers.
    """

    graph: onnx.GraphProto
    outer: _Scope | None = None
    known: dict[Key, onnx.NodeProto] = field(default_factory=dict[Key, onnx.NodeProto])
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict[str, onnx.NodeProto])
    constants: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])

    def __post_init__(self) -> None:
        for tensor in self.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1:
                self.constants[tensor.name] = numpy_helper.to_array(tensor)

    def scopes(self) -> Iterator[_Scope]:
        """This one and those around it."""
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that made a value."""
        return next((s.makers[name] for s in self.scopes() if name in s.makers), None)

    def same(self, key: Key) -> onnx.NodeProto | None:
        """A node before that computes the same."""
        return next((s.known[key] for s in self.scopes() if key in s.known), None)

    def constant(self, name: str) -> NDArray[Any] | None:
        """A shape that is known."""
        return next((s.constants[name] for s in self.scopes() if name in s.constants), None)

    def shape(self, sizes: Sequence[int]) -> str:
        """The name of a constant shape."""
        *_, top = self.scopes()
        for name, array in top.constants.items():
            if array.tolist() == list(sizes):
                return name
        name = f"shape_{'_'.join(map(str, sizes))}"
        array = np.array(sizes, np.int64)
        top.constants[name] = array
        top.graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def arms(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node."""
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _key(node: onnx.NodeProto) -> Key:
    told = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
    return (node.domain, node.op_type, tuple(node.input), len(node.output), tuple(told))


def _name_outputs(graph: onnx.GraphProto) -> None:
    """Let what goes to a result through Identity have the result's name."""
    made = {name for node in graph.node for name in node.output} - {""}  # left out
    results = {output.name for output in graph.output}
    names: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        source = node.input[0] if node.op_type == "Identity" else ""
        free = source in made and source not in results and source not in names
        if free and node.output[0] in results:
            names[source] = node.output[0]
        else:
            kept.append(node)
    _set_nodes(graph, kept)
    _rename(graph, names, outputs=True)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str], *, outputs: bool = False) -> None:
    """Other names for values, in arms too."""
    if not names:
        return
    for node in graph.node:
        _replace(node, names)
        if outputs:
            node.output[:] = [names.get(name, name) for name in node.output]
        for arm in arms(node):
            _rename(arm, names, outputs=outputs)
            for output in arm.output:
                output.name = names.get(output.name, output.name)


def _replace(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for place, name in enumerate(node.input):
        if name in names:
            node.input[place] = names[name]


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _lift(graph: onnx.GraphProto) -> None:
    """Move what several arms compute from the same values to before the first of them."""
    for node in graph.node:
        for arm in arms(node):
            _lift(arm)
    while True:
        visible = {name for node in graph.node for name in node.output}
        visible |= {value.name for value in graph.input}
        visible |= {tensor.name for tensor in graph.initializer}
        counts: Counter[Key] = Counter()
        for node in graph.node:
            counts.update({_key(inner) for inner in _cheap(node, visible)})
        often = {key for key, count in counts.items() if count > 1}
        if not often:
            return
        nodes: list[onnx.NodeProto] = []
        lifted: dict[Key, str] = {}
        for node in graph.node:
            names: dict[str, str] = {}
            for inner in _cheap(node, visible):
                if (key := _key(inner)) not in often:
                    continue
                if key not in lifted:
                    lifted[key] = inner.output[0]
                    nodes.append(onnx.NodeProto.FromString(inner.SerializeToString()))
                names[inner.output[0]] = lifted[key]
            for arm in arms(node):
                left = [inner for inner in arm.node if inner.output[0] not in names]
                _set_nodes(arm, left)
                _rename(arm, names)
            nodes.append(node)
        _set_nodes(graph, nodes)


def _cheap(node: onnx.NodeProto, visible: set[str]) -> list[onnx.NodeProto]:
    """Nodes directly in the arms of a node that could stand before it."""
    return [
        inner
        for arm in arms(node)
        for inner in arm.node
        if inner.op_type in CHEAP
        and set(inner.input) <= visible
        and not {output.name for output in arm.output} & set(inner.output)
    ]


def _shorten(scope: _Scope) -> None:
    """Reshapes of reshapes become one; what was computed before is not computed again."""
    graph = scope.graph
    results = {output.name for output in graph.output}
    names: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        _replace(node, names)
        _through(scope, node)
        key = _key(node)
        before = scope.same(key) if not arms(node) else None
        if before is not None and not results & set(node.output):
            names |= dict(zip(node.output, before.output, strict=True))
            continue
        for arm in arms(node):
            _rename(arm, names)
            _shorten(_Scope(arm, scope))
        kept.append(node)
        scope.known.setdefault(key, node)
        scope.makers |= dict.fromkeys(node.output, node)
    _set_nodes(graph, kept)


def _through(scope: _Scope, node: onnx.NodeProto) -> None:
    """Let a Reshape read what the Reshape before it reads."""
    while node.op_type == "Reshape":
        before = scope.maker(node.input[0])
        if before is None or before.op_type != "Reshape":
            return
        wanted = scope.constant(node.input[1])
        if wanted is not None and 0 in wanted:  # sizes of the Reshape before
            middle = scope.constant(before.input[1])
            if middle is None:
                return
            sizes = wanted.tolist()
            for place in [n for n, size in enumerate(sizes) if size == 0]:
                if place >= len(middle) or middle[place] == -1:
                    return
                sizes[place] = int(middle[place])
            node.input[1] = scope.shape(sizes)
        node.input[0] = before.input[0]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Take out nodes that nothing reads, in arms first."""
    for node in graph.node:
        for arm in arms(node):
            _drop_unused(arm)
    wanted = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= _reads(node)
    _set_nodes(graph, kept[::-1])


def _sink(graph: onnx.GraphProto) -> None:
    """Move what only one arm reads into it, where it is computed only when the arm runs."""
    results = {output.name for output in graph.output}
    here = (-1, -1)
    readers: dict[str, set[tuple[int, int]]] = {name: {here} for name in results}
    moved: dict[tuple[int, int], list[onnx.NodeProto]] = {}
    kept: list[onnx.NodeProto] = []
    for place, node in reversed(list(enumerate(graph.node))):
        places = set[tuple[int, int]]().union(*(readers.get(out, ()) for out in node.output if out))
        if not arms(node) and len(places) == 1 and here not in places:
            (target,) = places
            moved.setdefault(target, []).append(node)
        else:
            target = here
            kept.append(node)
        for name in node.input:
            readers.setdefault(name, set()).add(target)
        for number, arm in enumerate(arms(node)):
            read = {output.name for output in arm.output}.union(*map(_reads, arm.node))
            for name in read:
                readers.setdefault(name, set()).add((place, number))
    for (place, number), nodes in moved.items():
        arm = arms(graph.node[place])[number]
        _set_nodes(arm, [*nodes[::-1], *arm.node])
    _set_nodes(graph, kept[::-1])
    for node in graph.node:
        for arm in arms(node):
            _sink(arm)


def _drop_constants(graph: onnx.GraphProto) -> None:
    """Take out constants that nothing reads; weights, which lie elsewhere, stay."""
    read = set().union(*map(_reads, graph.node))
    kept = [t for t in graph.initializer if t.name in read or t.doc_string]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node and its arms read."""
    inner = (_reads(each) for arm in arms(node) for each in arm.node)
    outs = {output.name for arm in arms(node) for output in arm.output}
    return set(node.input).union(outs, *inner) - {""}

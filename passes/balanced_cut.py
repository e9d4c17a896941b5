"""Balanced minimum cut of a small weighted graph: greedy growth, then swaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from networkx import Graph


def graph_of(weights: Sequence[Sequence[int]]) -> Graph[int]:
    """The complete graph whose edges have the weights of a symmetric matrix."""
    from networkx import Graph

    graph: Graph[int] = Graph()
    graph.add_nodes_from(range(len(weights)))
    for i, row in enumerate(weights):
        graph.add_weighted_edges_from((i, j, row[j]) for j in range(i))
    return graph


def cut_weight(graph: Graph[int], parts: Sequence[Sequence[int]]) -> int:
    """The weight of the edges between parts."""
    from networkx import cut_size

    return sum(
        cut_size(graph, a, b, weight="weight") for i, a in enumerate(parts) for b in parts[:i]
    )


def balanced_parts(graph: Graph[int], count: int) -> list[list[int]]:
    """The nodes in `count` parts of one size, with little weight between them.

    Every part is grown from the heaviest node left by the node that is tied to it most; then two
    nodes of different parts are swapped as long as that makes the cut lighter. Of equal choices the
    lower numbers are taken, so the result is always the same: each part in the order of its nodes,
    the parts in the order of their first. If that is no better than the order of the nodes, the
    result is that order.
    """
    size, nodes = len(graph) // count, sorted(graph)
    start = [nodes[i : i + size] for i in range(0, len(nodes), size)]
    found = [_Parts(graph, parts).swapped() for parts in (start, _grown(graph, size))]
    return min(found, key=lambda parts: cut_weight(graph, parts))


def _grown(graph: Graph[int], size: int) -> list[list[int]]:
    free, parts = sorted(graph), list[list[int]]()
    while free:
        ties, part = {node: _weight(graph, node, free) for node in free}, list[int]()
        while len(part) < size:
            node = max(free, key=lambda n: (ties[n], -n))
            free.remove(node)
            ties = {n: graph[n][node]["weight"] + (ties[n] if part else 0) for n in free}
            part.append(node)
        parts.append(part)
    return parts


def _weight(graph: Graph[int], node: int, others: Sequence[int]) -> int:
    """The weight between a node and others."""
    edges = graph[node]
    return sum(edges[other]["weight"] for other in others if other != node)


class _Parts:
    """A division of the nodes, and by node the weight between it and every part."""

    def __init__(self, graph: Graph[int], parts: Sequence[Sequence[int]]) -> None:
        self.graph, self.count = graph, len(parts)
        self.part = {node: number for number, part in enumerate(parts) for node in part}
        self.ties = {node: [_weight(graph, node, part) for part in parts] for node in graph}

    def swapped(self) -> list[list[int]]:
        """The parts after swaps, of which none is left that makes the cut lighter."""
        nodes, better = sorted(self.graph), True
        while better:
            better = False
            for a in nodes:
                others = [b for b in nodes if self.part[b] != self.part[a]]
                b = max(others, key=lambda b: (self._gain(a, b), -b))
                if self._gain(a, b) > 0:
                    self._swap(a, b)
                    better = True
        return sorted([n for n in nodes if self.part[n] == i] for i in range(self.count))

    def _gain(self, a: int, b: int) -> int:
        """How much lighter the cut gets when two nodes of different parts change places."""
        ours, theirs = self.part[a], self.part[b]
        moved = self.ties[a][theirs] - self.ties[a][ours]
        moved += self.ties[b][ours] - self.ties[b][theirs]
        return moved - 2 * self.graph[a][b]["weight"]

    def _swap(self, a: int, b: int) -> None:
        ours, theirs = self.part[a], self.part[b]
        for moved, old, new in ((a, ours, theirs), (b, theirs, ours)):
            for node, edge in self.graph[moved].items():
                self.ties[node][old] -= edge["weight"]
                self.ties[node][new] += edge["weight"]
            self.part[moved] = new

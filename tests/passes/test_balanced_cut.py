"""Balanced cuts: against all divisions of small graphs, and of graphs that were made of groups."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from liquidc.passes.balanced_cut import balanced_parts, cut_weight, graph_of

Matrix = list[list[int]]


def weights(count: int, rng: random.Random, groups: int = 1) -> Matrix:
    """Random pairs; with groups, pairs of nodes that have the same remainder are heavy."""
    made = [[0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            near = groups > 1 and i % groups == j % groups
            made[i][j] = made[j][i] = rng.randrange(100, 200) if near else rng.randrange(50)
    return made


def divisions(nodes: Sequence[int], size: int) -> Iterator[list[list[int]]]:
    """Every way to divide nodes into parts of one size."""
    if not nodes:
        yield []
        return
    first, *rest = nodes
    for mask in range(1 << len(rest)):
        part = [first, *(n for i, n in enumerate(rest) if mask >> i & 1)]
        if len(part) == size:
            for others in divisions([n for n in rest if n not in part], size):
                yield [part, *others]


@pytest.mark.parametrize(("count", "groups"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
def test_it_comes_close_to_the_lightest_cut(count: int, groups: int) -> None:
    lightest = 0
    for seed in range(30):
        graph = graph_of(weights(count, random.Random(seed)))
        parts = balanced_parts(graph, groups)
        assert sorted(n for part in parts for n in part) == list(range(count))
        assert {len(part) for part in parts} == {count // groups}
        assert parts == sorted(sorted(part) for part in parts)
        ways = divisions(range(count), count // groups)
        best = min(cut_weight(graph, way) for way in ways)
        assert best <= cut_weight(graph, parts) <= 1.15 * best
        lightest += cut_weight(graph, parts) == best
    assert lightest >= 15


@pytest.mark.parametrize(("count", "groups"), [(16, 2), (60, 4), (128, 8)])
def test_groups_that_there_are_are_found(count: int, groups: int) -> None:
    graph = graph_of(weights(count, random.Random(count), groups))
    assert balanced_parts(graph, groups) == [list(range(g, count, groups)) for g in range(groups)]


def test_what_can_not_get_lighter_stays_in_order() -> None:
    for together in ([[0] * 6] * 6, [[int(i != j) for j in range(6)] for i in range(6)]):
        assert balanced_parts(graph_of(together), 3) == [[0, 1], [2, 3], [4, 5]]


def test_part_of_a_graph_can_be_divided() -> None:
    graph = graph_of(weights(8, random.Random(0), 2))
    assert balanced_parts(graph.subgraph(range(4, 8)), 2) == [[4, 6], [5, 7]]


def test_the_weight_of_a_cut() -> None:
    graph = graph_of([[0, 1, 2, 4], [1, 0, 8, 16], [2, 8, 0, 32], [4, 16, 32, 0]])
    assert cut_weight(graph, [[0, 1], [2, 3]]) == 2 + 4 + 8 + 16
    assert cut_weight(graph, [[0, 1, 2, 3]]) == 0

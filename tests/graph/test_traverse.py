"""Parents before children, and what can be reached."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from nnj.graph.traverse import reachable, topological

#   0 -> 1 -> 3 -> 4,   0 -> 2 -> 3,   5 -> 2
EDGES = {0: [1, 2], 1: [3], 2: [3], 3: [4], 4: [], 5: [2]}


def test_parents_come_first_and_each_node_once():
    assert topological([0], EDGES.__getitem__) == [0, 1, 2, 3, 4]
    assert topological([0, 5], EDGES.__getitem__) == [5, 0, 1, 2, 3, 4]
    assert topological([], EDGES.__getitem__) == []


@pytest.mark.parametrize("seed", range(5))
def test_any_graph(seed):
    draw = random.Random(seed)
    edges = {n: [m for m in range(n + 1, 40) if draw.random() < 0.1] for n in range(40)}
    roots = draw.sample(range(40), 4)
    order = topological(roots, edges.__getitem__)
    at = {node: position for position, node in enumerate(order)}
    assert len(at) == len(order) and set(at) == set(reachable(roots, edges.__getitem__))
    assert all(at[n] < at[m] for n in order for m in edges[n])


def test_a_chain_deeper_than_python_allows():
    following = lambda n: [n + 1] if n < 100_000 else []
    assert topological([0], following) == list(range(100_001))


def test_roots_are_asked_for_one_after_the_other():
    seen = []

    def children(n):
        seen.append(n)
        return EDGES[n]

    roots = iter([0, 5])
    topological((seen.append("next") or root for root in roots), children)
    assert seen == ["next", 0, 2, 3, 4, 1, "next", 5]


def test_what_is_reached_is_asked_for_as_it_is_needed():
    endless = lambda n: [n + 1]
    assert list(islice(reachable([0], endless), 3)) == [0, 1, 2]
    assert sorted(reachable([5], EDGES.__getitem__)) == [2, 3, 4, 5]

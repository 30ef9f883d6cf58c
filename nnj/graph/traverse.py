"""The two ways in which a graph without circles is gone through, without recursion: parents before
children, and everything that can be reached."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

from nnj.graph.nodes import edges
from nnj.recording.records import MARK, CallMark, Edge

T = TypeVar("T", bound=Hashable)


def topological(roots: Iterable[T], children: Callable[[T], Iterable[T]]) -> list[T]:
    """All that the roots lead to, each node before its children (depth first, reversed
    postorder).

    `children` is asked once for each node, when the node is first met. Roots may be made lazily:
    the next one is asked for when all that the former ones lead to has been met."""
    order: list[T] = []
    met: set[T] = set()
    for root in roots:
        stack = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                order.append(node)
            elif node not in met:
                met.add(node)
                stack.append((node, True))
                for child in children(node):
                    stack.append((child, False))
    order.reverse()
    return order


def reachable(roots: Iterable[T], children: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """All that the roots lead to, each node once. Lazy: who has seen enough stops asking."""
    met: set[T] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in met:
            met.add(node)
            yield node
            stack += children(node)


def children(node: Any) -> list[Any]:
    """The nodes to which a node sends what it makes of a gradient, behind those of an engine."""
    return [edge[0] for edge in edges(node) if edge is not None]


def marks_behind(roots: Iterable[Edge]) -> Iterator[CallMark]:
    """The outermost calls of models that are first met behind some edges."""
    above: Callable[[Any], list[Any]] = lambda node: [] if _marks(node) else children(node)
    for node in reachable([node for node, _ in roots], above):
        yield from _marks(node)


def all_marks_behind(roots: Iterable[Edge]) -> Iterator[CallMark]:
    """The calls of models behind some edges, also those behind other ones."""
    for node in reachable([node for node, _ in roots], children):
        yield from _marks(node)


def _marks(node: Any) -> list[CallMark]:
    return [
        mark for key, mark in node.metadata.items() if isinstance(key, tuple) and key[0] == MARK
    ]

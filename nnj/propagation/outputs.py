"""Where the samples are in a model's outputs: a sample is a row of their batch axis, in the order
of the input.

The batch axis is the one that was declared, if an output has as many rows there as the input; else
any other reading of the outputs may be right, and samples that do not influence one another tell
which. A model that is called on parts of a batch has the samples of one call behind those of the
one before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from nnj.graph.builder import Graph
from nnj.graph.step import Step
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.plan import device_of
from nnj.recording.records import CallMark, Edge, storage_of

MOST = 64  # ways of reading the outputs of one call


class Trust(IntEnum):
    """How sure a reading is.

    DECLARED: the samples are along the axis that was declared.
    ALIKE: so they are; another axis is as long, as it is in the input.
    LONG: they are along an axis that is as long.
    DIVIDED: samples have several rows each, in an order that has to be found out.
    LAST: they are along the last axis, which mostly is that of features.
    """

    DECLARED = 0
    ALIKE = 1
    LONG = 2
    DIVIDED = 3
    LAST = 4


class Reading(NamedTuple):
    """One way of reading the outputs that a loss is made of.

    Attributes:
        n: the number of samples.
        at: for each edge of an output with samples, whose its entries are.
        trust: how sure it is that row i is sample i.
        mark: the call whose inputs are the samples; None where there are several.
        unsure: why, if not, samples cannot be told apart; "" where that may be found out.
        roots: whose the entries are of what the loss is given, where that does not follow.
        given: how many samples the call was given, where that is not n.
    """

    n: int
    at: dict[Edge, SampleIndex]
    trust: Trust
    mark: CallMark | None
    unsure: str = ""
    roots: dict[Edge, SampleIndex] | None = None
    given: int = 0


class Outputs:
    """The edges of outputs of extended models that are met first, coming from a loss, and what
    stands between.

    Attributes:
        marks: of each such edge the call that has made it.
        calls: the edges by call, in the order of the calls.
        glue: the steps before these edges, in topological order.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.marks: dict[Edge, CallMark] = {}
        glue: set[Step] = set()
        stack, met = list(graph.roots), set[Edge]()
        while stack:
            edge = stack.pop()
            if edge in met:
                continue
            met.add(edge)
            mark = graph.outputs.get(edge)
            if mark is not None:
                self.marks[edge] = mark
                continue
            step = graph.step_at(edge)
            glue.add(step)
            stack += [e for e in step.out if e is not None]
        # an edge may be met behind an output, too: what is before it is no glue then
        self.glue = [step for step in graph.steps if step in glue] if glue else []
        self.calls: dict[CallMark, list[Edge]] = {}
        for edge, mark in sorted(self.marks.items(), key=lambda item: item[1].order):
            self.calls.setdefault(mark, []).append(edge)

    def readings(self) -> Iterator[list[Reading]]:
        """Ways of reading the outputs, the likeliest first, in groups of as many samples."""
        found = {
            mark: list(itertools.islice(_ways(self.graph, mark, edges), MOST))
            for mark, edges in self.calls.items()
        }
        ways = {mark: some for mark, some in found.items() if some}
        if len(ways) > 1:
            yield list(self._joined(ways))
        elif ways:
            yield list(_single(self.graph, *ways.values()))
        if len(self.calls) == 1:
            yield from self._by_earlier_calls({way.n for some in ways.values() for way in some})

    def _by_earlier_calls(self, tried: set[int]) -> Iterator[list[Reading]]:
        """Where parts of a model are called one by one, the first of them was given the samples."""
        ((last, edges),) = self.calls.items()
        for mark in reversed(self.graph.marks):
            for n in mark.sizes if mark is not last else []:
                if n not in tried:
                    tried.add(n)
                    yield list(_single(self.graph, list(_divided(self.graph, mark, edges, n))))

    @property
    def given(self) -> int:
        """How many samples the calls were given, as far as one of them says so; else 0."""
        found = (
            _number(mark, [self.graph.shapes[edge] for edge in edges])
            for mark, edges in self.calls.items()
        )
        return next((n for n in found if n is not None), 0)

    def said(self) -> str:
        """What was taken for a sample, and what to do where that is wrong: for a refusal."""
        if not self.calls:
            return (
                "Each row of what the loss is given was taken for one, since no output of an "
                "extended model is behind it: extend the model as a whole, and call that"
            )
        mark, (edge, *_) = next(reversed(self.calls.items()))
        axis, shape = mark.batch_axis, self.graph.shapes[edge]
        named = f"axis {axis} of the output {shape} of {type(mark.module).__name__}"
        if len(shape) <= axis or shape[axis] not in mark.sizes:
            named = f"{axis} of the input of {type(mark.module).__name__}"
            named = f"axis {named}, whose output is {shape}"
        by = f", as batch_axis={axis} says" if axis else ""
        return (
            f"A sample is a row of {named}{by}. If samples are along another axis, say so with "
            "nnj.extend(model, batch_axis=...), and let the output have them there, too. If all of "
            "it is one sample, such as the nodes of a graph, hand it over as one: extend a module "
            "that is given x[None] and returns model(x[0])[None]"
        )

    # -- several calls -----------------------------------------------------------------------------

    def _joined(self, ways: dict[CallMark, list[_Way]]) -> Iterator[Reading]:
        """Readings of the outputs of several calls: their samples are the same ones, or those of
        one call stand behind those of the one before.
        """
        twice = len({mark.module for mark in ways}) < len(ways)
        for chosen in itertools.islice(itertools.product(*ways.values()), MOST):
            sizes = [way.n for way in chosen]
            number = self._blocks(list(ways), sizes)
            parts = len(set(sizes)) > 1
            if len(set(number)) == 1 or parts:
                yield self._behind(chosen, number)
            elif not twice:
                yield self._behind(chosen, [0] * len(sizes))
            else:
                yield self._behind(chosen, number, PARTS)
                yield self._behind(chosen, [0] * len(sizes), PARTS)

    def _blocks(self, marks: Sequence[CallMark], sizes: Sequence[int]) -> list[int]:
        """For each call the number of the block of samples that it was given; a call on what
        another one has made, or on the same tensor, has the same ones.
        """
        number = list(range(len(marks)))
        for j, later in enumerate(marks):
            for i, earlier in enumerate(marks[:j]):
                if sizes[i] == sizes[j] and (
                    _share_inputs(earlier, later) or self._leads(later, earlier)
                ):
                    number[j] = number[i]
                    break
        return number

    def _leads(self, later: CallMark, earlier: CallMark) -> bool:
        """Whether a call was given what an earlier one has made."""
        ends, stack, met = set(self.calls[earlier]), list(self.calls[later]), set[Edge]()
        while stack:
            edge = stack.pop()
            if edge in ends:
                return True
            if edge not in met:
                met.add(edge)
                stack += [e for e in self.graph.step_at(edge).out if e is not None]
        return False

    def _behind(self, chosen: Sequence[_Way], number: Sequence[int], unsure: str = "") -> Reading:
        """The samples of one block stand behind those of the one before."""
        trust = max(way.trust for way in chosen)
        start: dict[int, int] = {}
        total = 0
        for way, block in zip(chosen, number, strict=True):
            if block not in start:
                start[block] = total
                total += way.n
        at = {
            edge: _index(self.graph, edge, way.n, axis, start[block], total)
            for way, block in zip(chosen, number, strict=True)
            for edge, axis in way.at.items()
        }
        return Reading(total, at, max(trust, Trust.LONG) if unsure else trust, None, unsure)


PARTS = (
    "the model was called several times, on as many samples each, and they may be the same samples "
    "or others. Call it once, on torch.cat of its inputs, or give each call's output to a loss of "
    "its own"
)

# -- the outputs of one call -----------------------------------------------------------------------


class _Way(NamedTuple):
    """Where n samples may be in the outputs of one call."""

    n: int
    at: dict[Edge, SampleAxis]
    trust: Trust
    mark: CallMark


def _single(graph: Graph, ways: Sequence[_Way]) -> Iterator[Reading]:
    for way in ways:
        at = {edge: _index(graph, edge, way.n, axis) for edge, axis in way.at.items()}
        yield Reading(way.n, at, way.trust, way.mark)


def _ways(graph: Graph, mark: CallMark, edges: Sequence[Edge]) -> Iterator[_Way]:
    """The likeliest first."""
    n = _number(mark, [graph.shapes[edge] for edge in edges])
    if n is None:
        return
    along = {edge: _exact(mark, graph.shapes[edge], n) for edge in edges}
    along = {edge: axes for edge, axes in along.items() if axes}
    ways = list(_divided(graph, mark, edges, n))
    for chosen in itertools.product(*along.values()) if along else ():
        at = {edge: SampleAxis(axis, 1) for edge, axis in zip(along, chosen, strict=True)}
        trust = max(_trust(mark, graph.shapes[edge], n, axis.axis) for edge, axis in at.items())
        ways.append(_Way(n, at, trust, mark))
    yield from sorted(ways, key=lambda way: way.trust)


def _number(mark: CallMark, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """How many samples a call was given, of which its outputs give account; None if its arguments
    do not agree about it.
    """
    axis, sizes = mark.batch_axis, mark.sizes
    declared = [shape[axis] for shape in shapes if len(shape) > axis]
    for found in (declared, [size for shape in shapes for size in shape]):
        n = next((size for size in found if size in sizes), None)
        if n is not None:
            return n
    if len(sizes) < 2:
        return next(iter(sizes), None)
    rows = [shape[0] for shape in shapes if shape]
    fit = [n for n in sizes if n > 1 and all(r % n == 0 for r in rows)]
    return fit[0] if len(fit) == 1 else None


def _exact(mark: CallMark, shape: tuple[int, ...], n: int) -> list[int]:
    """The axes of as many entries as there are samples, the declared one first."""
    axes = [i for i, size in enumerate(shape) if size == n]
    return sorted(axes, key=lambda i: i != mark.batch_axis)


def _divided(graph: Graph, mark: CallMark, edges: Sequence[Edge], n: int) -> Iterator[_Way]:
    """Several rows for each sample: one behind the other, or every n-th one."""
    sizes = {edge: graph.shapes[edge][0] for edge in edges if graph.shapes[edge]}
    if n < 1 or not sizes or any(size % n or size == n for size in sizes.values()):
        return
    orders = [{edge: size // n for edge, size in sizes.items()}, dict.fromkeys(sizes, 1)]
    for runs in orders if mark.batch_axis == 0 else reversed(orders):
        yield _Way(n, {edge: SampleAxis(0, run) for edge, run in runs.items()}, Trust.DIVIDED, mark)


def _trust(mark: CallMark, shape: tuple[int, ...], n: int, axis: int) -> Trust:
    """How sure it is that n samples are along an axis."""
    features = len(shape) - 1
    if axis != mark.batch_axis:
        return Trust.LAST if axis == features and max(shape[:-1], default=1) > 1 else Trust.LONG
    others = [
        i for i, size in enumerate(shape) if size == n and i != axis and not axis < i == features
    ]
    if not others:
        return Trust.DECLARED
    end = max([axis, *others]) + 1
    same = any(t.shape[:end] == shape[:end] for t in mark.inputs)
    if end == len(shape) == 2 and any(
        t.dim() == 2 and t.is_floating_point() and t.shape[axis] == n for t in mark.inputs
    ):
        return Trust.DECLARED  # features were in the other axis, too
    return Trust.ALIKE if same else Trust.LONG


def _index(
    graph: Graph, edge: Edge, n: int, along: SampleAxis, start: int = 0, total: int | None = None
) -> SampleIndex:
    """Whose the entries on an edge are, where its samples begin with number `start` of a total."""
    shape, device = graph.shapes[edge], device_of(edge)
    if total in (None, n):
        return SampleIndex.by_axis(n, shape, along, device)
    assert total is not None
    found = SampleIndex.by_axis(n, shape, along, device)
    of = found.of
    if of is None:
        of = torch.arange(shape[0], device=device) // along.run
        of = of.reshape(-1, *[1] * (len(shape) - 1))
    return SampleIndex(total, of + start)


def _share_inputs(one: CallMark, other: CallMark) -> bool:
    """Whether two calls were given the same tensor."""
    given: set[tuple[object, ...]] = {storage_of(t) for t in one.inputs if _is_large(t)}
    return any(_is_large(t) and storage_of(t) in given for t in other.inputs)


def _is_large(t: Tensor) -> bool:
    return t.dim() > 0 and t.numel() > 1

"""The plan of a pass: readings of the model's outputs are tried, likeliest first, until one in
which samples do not influence one another.

A sample is a row of the batch axis of the model's output (`Outputs`); what the loss is given has
its entries from there (`Glue`). Samples that a loss takes together are together in columns, too:
then the sum over samples is exact, and no sample has a share of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from nnj.errors import Coupled
from nnj.graph.builder import Graph
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.evidence import check_apart, evidence_of, touched
from nnj.propagation.glue import Glue, entries_of
from nnj.propagation.outputs import Outputs, Reading, Trust
from nnj.propagation.plan import Assumptions, device_of
from nnj.recording.records import Edge

S = TypeVar("S", bound=Sweep, default=Sweep)
Roots = dict[Edge, SampleIndex]

REARRANGED = (
    "nnj cannot tell which rows of the model's output belong to which sample, since they are not "
    "along its batch axis, or another axis is as long. Let the model give the samples there, such "
    "as (N, T, C) in the place of (N T, C) (what the loss is given may be any view of that), or "
    "hand the input to the first layer as it is given"
)
TOGETHER = (
    "the loss is given entries in which several samples come together, so that no sample has a "
    "share of its own. Give it the outputs themselves, as a function of them (nnj.extend(my_loss))"
)

ONE_BY_ONE = (
    "Products are those of each sample: row n of the output has to be that of row n of the input, "
    "in axis 0. (BatchNorm in training: use model.eval())"
)


@dataclass(eq=False)
class Planned(Generic[S]):
    """A sweep, and whose the entries are.

    Attributes:
        n: how many samples there are.
        roots: for each root edge, whose its entries are: of the samples, or of groups of them.
        at: the same at the model's outputs.
        groups: whether samples were taken together.
        unknown: why what is asked of each sample cannot be had; "" where it can.
        calls: the numbers of the calls whose outputs come first.
    """

    sweep: S
    n: int
    roots: Roots
    at: Roots
    groups: bool = False
    unknown: str = ""
    calls: frozenset[int] = frozenset()

    def together(self, group: Tensor) -> Planned[S]:
        """The same, with samples (or groups of them) taken together.

        Args:
            group: of each the number of its group.
        """
        old, shapes = self.sweep, self.sweep.shapes
        roots, at = (regrouped(of, shapes, group) for of in (self.roots, self.at))
        sweep = type(old)(old.graph, int(group.max()) + 1, roots, old.assume, at)
        return Planned(sweep, self.n, roots, at, True, TOGETHER)


def regrouped(found: Roots, shapes: dict[Edge, tuple[int, ...]], group: Tensor) -> Roots:
    """Whose entries are, by the groups of samples."""
    n, result = int(group.max()) + 1, {}
    for edge, index in found.items():
        of = entries_of(index, shapes[edge], group.device)
        of = torch.where(of < 0, -1, group[of.clamp(min=0)])
        result[edge] = SampleIndex(n, of).tidy() if n > 1 else SampleIndex(1)
    return result


def plan(graph: Graph, rows: Callable[[], int], per_sample: bool) -> Planned:
    """The plan of what a loss sends back.

    Args:
        graph: from the arguments of the loss.
        rows: how many the loss has, which are the samples where no output of an extended model is
            met. It is asked only where it matters.
        per_sample: whether it matters which sample is which. Sums over samples are the same in
            every reading in which samples do not influence one another.

    Errors: `NNJError` if samples influence one another in every reading.
    """
    outputs = Outputs(graph)
    search = _Search(graph, Glue(outputs), Sweep, rows)
    for family in outputs.readings():
        for readings in (family, _by_evidence(graph, outputs, family)):
            found = search.first(readings)
            if found is not None:
                reading, planned = found
                planned.calls = frozenset(mark.order for mark in outputs.calls)
                if per_sample and reading.trust > Trust.DECLARED:
                    planned.unknown = planned.unknown or search.doubt(planned, reading, family)
                return planned
    for reading in (*_without_batch_axis(outputs), _of_rows(graph, outputs, rows())):
        found = search.first([reading])
        if found is not None:
            found[1].unknown = reading.unsure
            return found[1]
    raise search.refused(outputs)


def plan_of_output(
    graph: Graph,
    root: Edge,
    n: int,
    kind: type[S],
    cut: bool,
    check: Callable[[S, Roots], Any] | None = None,
) -> Planned[S]:
    """The plan of what goes back from an output of n rows, each of which is a sample.

    Args:
        kind: of the sweep.
        cut: whether an operand beside the batch may be taken to have no samples.
        check: called with each sweep that may do, and whose the entries of its root are.

    Errors: `Coupled` if samples influence one another.
    """
    at = {root: SampleIndex(n)}
    search = _Search(graph, None, kind, lambda: n, check)
    reading = Reading(n, at, Trust.DECLARED, None, roots=at)
    found = search.first([reading], (False, True) if cut else (False,))
    if found is None:
        raise search.refused(None)
    return found[1]


def assumptions(graph: Graph) -> list[Assumptions]:
    """What a sweep may take for granted, the cheapest first; the rows that bare parameters meet may
    not be those of samples.
    """
    ways = [Assumptions(), Assumptions(probed=True), Assumptions(cut=True)]
    bare = any(step.bare for step in graph.steps)
    return [Assumptions(bare=True), *ways] if bare else ways


# -- the search ------------------------------------------------------------------------------------


class _Search(Generic[S]):
    """Tries readings, and keeps the first refusal.

    Args:
        glue: between the outputs and the loss; None where readings say whose the roots are.
        rows: of the loss, how many there are.
        check: see `plan_of_output`.
    """

    def __init__(
        self,
        graph: Graph,
        glue: Glue | None,
        kind: type[S],
        rows: Callable[[], int],
        check: Callable[[S, Roots], Any] | None = None,
    ):
        self.graph, self.glue, self.kind, self.rows, self.check = graph, glue, kind, rows, check
        self.refusal: Coupled | None = None
        self.by_loss = False  # whether the loss couples what was declared to be samples

    def first(
        self, readings: Sequence[Reading], cuts: Iterable[bool] = (False, True)
    ) -> tuple[Reading, Planned[S]] | None:
        """The first reading that may be right, with its plan. That a second operand has no samples
        (`cut`) is assumed only where all else fails.
        """
        for cut in cuts:
            ways = [way for way in assumptions(self.graph) if way.cut == cut]
            for reading, some in _order(readings, ways):
                planned = self._planned(reading, some)
                if planned is not None:
                    return reading, planned
        return None

    def doubt(self, planned: Planned[S], reading: Reading, family: Sequence[Reading]) -> str:
        """Why it is not known which sample is which; "" if nothing else may be."""
        if self.by_loss:
            return TOGETHER
        straight = reading.trust == Trust.ALIKE and _is_straight(planned.sweep, reading)
        if planned.n == 1 or straight or _is_of_one_call(planned.sweep, reading):
            return ""
        if reading.mark is not None:
            told = evidence_of(self.graph, reading.mark, planned.n)
            if told:
                return "" if all(e.told for e in told) else REARRANGED
        # where bare parameters have columns for each sample, these cannot meet
        bare = planned.sweep.assume.bare
        ways = [way for way in assumptions(self.graph) if not way.cut and way.bare == bare]
        others = (r for r in family if r is not reading and r.trust != Trust.LAST)
        if any(self._planned(other, ways) is not None for other in others):
            return reading.unsure or REARRANGED
        return ""

    def _planned(self, reading: Reading, ways: Sequence[Assumptions]) -> Planned[S] | None:
        for assume in ways:
            try:
                planned = self._under(reading, assume)
                in_order = planned.groups or self._in_order(planned, reading)
            except Coupled as error:
                self.refusal = self.refusal or error
                continue
            return planned if in_order or reading.trust != Trust.DIVIDED else None
        return None

    def _under(self, reading: Reading, assume: Assumptions) -> Planned[S]:
        roots, at, group = reading.roots, reading.at, None
        if roots is None:
            assert self.glue is not None
            roots, group = self.glue.roots(reading)
        if group is not None:
            if self.rows() > 1 and not bool(group.any()):
                self.by_loss = self.by_loss or reading.trust <= Trust.ALIKE
                raise Coupled.at("what the loss is given")
            at = regrouped(at, self.graph.shapes, group)
        n = reading.n if group is None else int(group.max()) + 1
        sweep = self.kind(self.graph, n, roots, assume, at)
        if self.check is not None:
            self.check(sweep, roots)
        return Planned(
            sweep, reading.n, roots, at, group is not None, "" if group is None else TOGETHER
        )

    def _in_order(self, planned: Planned[S], reading: Reading) -> bool:
        given = reading.given or planned.n
        return reading.mark is None or check_apart(planned.sweep, reading.mark, given)

    def refused(self, outputs: Outputs | None) -> Coupled:
        """The error where nothing is left to try."""
        found, self.refusal = self.refusal, None  # its frames hold this one, which would hold it
        assert found is not None
        what = ONE_BY_ONE if outputs is None else outputs.said()
        return Coupled(f"{found}. {what}")


def _order(
    readings: Sequence[Reading], ways: Sequence[Assumptions]
) -> Iterator[tuple[Reading, list[Assumptions]]]:
    """What was declared first; then all readings with samples in the rows of bare parameters, in
    which samples would be seen to mix.
    """
    yield from ((r, list(ways)) for r in readings if r.trust == Trust.DECLARED)
    for bare in (True, False):
        some = [way for way in ways if way.bare == bare]
        yield from ((r, some) for r in readings if r.trust > Trust.DECLARED and some)


def _is_straight(sweep: Sweep, reading: Reading) -> bool:
    """Whether all first layers are on something with the leading axes of what was given to the
    model, and the samples are along the declared axis there.
    """
    if reading.mark is None:
        return False
    axis, inputs = reading.mark.batch_axis, reading.mark.inputs
    along = SampleAxis(axis, 1)
    first = [s for s in sweep.graph.steps if s.record is not None and s.record.edge is None]
    lead: Callable[[torch.Size], torch.Size] = lambda shape: shape[: axis + 1]
    alike = all(
        any(len(x.shape) >= t.dim() > axis and lead(x.shape) == lead(t.shape) for t in inputs)
        for x in (s.record.x for s in first if s.record is not None)
    )
    return bool(first) and alike and all(_is_along(sweep, s.into[0], along) for s in first)


def _is_of_one_call(sweep: Sweep, reading: Reading) -> bool:
    """Whether the samples of several calls are, in order, those of one that came before."""
    if reading.mark is not None:
        return False
    return any(
        edge not in reading.at
        and sweep.n in mark.sizes
        and edge in sweep.state
        and _is_along(sweep, edge, SampleAxis(mark.batch_axis, 1))
        for edge, mark in sweep.graph.outputs.items()
    )


def _is_along(sweep: Sweep, edge: Edge, along: SampleAxis) -> bool:
    """Whether the samples on an edge are along an axis."""
    index, shape = sweep.state[edge], sweep.shapes[edge]
    if index is None or index.by_column or shape[along.axis : along.axis + 1] != (sweep.n,):
        return False
    of = entries_of(index, shape, device_of(edge))
    wanted = SampleIndex.by_axis(sweep.n, shape, along, device_of(edge))
    return bool((of == entries_of(wanted, shape, of.device)).all())


# -- readings of last resort -----------------------------------------------------------------------


def _by_evidence(graph: Graph, outputs: Outputs, family: Sequence[Reading]) -> list[Reading]:
    """Whose the rows of the only output are by the first layers that they touch."""
    first = family[0] if family else None
    if first is None or first.trust < Trust.LONG or first.mark is None or len(outputs.marks) > 1:
        return []
    (edge,) = outputs.marks
    of = touched(graph, edge, first.mark, first.n)
    if of is None:
        return []
    index = SampleIndex(first.n, of.reshape(-1, *[1] * (len(graph.shapes[edge]) - 1)))
    return [Reading(first.n, {edge: index}, Trust.DIVIDED, first.mark)]


def _without_batch_axis(outputs: Outputs) -> list[Reading]:
    """One sample, if the outputs have no axis of the batch."""
    shapes = [outputs.graph.shapes[edge] for edge in outputs.marks]
    sizes = {n for mark in outputs.calls for n in mark.sizes}
    if not shapes or any(len(shape) > 1 or set(shape) & sizes for shape in shapes):
        return []
    given = [t for mark in outputs.calls for t in mark.inputs]
    plain = all(t.dim() < 2 for t in given)
    return [Reading(1, {}, Trust.DECLARED, None, "" if plain else REARRANGED)]


def _of_rows(graph: Graph, outputs: Outputs, rows: int) -> Reading:
    """Each row of the loss by itself: so are samples where no model was met, and sums are exact
    anyway.
    """
    roots, given = dict.fromkeys(graph.roots, SampleIndex(rows)), outputs.given
    mark = next(iter(outputs.calls)) if given and len(outputs.calls) == 1 else None
    unsure = REARRANGED if given else ""
    return Reading(rows, {}, Trust.DECLARED, mark, unsure, roots, given)

"""Steps with J o J in the place of J: what goes through the graph is then the diagonal of a metric.

This is the approximation that the original nnj calls diag_backprop: (J2 J1)o2 is not J2o2 J1o2, so
what is neglected is how the inputs of a layer vary together, and how the uses of one tensor do.
With a second point, J o J' stands in the place of J o J."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from typing_extensions import Self, override

from nnj.errors import NNJError
from nnj.graph.builder import Graph
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import edge_shape
from nnj.graph.squared import squared_backward
from nnj.graph.step import Step, describe
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.linearize import Linearization, Slot
from nnj.propagation.plan import NOTHING, Assumptions
from nnj.recording.records import Edge


class DiagonalSweep(Sweep):
    """The sweep with J o J in the place of J: what goes back is the diagonal of a metric,
    (1, N, *shape).
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        sample_indices: dict[Edge, SampleIndex],
        assume: Assumptions = NOTHING,
        outputs: dict[Edge, SampleIndex] | None = None,
    ):
        self._squared: dict[tuple[Step, str], Jacobian] = {}
        self._partners: dict[Step, Step] = {}
        super().__init__(graph, n, sample_indices, assume, outputs)

    @override
    def operator(self, step: Step, slot: str) -> Jacobian:
        squared = self._squared.get((step, slot))
        if squared is None:
            j, other = step.slots[slot], self.partner(step).slots[slot]
            squared = j.square() if j is other else j.times(other)
            self._squared[step, slot] = squared
        return squared

    @override
    def backward(self, step: Step, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        return squared_backward(step, args, k, self.graph.paths, self._partners.get(step))

    def paired(self, other: Self) -> Self:
        """The same with J o J', J' being J at another point. Errors: `NNJError` if the model takes
        another way there.
        """
        sweep = copy.copy(self)
        sweep._squared, sweep._partners = {}, _partners(self.graph, other.graph)
        return sweep

    def partner(self, step: Step) -> Step:
        """The step at the other point."""
        return self._partners.get(step, step)


def linearize_diagonal(module: nn.Module, x: Tensor, wrt: Slot) -> Linearization[DiagonalSweep]:
    """A module at x, for products that keep the diagonal alone between layers. The squares of
    matrix products are those of autograd's nodes.
    """
    return Linearization(module, x, wrt, DiagonalSweep, matmuls=False)


def _partners(one: Graph, two: Graph) -> dict[Step, Step]:
    """For each step that of the other graph, if the graphs are alike."""
    mine, theirs = one.steps, two.steps
    same = len(mine) == len(theirs) and all(map(_alike, mine, theirs))
    partners = dict(zip(mine, theirs, strict=True)) if same else {}
    if not same or any(
        partners.get(one.step_at(a)) is not two.step_at(b)
        for step, partner in partners.items()
        for a, b in zip(step.out, partner.out, strict=True)
        if a is not None and b is not None
    ):
        raise NNJError(
            "the model does other operations at x1 than at x2, so diag_backprop has no mixed "
            "term there. Leave out diag_backprop"
        )
    return partners


def _alike(a: Step, b: Step) -> bool:
    """Whether two steps do the same at two points."""
    same = a.record.module is b.record.module if a.record and b.record else a.record is b.record
    shapes = [edge_shape(e) for e in a.into] == [edge_shape(e) for e in b.into]
    ways = [e is None for e in a.out] == [e is None for e in b.out]
    return same and a.name == b.name and shapes and ways and (a.leaf is None) == (b.leaf is None)


# -- the ends, where nothing is neglected ----------------------------------------------------------


def one_row_each(sweep: Sweep, step: Step, edge: Edge, remedy: str) -> None:
    """Errors: `NNJError` unless a step has one row for each sample, in order."""
    sample_index = sweep.sample_index(edge, step)
    if (
        sample_index.of is not None
        or (sample_index.by_column and sweep.n > 1)
        or edge_shape(edge)[0] != sweep.n
    ):
        raise NNJError(
            "diag_backprop takes full matrices only where a layer has one row for each sample, "
            f"which {describe(step, sweep.graph.paths)} has not. {remedy}"
        )


def through(step: Step, nr: int, columns: Tensor) -> list[Tensor | None]:
    """Columns at output nr of a raw node, sent to its operands."""
    args: list[Tensor | None] = [None] * len(step.node._input_metadata)
    args[nr] = columns
    return call_node(step.node, args, columns.shape[0])


def to_last_layer(
    sweep: Sweep,
    edge: Edge,
    points: Sequence[Callable[[Step], Step]],
    rows: Sequence[Tensor],
    stop: Edge | None = None,
) -> tuple[int, Edge, list[Tensor]]:
    """Rows (d, N, *outputs) go back from the output, exactly, through raw nodes with one operand,
    as far as such lead: mostly to the last layer.

    Args:
        points: what gives the step to go through, for each of `rows`.
        stop: go no further than to this edge.

    Returns: the number of the step to which they have come, on which edge, and as what.
    """
    for number, step in enumerate(sweep.graph.steps):
        i = _only_operand(sweep, step)
        if edge == stop or i is None:
            return number, edge, list(rows)
        back = []
        for at, t in zip(points, rows, strict=True):
            sent = through(at(step), edge[1], t)[i]
            if sent is not None:
                back.append(sent)
        below = step.out[i]
        assert below is not None
        if len(back) < len(rows) or tuple(back[0].shape[1:]) != edge_shape(below):
            return number, edge, list(rows)
        rows, edge = back, below
    raise AssertionError("a graph ends in a layer or in a leaf")


def _only_operand(sweep: Sweep, step: Step) -> int | None:
    """The number of the one operand of a raw node with one output, through which samples stay
    apart.
    """
    wanted = [i for i, e in enumerate(step.out) if e is not None]
    if step.record is not None or len(wanted) != 1 or len(step.into) != 1:
        return None
    route = sweep.routes[step][wanted[0]]
    by_column = step in sweep.by_column and sweep.n > 1  # of one sample all columns are its own
    return None if by_column or route is None or route.way != "together" else wanted[0]


def input_edge(sweep: Sweep, at: Linearization[DiagonalSweep]) -> Edge | None:
    """The edge on which the model takes its input: behind the view that keeps the leaf from being
    written over.
    """
    steps = sweep.graph.steps
    leaf = next((step for step in steps if step.leaf is at.x), None)
    if leaf is None:
        return None
    (edge,) = leaf.into
    views = [step for step in steps if edge in step.out]
    viewed = len(views) == 1 and views[0].name in ("View", "Alias")
    return views[0].into[0] if viewed else edge


@contextmanager
def checkpoints_refused() -> Iterator[None]:
    """Errors: `NNJError` where what goes on inside reads a checkpoint's tensor again."""
    try:
        yield
    except CheckpointError as error:
        raise NNJError(
            "diag_backprop cannot go on at torch.utils.checkpoint, whose tensors may be read "
            "only once in a pass. Leave out the checkpoint, or diag_backprop"
        ) from error


def unit_columns(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The columns (d, N, *rest) of the identity on a tensor of shape (N, *rest), with d entries in
    each row.
    """
    n, *rest = shape
    d = torch.Size(rest).numel()
    eye = torch.eye(d, dtype=dtype, device=device)
    return eye.reshape(d, 1, *rest).expand(d, n, *rest)

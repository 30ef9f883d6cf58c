"""The sweep of some of the samples.

Where a loss is sure of most samples, all but its first columns are zero at these. Then layers with
a rule are asked for the Jacobians of the other samples alone, x[of] and y[of], and columns walk
there in that length, as through the commonest nodes of autograd. All others, which have saved all
samples, are given zeros at those that are not there.

Which steps can be asked so is tried on random numbers, once for each structure, before it is
believed (`right`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.graph.node_vjp import known_of_some
from nnj.graph.nodes import own_task
from nnj.graph.step import Step, describe
from nnj.jacobians.factor import Factor
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Cotangents, Sink, Sweep
from nnj.propagation.plan import device_of
from nnj.propagation.trials import Trials, close
from nnj.propagation.verification import coarsest, signature
from nnj.recording.records import Edge
from nnj.registry.layer_rules import Declined, ask_rule


class SweepOfSome(Sweep):
    """Columns of some samples; factors at the parameters of `narrow` steps have these alone.

    Args:
        whole: the sweep of all samples.
        narrow: the steps at which columns are those of some, as `narrow_steps` finds them.
        of: the numbers of these samples, (M,), ascending.
    """

    def __init__(self, whole: Sweep, narrow: Iterable[Step], of: Tensor):
        self.__dict__.update(vars(whole))  # what is known of all samples holds for some
        self.of, self.narrow = of, set(narrow)
        some = SampleIndex(len(of))
        self._edges = {edge for step in self.narrow for edge in step.into}
        self.state = whole.state | dict.fromkeys(self._edges, some)
        self._from: Step | None = None  # the narrow step that is being crossed

    def begin(self, edge: Edge, v: Tensor) -> Tensor:
        """Columns (k, M, ...) of these samples, as they stand on an edge here."""
        if edge in self._edges or len(self.of) == self.n:
            return v
        return self._spread(edge, v)

    def _spread(self, edge: Edge, v: Tensor) -> Tensor:
        return v.new_zeros(len(v), *self.shapes[edge]).index_copy_(1, self.of, v)

    @override
    def cross(self, step: Step, values: Cotangents, k: int, use: Sink | None) -> None:
        if step not in self.narrow or step.into[0] not in values:
            super().cross(step, values, k, use)
            return
        self._from = step if step.record is None else self._layer(step)
        if step.record is None:
            self._narrow_node(step, values)
        else:
            super().cross(self._from, values, k, use)
        self._from = None

    def _narrow_node(self, step: Step, values: Cotangents) -> None:
        found = own_task(lambda: _through(self, step, values.take(step.into[0]), self.of))
        assert found is not None
        for i, (edge, share) in enumerate(zip(step.out, found, strict=False)):
            if edge is not None and share is not None:
                self._send(step, i, share, values)

    def _layer(self, step: Step) -> Step:
        """A layer with some samples alone. It is not kept: x[of] is a copy."""
        record = step.record
        point = None if record is None else record.working_point()
        assert record is not None and point is not None
        x, y = (t.index_select(0, self.of) for t in point)
        said = ask_rule(record.entry, record.module, x, y, self.graph.paths)
        if isinstance(said, Declined) or not step.slots.keys() <= said.jacobians.keys():
            raise NNJError(
                f"the rule of {describe(step, self.graph.paths)} declined for some samples what it "
                "gave for all. Let it decide by the module and the shapes, not by numbers"
            )
        return dataclasses.replace(step, slots=said.jacobians)

    @override
    def input_shape(self, step: Step) -> tuple[int, ...]:
        shape = super().input_shape(step)
        return (len(self.of), *shape[1:]) if step is self._from else shape

    @override
    def _select(self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> bool:
        return step.out[0] not in self._edges and super()._select(step, arrived, values)

    @override
    def _send(
        self, step: Step, i: int, v: Tensor, values: Cotangents, is_new: bool = False
    ) -> None:
        edge, come = step.out[i], self._from is not None
        assert edge is not None
        if edge in self._edges and not come:
            v = v.index_select(1, self.of)
        elif come and edge not in self._edges:
            v, is_new = self._spread(edge, v), False
        super()._send(step, i, v, values, is_new)


def _through(sweep: Sweep, step: Step, v: Tensor, of: Tensor) -> list[Tensor | None] | None:
    ends = [() if edge is None else sweep.shapes[edge] for edge in step.out]
    return known_of_some(step.node, v, of, ends)


def narrow_steps(
    whole: Sweep, steps: Sequence[Step], own: Iterable[Sequence[Tensor]]
) -> list[Step]:
    """The steps among some at which columns may be those of some samples.

    Args:
        whole: the sweep of all samples.
        own: parameters that have results together, such as those of one module: their factors have
            the same samples.
    """
    found = {step for step in steps if _may_be_narrow(whole, step)}
    ends: dict[Tensor, Step] = {p: step for step in found for _, p in step.params}
    for group in own:
        at = {ends[p] for p in group if p in ends}
        others = any(p in whole.uses and p not in ends for p in group)
        if len(at) > 1 or (at and others):
            found -= at
    return [step for step in steps if step in found]


def _may_be_narrow(whole: Sweep, step: Step) -> bool:
    if step in whole.by_column or step.leaf is not None or len(step.into) != 1 or step.bare:
        return False
    routes = [route for route in whole.routes[step] if route is not None]
    if not routes or any(route.way != "together" for route in routes):
        return bool(step.record) and not step.out[0] and _takes_some(whole, step)
    edges = [edge for edge in (*step.into, *step.out) if edge is not None]
    if any(whole.state[e] is not whole.in_order or whole.shapes[e][0] != whole.n for e in edges):
        return False
    if step.record is not None:
        return _takes_some(whole, step)
    (into,) = step.into
    none = torch.empty(0, dtype=torch.long, device=device_of(into))
    v = none.new_empty((1, 0, *whole.shapes[into][1:]), dtype=whole.graph.dtypes[into])
    return own_task(lambda: _through(whole, step, v, none)) is not None


def _takes_some(whole: Sweep, step: Step) -> bool:
    """Whether the rule of a layer may be asked for some of its rows."""
    record = step.record
    assert record is not None
    if (
        record.parallel
        or record.entry.is_fallback
        or whole.state[step.into[0]] is not whole.in_order
    ):
        return False
    if any(whole.uses[p] > 1 for _, p in step.params):
        return False
    point = record.working_point()
    return point is not None and all(t.dim() > 0 and len(t) == whole.n for t in point)


# -- trying it -------------------------------------------------------------------------------------

_tried = Trials()


def right(
    whole: Sweep, narrow: Sequence[Step], edge: Edge, steps: Sequence[Step], owner: nn.Module | None
) -> bool:
    """Whether random columns of half of the samples give what they give in the whole sweep; tried
    once for each structure.

    Args:
        whole, narrow: as in `SweepOfSome`.
        edge: where columns begin.
        steps: those that they go through.
        owner: the model with which what was tried is forgotten.
    """
    number = {step: i for i, step in enumerate(whole.graph.steps)}
    key = (signature(whole), tuple(number[s] for s in narrow), number[steps[0]])
    rules = [step.record.entry for step in narrow if step.record is not None]
    return _tried.answer(owner, key, rules, lambda: _same(whole, narrow, edge, steps))


def _same(whole: Sweep, narrow: Sequence[Step], edge: Edge, steps: Sequence[Step]) -> bool:
    generator, device = OwnGenerator.seeded(), device_of(edge)
    shape, dtype = whole.shapes[edge], whole.graph.dtypes[edge]
    of = torch.randperm(whole.n, generator=generator)[: whole.n // 2].sort()[0].to(device)
    part = 2, len(of), *shape[1:]
    size = torch.rand(part, generator=generator, dtype=torch.float64) + 0.5
    v = (size * (torch.rand(part, generator=generator) - 0.5).sign()).to(device, dtype)
    mine, others = dict[Tensor, Factor](), dict[Tensor, Factor]()
    some = SweepOfSome(whole, narrow, of)
    try:
        some.run({edge: some.begin(edge, v)}, 2, mine.__setitem__, list(steps))
    except Exception:  # of a rule, which was asked for a call that was never made
        return False
    whole.run(
        {edge: v.new_zeros(2, *shape).index_copy_(1, of, v)}, 2, others.__setitem__, list(steps)
    )
    if mine.keys() != others.keys():
        return False
    eps = coarsest(whole) ** 0.5
    for p, factor in mine.items():
        squares = others[p].square_sum()
        if not close(factor.square_sum(), squares, eps):
            return False
        one, other = (f.rmatvec(torch.ones(2, f.n).to(squares)) for f in (factor, others[p]))
        if not close(one, other, eps, squares.max().sqrt()):
            return False
    return True

"""The sweep: columns of the loss's curvature walk backwards over autograd's graph, and become
factors at the parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnj.errors import Coupled, NNJError
from nnj.graph.builder import Graph
from nnj.graph.matmul import product_backward
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import edge_dtype, edge_shape, own_task, signed, sum_to
from nnj.graph.step import Step, describe
from nnj.jacobians.factor import DenseFactor, Factor, merge_uses
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.cotangents import Cotangents
from nnj.propagation.plan import Plan
from nnj.propagation.probe import Probe
from nnj.propagation.sample_axes import split
from nnj.recording.records import Edge
from nnj.registry.blame import blame
from nnj.registry.layer_rules import checked

Sink = Callable[[Tensor, Factor], None]


class Sweep(Plan):
    """Walks over a graph as its plan says, of which a probe finds out what the names of nodes do
    not tell.
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        sample_indices: dict[Edge, SampleIndex],
        probed: bool = False,
        cut: bool = False,
        bare: bool = False,
    ):
        super().__init__(graph, n, sample_indices, probed, cut, bare)
        # what the probe said, with entries that are nobody's
        self.found: dict[Edge, SampleIndex] = {}
        self.checked: set[Edge] = set()
        self.uses: dict[int, int] = {}
        for step in graph.steps:
            for _, p in step.params:
                self.uses[id(p)] = self.uses.get(id(p), 0) + 1
            if step.leaf is not None:
                self.uses[id(step.leaf)] = self.uses.get(id(step.leaf), 0) + 1
        if None in self.state.values():
            own_task(lambda: self._find_sample_indices(sample_indices))

    def _find_sample_indices(self, roots: dict[Edge, SampleIndex]) -> None:
        """Run the probe and write down the owners of all edges that are not known by the names of
        nodes alone.
        """
        found: dict[Edge, SampleIndex] = {}
        values = Cotangents()
        probe, k = Probe(self.n), 0
        for edge, sample_index in roots.items():
            like = torch.empty((), dtype=edge_dtype(edge), device=self._device(edge))
            values[edge] = probe.columns(sample_index, edge_shape(edge), like)
            k = len(values[edge])
        for step in self.graph.steps:
            if step in self.by_column:
                self._settle(step, values, found, probe)
                continue
            if (
                step.params
                or step.leaf is not None
                or any((step, i) in self.reduced | self.split for i in range(len(step.out)))
            ):
                self._settle(step, values, found, probe)
            self._walk_step(step, values, k, None, probing=True)
        for edge, sample_index in found.items():
            self.found[edge], tidy = sample_index, sample_index.tidy()
            self.state[edge] = self.plain if tidy.of is None else tidy

    def _settle(
        self, step: Step, values: Cotangents, found: dict[Edge, SampleIndex], probe: Probe
    ) -> None:
        for edge in step.into:
            if self.state[edge] is None and edge in values:
                found[edge] = probe.sample_index(values[edge], describe(step, self.graph.paths))
        for edge in step.into:
            if step in self.by_column:
                values.pop(edge, None)

    # -- what a unit is: overridden where something else than J walks ------------------------------

    def operator(self, step: Step, slot: str) -> Jacobian:
        """The operator of a record in one slot."""
        return step.slots[slot]

    def backward(self, step: Step, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        """What a raw node sends to its operands for k columns."""
        if step.bare and args[0] is not None:
            return product_backward(step.node, args[0])
        return call_node(step.node, args, k)

    # -- walking -----------------------------------------------------------------------------------

    def run(
        self, roots: dict[Edge, Tensor], k: int, sink: Sink, steps: list[Step] | None = None
    ) -> dict[Edge, Tensor]:
        """Let k columns walk from the roots; `sink` is given each parameter with the factor of all
        its uses.

        Args:
            roots: for each root edge its columns, (K, *shape).
            k: K.
            sink: called once for each parameter that was reached.
            units: walk through these alone.

        Returns:
            What stands on edges whose units were not walked.
        """
        values = Cotangents({edge: v.to(edge_dtype(edge)) for edge, v in roots.items()})
        pending: dict[int, tuple[Tensor, list[Factor]]] = {}

        def use(p: Tensor, factor: Factor) -> None:
            parts = pending.setdefault(id(p), (p, []))[1]
            parts.append(factor)
            if len(parts) == self.uses[id(p)]:
                sink(p, merge_uses(pending.pop(id(p))[1]))

        def walk() -> None:
            for step in self.graph.steps if steps is None else steps:
                self._walk_step(step, values, k, use)
            for p, parts in pending.values():  # to some of its uses nothing was sent
                sink(p, merge_uses(parts))

        own_task(walk)
        return values

    def watch(
        self, roots: dict[Edge, Tensor], k: int, steps: list[Step]
    ) -> list[tuple[Step, Tensor]]:
        """What arrives at some records, without any factor."""
        values, seen = Cotangents(roots), []

        def walk() -> None:
            for step in self.graph.steps:
                if step in steps and step.into[0] in values:
                    seen.append((step, values[step.into[0]]))
                self._walk_step(step, values, k, None)

        own_task(walk)
        return seen

    def _walk_step(
        self, step: Step, values: Cotangents, k: int, use: Sink | None, probing: bool = False
    ) -> None:
        arrived = {e: values.take(e) for e in step.into if e in values}
        if not arrived:
            return
        if step in self.by_column and not probing:
            arrived = {e: split(v, self._sample_index(e, step, v)) for e, v in arrived.items()}
        if step.leaf is not None:
            self._leaf(step, arrived, k, use)
        elif step.record is not None:
            self._record(step, arrived, values, use)
        else:
            if step.bare and use is not None:
                ((edge, v),) = arrived.items()
                if step.saved_input is not None:
                    step.saved_input.take()
                self._params(step, edge, v.to(step.dtype), use)
            if step.name == "Select" and self._select(step, arrived, values):
                return
            if any(e is not None for e in step.out):
                self._node(step, arrived, values, probing)

    def _params(self, step: Step, edge: Edge, v: Tensor, use: Sink) -> None:
        """Columns at a unit's own parameters."""
        for slot, p in step.params:
            factor = self.operator(step, slot).pullback(v, self._sample_index(edge, step, v))
            if step.record is not None and factor.shape != tuple(p.shape):
                who = blame(
                    step.record.entry,
                    step.record.module,
                    self.graph.paths.get(step.record.module, ""),
                )
                checked(f"vjp of {slot!r}", torch.empty(factor.shape), tuple(p.shape), who)
            use(p, _wide(factor))

    def _sample_index(self, edge: Edge, step: Step, v: Tensor | None = None) -> SampleIndex:
        sample_index = self.state[edge]
        told = self.found.get(edge, sample_index)
        lost = False
        if v is not None and told is not None and told.of is not None and edge not in self.checked:
            # once: what is zero in all columns of a turn is so in the next one, masks are the same
            self.checked.add(edge)
            lost = _beyond_rounding(v, told.of < 0)
        if sample_index is None or lost:
            raise NNJError(
                f"nnj could not find out whose the rows at {describe(step, self.graph.paths)} are"
            )
        return sample_index

    def _leaf(self, step: Step, arrived: dict[Edge, Tensor], k: int, use: Sink | None) -> None:
        (v,) = arrived.values()
        if use is not None and step.leaf is not None:
            if step.leaf is self.graph.batched:
                self._input(step, v, use)
                return
            use(step.leaf, _wide(DenseFactor(v.reshape(k, self.n, *step.leaf.shape))))

    def _input(self, step: Step, v: Tensor, use: Sink) -> None:
        """Columns at the model's input, where each sample's row is its own."""
        if step not in self.by_column:
            self.check_order(step, v.device)
        elif self.n > 1:
            v = v.unflatten(0, (-1, self.n)).diagonal(dim1=1, dim2=2).movedim(-1, 1)
        assert step.leaf is not None
        use(step.leaf, DenseFactor(v))

    def check_order(self, step: Step, device: torch.device) -> None:
        """Errors: `NNJError` unless row n of the model's input is that of sample n, as it is in the
        output.
        """
        of, own = self._sample_index(step.into[0], step).of, torch.arange(self.n, device=device)
        own = own if of is None else own.reshape(-1, *[1] * (of.dim() - 1))
        # an entry may be nobody's, behind a mask
        if of is not None and not bool(((of == own) | (of < 0)).all()):
            raise Coupled(
                "the rows of the output do not belong to the same rows of the input: output n must "
                "be that of sample n, in axis 0"
            )

    def _record(
        self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents, use: Sink | None
    ) -> None:
        ((edge, v),) = arrived.items()
        record = step.record
        assert record is not None
        who = blame(record.entry, record.module, self.graph.paths.get(record.module, ""))
        v = v.to(step.dtype)
        if use is not None:
            self._params(step, edge, v, use)
        out = step.out[0]
        if out is not None:
            back = checked(
                "vjp of 'input'",
                self.operator(step, "input").vjp(v),
                (v.shape[0], *record.x.shape),
                who,
            )
            self._send(step, 0, back, values)

    def _node(
        self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents, probing: bool
    ) -> None:
        k = next(iter(arrived.values())).shape[0]
        apart = {i for i in range(len(step.out)) if (step, i) in self.split}
        plain = k if any(e is not None and i not in apart for i, e in enumerate(step.out)) else 0
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        for edge, v in arrived.items():
            shares = [split(v, self._sample_index(edge, step, v))] if apart and not probing else []
            args[edge[1]] = torch.cat([v[:plain], *shares]) if shares else v
        if probing and not plain:
            return
        rows = next(t.shape[0] for t in args if t is not None)
        for i, (out, back) in enumerate(
            zip(step.out, self.backward(step, args, rows), strict=False)
        ):
            if out is None or back is None:
                continue
            if i in apart:
                if not probing:
                    self._send(step, i, sum_to(back[plain:], edge_shape(out), 1), values)
            elif (step, i) in self.reduced:
                if not probing:
                    ((source, v),) = arrived.items()
                    share = self._reduce(
                        v if step.name == "Expand" else back[:plain], source, out, step
                    )
                    self._send(step, i, share, values)
            else:
                self._send(step, i, sum_to(back[:plain], edge_shape(out), 1), values)

    def _select(self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> bool:
        """One index of an axis: it goes to its place, where else as many tensors of zeros would be
        added as there are indices.
        """
        (edge,) = step.out
        leaving = self.leaving[step, 0] if edge is not None else None
        if (
            edge is None
            or leaving is None
            or self.state[edge] is not leaving
            or {(step, 0)} & (self.split | self.reduced)
        ):
            return False
        (v,), shape = arrived.values(), edge_shape(edge)
        axis, index = step.node._saved_dim, step.node._saved_index
        values.add_part(
            edge, shape, signed(axis) % len(shape), signed(index), v.to(edge_dtype(edge))
        )
        return True

    def _reduce(self, unreduced: Tensor, source: Edge, edge: Edge, step: Step) -> Tensor:
        """An operand without the batch: each sample's share of what arrived, summed to the
        operand's shape.
        """
        if tuple(unreduced.shape[1:]) != edge_shape(source):
            raise NNJError(
                f"autograd's {step.name} gave {tuple(unreduced.shape[1:])}, expected "
                f"{edge_shape(source)}"
            )
        sample_index = self._sample_index(source, step, unreduced)
        k = unreduced.shape[0]
        if sample_index.of is None and not sample_index.by_column:
            r = unreduced.shape[1]
            parts = unreduced.unflatten(1, (self.n, r // self.n)).flatten(0, 1)
        else:
            parts = split(unreduced, sample_index)
        shape = edge_shape(edge)
        return sum_to(parts, shape, 1).reshape(k * self.n, *shape)

    def _send(self, step: Step, i: int, v: Tensor, values: Cotangents) -> None:
        edge = step.out[i]
        assert edge is not None
        v = v.to(edge_dtype(edge))
        state, leaving = self.state[edge], self.leaving[step, i]
        if (
            state is not None
            and state.by_column
            and not (leaving is not None and leaving.by_column)
        ):
            # Explicit columns arrive there too, and only bare parameters follow.
            if leaving is None:
                raise NNJError(
                    "nnj could not find out whose the rows behind "
                    f"{describe(step, self.graph.paths)} are"
                )
            v = split(v, leaving)
        values.add(edge, v)


def _beyond_rounding(v: Tensor, nobody: Tensor) -> bool:
    """Whether something arrived at entries where the probe saw nothing; what rounding leaves of
    zero is dropped there.
    """
    if not bool(nobody.any()):
        return False
    size = v.abs().amax(0)
    return bool(((size > 1e3 * torch.finfo(v.dtype).eps * size.max()) & nobody).any())


def _wide(factor: Factor) -> Factor:
    """Sums over samples and columns are taken in 32 bits at least."""
    return factor.to(torch.float32) if factor.dtype in (torch.float16, torch.bfloat16) else factor

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
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.jacobians.views import merge_uses
from nnj.propagation.cotangents import Cotangents
from nnj.propagation.plan import Plan
from nnj.propagation.probe import Probe
from nnj.propagation.sample_axes import split
from nnj.recording.records import Edge
from nnj.registry.layer_rules import blame, checked

Sink = Callable[[Tensor, Factor], None]


class Sweep(Plan):
    """Walks over a graph as its plan says, of which a probe finds out what the names of nodes do
    not tell.
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        owners: dict[Edge, SampleIndex],
        probed: bool = False,
        cut: bool = False,
        bare: bool = False,
    ):
        super().__init__(graph, n, owners, probed, cut, bare)
        # what the probe said, with entries that are nobody's
        self.found: dict[Edge, SampleIndex] = {}
        self.checked: set[Edge] = set()
        self.uses: dict[int, int] = {}
        for unit in graph.units:
            for _, p in unit.params:
                self.uses[id(p)] = self.uses.get(id(p), 0) + 1
            if unit.leaf is not None:
                self.uses[id(unit.leaf)] = self.uses.get(id(unit.leaf), 0) + 1
        if None in self.state.values():
            own_task(lambda: self._find_owners(owners))

    def _find_owners(self, roots: dict[Edge, SampleIndex]) -> None:
        """Run the probe and write down the owners of all edges that are not known by the names of
        nodes alone.
        """
        found: dict[Edge, SampleIndex] = {}
        values = Cotangents()
        probe, k = Probe(self.n), 0
        for edge, owner in roots.items():
            like = torch.empty((), dtype=edge_dtype(edge), device=self._device(edge))
            values[edge] = probe.columns(owner, edge_shape(edge), like)
            k = len(values[edge])
        for unit in self.graph.units:
            if unit in self.explicit:
                self._settle(unit, values, found, probe)
                continue
            if (
                unit.params
                or unit.leaf is not None
                or any((unit, i) in self.reduced | self.split for i in range(len(unit.out)))
            ):
                self._settle(unit, values, found, probe)
            self._step(unit, values, k, None, probing=True)
        for edge, owner in found.items():
            self.found[edge], tidy = owner, owner.tidy()
            self.state[edge] = self.plain if tidy.of is None else tidy

    def _settle(
        self, unit: Step, values: Cotangents, found: dict[Edge, SampleIndex], probe: Probe
    ) -> None:
        for edge in unit.into:
            if self.state[edge] is None and edge in values:
                found[edge] = probe.owner(values[edge], describe(unit, self.graph.paths))
        for edge in unit.into:
            if unit in self.explicit:
                values.pop(edge, None)

    # -- what a unit is: overridden where something else than J walks ------------------------------

    def operator(self, unit: Step, slot: str) -> Jacobian:
        """The operator of a record in one slot."""
        return unit.slots[slot]

    def backward(self, unit: Step, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        """What a raw node sends to its operands for k columns."""
        if unit.bare and args[0] is not None:
            return product_backward(unit.node, args[0])
        return call_node(unit.node, args, k)

    # -- walking -----------------------------------------------------------------------------------

    def run(
        self, roots: dict[Edge, Tensor], k: int, sink: Sink, units: list[Step] | None = None
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
            for unit in self.graph.units if units is None else units:
                self._step(unit, values, k, use)
            for p, parts in pending.values():  # to some of its uses nothing was sent
                sink(p, merge_uses(parts))

        own_task(walk)
        return values

    def watch(
        self, roots: dict[Edge, Tensor], k: int, units: list[Step]
    ) -> list[tuple[Step, Tensor]]:
        """What arrives at some records, without any factor."""
        values, seen = Cotangents(roots), []

        def walk() -> None:
            for unit in self.graph.units:
                if unit in units and unit.into[0] in values:
                    seen.append((unit, values[unit.into[0]]))
                self._step(unit, values, k, None)

        own_task(walk)
        return seen

    def _step(
        self, unit: Step, values: Cotangents, k: int, use: Sink | None, probing: bool = False
    ) -> None:
        arrived = {e: values.take(e) for e in unit.into if e in values}
        if not arrived:
            return
        if unit in self.explicit and not probing:
            arrived = {e: split(v, self._owner(e, unit, v)) for e, v in arrived.items()}
        if unit.leaf is not None:
            self._leaf(unit, arrived, k, use)
        elif unit.record is not None:
            self._record(unit, arrived, values, use)
        else:
            if unit.bare and use is not None:
                ((edge, v),) = arrived.items()
                if unit.held is not None:
                    unit.held.take()
                self._params(unit, edge, v.to(unit.dtype), use)
            if unit.name == "Select" and self._select(unit, arrived, values):
                return
            if any(e is not None for e in unit.out):
                self._node(unit, arrived, values, probing)

    def _params(self, unit: Step, edge: Edge, v: Tensor, use: Sink) -> None:
        """Columns at a unit's own parameters."""
        for slot, p in unit.params:
            factor = self.operator(unit, slot).pullback(v, self._owner(edge, unit, v))
            if unit.record is not None and factor.shape != tuple(p.shape):
                who = blame(
                    unit.record.entry,
                    unit.record.module,
                    self.graph.paths.get(id(unit.record.module), ""),
                )
                checked(f"vjp of {slot!r}", torch.empty(factor.shape), tuple(p.shape), who)
            use(p, _wide(factor))

    def _owner(self, edge: Edge, unit: Step, v: Tensor | None = None) -> SampleIndex:
        owner = self.state[edge]
        told = self.found.get(edge, owner)
        lost = False
        if v is not None and told is not None and told.of is not None and edge not in self.checked:
            # once: what is zero in all columns of a turn is so in the next one, masks are the same
            self.checked.add(edge)
            lost = _beyond_rounding(v, told.of < 0)
        if owner is None or lost:
            raise NNJError(
                f"nnj could not find out whose the rows at {describe(unit, self.graph.paths)} are"
            )
        return owner

    def _leaf(self, unit: Step, arrived: dict[Edge, Tensor], k: int, use: Sink | None) -> None:
        (v,) = arrived.values()
        if use is not None and unit.leaf is not None:
            if unit.leaf is self.graph.batched:
                self._input(unit, v, use)
                return
            use(unit.leaf, _wide(DenseFactor(v.reshape(k, self.n, *unit.leaf.shape))))

    def _input(self, unit: Step, v: Tensor, use: Sink) -> None:
        """Columns at the model's input, where each sample's row is its own."""
        if unit not in self.explicit:
            self.check_order(unit, v.device)
        elif self.n > 1:
            v = v.unflatten(0, (-1, self.n)).diagonal(dim1=1, dim2=2).movedim(-1, 1)
        assert unit.leaf is not None
        use(unit.leaf, DenseFactor(v))

    def check_order(self, unit: Step, device: torch.device) -> None:
        """Errors: `NNJError` unless row n of the model's input is that of sample n, as it is in the
        output.
        """
        of, own = self._owner(unit.into[0], unit).of, torch.arange(self.n, device=device)
        own = own if of is None else own.reshape(-1, *[1] * (of.dim() - 1))
        # an entry may be nobody's, behind a mask
        if of is not None and not bool(((of == own) | (of < 0)).all()):
            raise Coupled(
                "the rows of the output do not belong to the same rows of the input: output n must "
                "be that of sample n, in axis 0"
            )

    def _record(
        self, unit: Step, arrived: dict[Edge, Tensor], values: Cotangents, use: Sink | None
    ) -> None:
        ((edge, v),) = arrived.items()
        record = unit.record
        assert record is not None
        who = blame(record.entry, record.module, self.graph.paths.get(id(record.module), ""))
        v = v.to(unit.dtype)
        if use is not None:
            self._params(unit, edge, v, use)
        out = unit.out[0]
        if out is not None:
            back = checked(
                "vjp of 'input'",
                self.operator(unit, "input").vjp(v),
                (v.shape[0], *record.x.shape),
                who,
            )
            self._send(unit, 0, back, values)

    def _node(
        self, unit: Step, arrived: dict[Edge, Tensor], values: Cotangents, probing: bool
    ) -> None:
        k = next(iter(arrived.values())).shape[0]
        apart = {i for i in range(len(unit.out)) if (unit, i) in self.split}
        plain = k if any(e is not None and i not in apart for i, e in enumerate(unit.out)) else 0
        args: list[Tensor | None] = [None] * len(unit.node._input_metadata)
        for edge, v in arrived.items():
            shares = [split(v, self._owner(edge, unit, v))] if apart and not probing else []
            args[edge[1]] = torch.cat([v[:plain], *shares]) if shares else v
        if probing and not plain:
            return
        rows = next(t.shape[0] for t in args if t is not None)
        for i, (out, back) in enumerate(
            zip(unit.out, self.backward(unit, args, rows), strict=False)
        ):
            if out is None or back is None:
                continue
            if i in apart:
                if not probing:
                    self._send(unit, i, sum_to(back[plain:], edge_shape(out), 1), values)
            elif (unit, i) in self.reduced:
                if not probing:
                    ((source, v),) = arrived.items()
                    share = self._reduce(
                        v if unit.name == "Expand" else back[:plain], source, out, unit
                    )
                    self._send(unit, i, share, values)
            else:
                self._send(unit, i, sum_to(back[:plain], edge_shape(out), 1), values)

    def _select(self, unit: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> bool:
        """One index of an axis: it goes to its place, where else as many tensors of zeros would be
        added as there are indices.
        """
        (edge,) = unit.out
        leaving = self.leaving[unit, 0] if edge is not None else None
        if (
            edge is None
            or leaving is None
            or self.state[edge] is not leaving
            or {(unit, 0)} & (self.split | self.reduced)
        ):
            return False
        (v,), shape = arrived.values(), edge_shape(edge)
        axis, index = unit.node._saved_dim, unit.node._saved_index
        values.add_part(
            edge, shape, signed(axis) % len(shape), signed(index), v.to(edge_dtype(edge))
        )
        return True

    def _reduce(self, unreduced: Tensor, source: Edge, edge: Edge, unit: Step) -> Tensor:
        """An operand without the batch: each sample's share of what arrived, summed to the
        operand's shape.
        """
        if tuple(unreduced.shape[1:]) != edge_shape(source):
            raise NNJError(
                f"autograd's {unit.name} gave {tuple(unreduced.shape[1:])}, expected "
                f"{edge_shape(source)}"
            )
        owner = self._owner(source, unit, unreduced)
        k = unreduced.shape[0]
        if owner.of is None and not owner.explicit:
            r = unreduced.shape[1]
            parts = unreduced.unflatten(1, (self.n, r // self.n)).flatten(0, 1)
        else:
            parts = split(unreduced, owner)
        shape = edge_shape(edge)
        return sum_to(parts, shape, 1).reshape(k * self.n, *shape)

    def _send(self, unit: Step, i: int, v: Tensor, values: Cotangents) -> None:
        edge = unit.out[i]
        assert edge is not None
        v = v.to(edge_dtype(edge))
        state, leaving = self.state[edge], self.leaving[unit, i]
        if state is not None and state.explicit and not (leaving is not None and leaving.explicit):
            # Explicit columns arrive there too, and only bare parameters follow.
            if leaving is None:
                raise NNJError(
                    "nnj could not find out whose the rows behind "
                    f"{describe(unit, self.graph.paths)} are"
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

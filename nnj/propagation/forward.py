"""Tangents of the input and of parameters go forward over the steps that columns go back over, each
transposed.

A record's operators have jvp; a raw node is linear in its cotangents, so that differentiating it in
them transposes it. Where columns stand by column on the way back, tangents do on the way forward;
what splits columns by sample there takes each sample's entries from its own column here."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nnj.generators import OwnGenerator
from nnj.graph.nodes import edge_dtype, edge_shape, own_task
from nnj.graph.step import Step
from nnj.propagation.backward import Sweep
from nnj.recording.records import Edge

LARGEST_NODE = 1 << 14  # entries of a node's outputs, which are asked one by one where need be


class Forward:
    """Tangents through the plan of a sweep.

    Args:
        sweep: the plan; its graph leads to every parameter and input that has a tangent.
    """

    def __init__(self, sweep: Sweep):
        self.sweep, self.n = sweep, sweep.n
        self._by_entry = False  # whether to doubt what is not finite

    def run(self, seeds: dict[Tensor, Tensor], k: int) -> dict[Edge, Tensor]:
        """The tangents (K, *shape) of the root edges.

        Args:
            seeds: of leaves, (K, N, *p) for a parameter, (K, *shape) for an input that has the
                batch in axis 0.
            k: K.
        """
        found = own_task(lambda: self._walk(seeds, k))
        if all(bool(t.isfinite().all()) for t in found.values()):
            return found
        # A node may send back something finite, but torch's derivative of it is not (0 times
        # infinity, at the standard deviation of equal numbers): the entries of J itself are asked.
        self._by_entry = True
        return own_task(lambda: self._walk(seeds, k))

    def _walk(self, seeds: dict[Tensor, Tensor], k: int) -> dict[Edge, Tensor]:
        return self._go(self.sweep.graph.steps, {}, seeds, k)

    def _go(
        self,
        steps: list[Step],
        tangents: dict[Edge, Tensor],
        seeds: dict[Tensor, Tensor],
        k: int,
    ) -> dict[Edge, Tensor]:
        for step in reversed(steps):
            if step.leaf is not None:
                outputs = self._leaf(step, step.leaf, seeds, k)
            elif step.record is not None:
                outputs = self._record(step, tangents, seeds, k)
            else:
                outputs = self._node(step, tangents, k)
                if step.params:
                    self._bare(step, seeds, k, outputs)
            for edge, t in outputs.items():
                tangents[edge] = self._arrived(edge, step, t)
        return {edge: tangents[edge] for edge in self.sweep.graph.roots if edge in tangents}

    def through(
        self, steps: list[Step], tangents: dict[Edge, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        """The tangents (K, *shape) of the root edges that those of some inner edges make, through
        some steps alone.

        Args:
            steps: in topological order.
            tangents: by edge.
            k: K.
        """
        return own_task(lambda: self._go(steps, dict(tangents), {}, k))

    # -- edges -------------------------------------------------------------------------------------

    def _arrived(self, edge: Edge, step: Step, t: Tensor) -> Tensor:
        """What a step gives for an edge, as columns stand there: the transpose of the split before
        a step that works by column.
        """
        if step in self.sweep.by_column:
            return self.sweep.sample_index(edge, step).from_columns(t)
        return t

    def _below(self, step: Step, i: int, tangents: dict[Edge, Tensor]) -> Tensor | None:
        """The tangent of operand i as columns stand that this step sends there."""
        edge = step.out[i]
        t = None if edge is None else tangents.get(edge)
        if t is None:
            return None
        sample_index = self.sweep.split_at(step, i)
        return t if sample_index is None else sample_index.from_columns(t)

    # -- leaves and layers -------------------------------------------------------------------------

    def _leaf(
        self, step: Step, leaf: Tensor, seeds: dict[Tensor, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        seed, (edge,) = seeds.get(leaf), step.into
        if seed is None:
            return {}
        is_input = leaf is self.sweep.graph.batched
        if step not in self.sweep.by_column:
            if is_input:
                self.sweep.check_order(step, seed.device)
            return {edge: seed}
        if not is_input:
            return {edge: seed.expand(k, self.n, *edge_shape(edge)).flatten(0, 1)}
        # each sample's column moves that sample's row alone
        by_column = seed.new_zeros(k, self.n, *seed.shape[1:])
        rows = torch.arange(self.n, device=seed.device)
        by_column[:, rows, rows] = seed
        return {edge: by_column.flatten(0, 1)}

    def _record(
        self, step: Step, tangents: dict[Edge, Tensor], seeds: dict[Tensor, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        (edge,) = step.into
        parts = []
        x = self._below(step, 0, tangents)
        if x is not None:
            parts.append(self.sweep.operator(step, "input").jvp(x.to(step.dtype)))
        for slot, p in step.params:
            if p in seeds:
                parts.append(self._parameter(step, slot, seeds[p].to(step.dtype), k))
        if not parts:
            return {}
        return {edge: functools.reduce(torch.add, parts).to(edge_dtype(edge))}

    def _bare(
        self, step: Step, seeds: dict[Tensor, Tensor], k: int, outputs: dict[Edge, Tensor]
    ) -> None:
        """Add what the bare parameters of a product move."""
        (edge,) = step.into
        for slot, p in step.params:
            if p in seeds:
                t = self._parameter(step, slot, seeds[p].to(step.dtype), k)
                _add(outputs, edge, t.to(edge_dtype(edge)))

    def _parameter(self, step: Step, slot: str, v: Tensor, k: int) -> Tensor:
        """J v for a direction (K, N or 1, *p) of each sample: rows take that of their sample."""
        j, (edge,) = self.sweep.operator(step, slot), step.into
        sample_index = self.sweep.sample_index(edge, step)
        if v.shape[1] == 1:
            out = j.jvp(v)
            each = sample_index.by_column and self.n > 1
            return out.repeat_interleave(self.n, 0) if each else out
        if sample_index.by_column:
            return j.jvp(v.expand(k, self.n, *j.inputs).flatten(0, 1)[:, None])
        rows = sample_index.rows(j.n, v.device)
        if rows is None:  # entries of one row are of several samples: one direction at a time
            out = torch.stack([j.jvp(v[:, i : i + 1]) for i in range(self.n)], 1)
            return sample_index.from_columns(out.flatten(0, 1))
        own_row_each = sample_index.of is None and j.n == self.n
        return j.jvp(v if own_row_each else v[:, rows.clamp(min=0)])

    # -- raw nodes ---------------------------------------------------------------------------------

    def _node(self, step: Step, tangents: dict[Edge, Tensor], k: int) -> dict[Edge, Tensor]:
        """The operands that columns reach split take a call of their own, with one column for each
        sample.
        """
        below: dict[str, dict[int, Tensor]] = {"together": {}, "summed": {}, "split": {}}
        for i, route in enumerate(self.sweep.routes[step]):
            t = self._below(step, i, tangents)
            if route is not None and t is not None:
                below[route.way][i] = t
        total: dict[Edge, Tensor] = {}
        together = below["together"]
        together |= {i: self._spread(step, t) for i, t in below["summed"].items()}
        if together:
            rows = next(iter(together.values())).shape[0]
            total = self._transposed(step, together, rows)
        if below["split"]:
            for edge, t in self._transposed(step, below["split"], k * self.n).items():
                _add(total, edge, self.sweep.sample_index(edge, step).from_columns(t))
        return total

    def _spread(self, step: Step, t: Tensor) -> Tensor:
        """The transpose of the sum over a broadcast operand: each sample's tangent (K * N, *small)
        at that sample's entries.
        """
        (source,) = step.into
        shape = edge_shape(source)
        lead = (1,) * (len(shape) - (t.dim() - 1))
        t = t.reshape(t.shape[0], *lead, *t.shape[1:]).expand(t.shape[0], *shape)
        return self.sweep.sample_index(source, step).from_columns(t)

    def _transposed(self, step: Step, below: dict[int, Tensor], rows: int) -> dict[Edge, Tensor]:
        """Tangents of a node's outputs from those of some operands, by differentiating the node in
        its cotangents, at zero.
        """
        with torch.enable_grad():
            cotangents = _zero_cotangents(step, rows)
            answers = self._answers(step, cotangents, below, rows)
            pairs = [
                (i, back, _as_operand(t, back))
                for i, t in below.items()
                if (back := answers[i]) is not None
            ]
            differentiable = [(back, t) for _, back, t in pairs if back.requires_grad]
            others = [i for i, back, _ in pairs if not back.requires_grad]
            # what autograd does not see (numpy, say) need not be nothing
            opaque = bool(others) and self._sends(step, others)
            by_number = None if opaque else _differentiated(cotangents, differentiable)
        if by_number is not None and self._by_entry and self._doubtful(step, by_number, below):
            by_number = None
        if by_number is None:
            return self._entry_by_entry(step, below, rows)
        return {(step.node, nr): t for nr, t in by_number.items()}

    def _doubtful(self, step: Step, by_number: dict[int, Tensor], below: dict[int, Tensor]) -> bool:
        """Whether finite tangents became infinite at a node that is not too large to be asked entry
        by entry.
        """
        size = sum(math.prod(edge_shape(edge)) for edge in step.into)
        return (
            size <= LARGEST_NODE
            and not all(bool(t.isfinite().all()) for t in by_number.values())
            and all(bool(t.isfinite().all()) for t in below.values())
        )

    def _answers(
        self, step: Step, cotangents: list[Tensor | None], below: dict[int, Tensor], rows: int
    ) -> list[Tensor | None]:
        """What a node sends to its operands; Expand sums on the way what is not to be summed over
        samples.
        """
        routes = self.sweep.routes[step]
        if step.name == "Expand" and all(
            route is not None and route.way == "summed" for route in (routes[i] for i in below)
        ):
            return [next(t for t in cotangents if t is not None)]
        return self.sweep.backward(step, cotangents, rows)

    def _sends(self, step: Step, operands: list[int]) -> bool:
        """Whether a node sends anything to some of its operands."""
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        seed = OwnGenerator.seeded()
        for _, nr in step.into:
            m = step.node._input_metadata[nr]
            args[nr] = torch.randn(1, *m.shape, generator=seed).to(m.device, m.dtype)
        answers = self.sweep.backward(step, args, 1)
        return any(back is not None and bool(back.any()) for back in (answers[i] for i in operands))

    def _entry_by_entry(
        self, step: Step, below: dict[int, Tensor], rows: int
    ) -> dict[Edge, Tensor]:
        """A node that cannot be differentiated: what each entry of its outputs sends back, times
        the tangents there.
        """
        node, total = step.node, {}
        for _, nr in step.into:
            m = node._input_metadata[nr]
            out = torch.zeros(rows, math.prod(m.shape), dtype=m.dtype, device=m.device)
            for entry in range(out.shape[1]):
                unit = torch.zeros(1, out.shape[1], dtype=m.dtype, device=m.device)
                unit[0, entry] = 1
                args: list[Tensor | None] = [None] * len(node._input_metadata)
                args[nr] = unit.reshape(1, *m.shape)
                answers = self.sweep.backward(step, args, 1)
                for i, t in below.items():
                    back = answers[i]
                    if back is not None:
                        out[:, entry] += (_as_operand(t, back) * back).flatten(1).sum(1)
            total[node, nr] = out.reshape(rows, *m.shape)
        return total


def _add(tangents: dict[Edge, Tensor], edge: Edge, t: Tensor) -> None:
    tangents[edge] = tangents[edge] + t if edge in tangents else t


def _zero_cotangents(step: Step, rows: int) -> list[Tensor | None]:
    """Cotangents of a node's outputs, by their numbers, to be differentiated in."""
    metadata = step.node._input_metadata
    cotangents: list[Tensor | None] = [None] * len(metadata)
    for _, nr in step.into:
        m = metadata[nr]
        cotangents[nr] = torch.zeros(
            rows, *m.shape, dtype=m.dtype, device=m.device, requires_grad=True
        )
    return cotangents


def _differentiated(
    cotangents: list[Tensor | None], pairs: list[tuple[Tensor, Tensor]]
) -> dict[int, Tensor] | None:
    """The derivative of what a node answers in its cotangents, by the numbers of its outputs, times
    tangents; None where it may be differentiated once only.
    """
    numbers = [nr for nr, t in enumerate(cotangents) if t is not None]
    if not pairs:
        return {}
    try:
        tangents = torch.autograd.grad(
            [back for back, _ in pairs],
            [t for t in cotangents if t is not None],
            [t for _, t in pairs],
            allow_unused=True,
        )
    except RuntimeError:  # once_differentiable
        return None
    return {nr: t for nr, t in zip(numbers, tangents, strict=True) if t is not None}


def _as_operand(t: Tensor, back: Tensor) -> Tensor:
    """A tangent broadcast and typed as the operand is in the node (the transpose of `sum_to`)."""
    t = t.to(back.dtype)
    if t.shape[1:] == back.shape[1:]:
        return t
    lead = (1,) * (back.dim() - t.dim())
    return t.reshape(t.shape[0], *lead, *t.shape[1:]).expand(t.shape[0], *back.shape[1:])

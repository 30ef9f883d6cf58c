"""The sweep the other way: tangents of the input and of parameters walk forward over the same
units, each transposed.

A record's operators have jvp; a raw node is transposed by differentiating what it does to a
cotangent. Where the backward sweep gives each sample a column of its own, tangents come in such
columns, and each sample's entries are picked from its own."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.nodes import edge_dtype, edge_shape, own_task
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sweep
from nnj.recording.records import Edge


def pick(t: Tensor, n: int, sample_index: SampleIndex) -> Tensor:
    """The transpose of `split`: (K * n, *shape) -> (K, *shape), each entry from the column of the
    sample it belongs to.
    """
    t = t.unflatten(0, (-1, n))
    if sample_index.by_column or n == 1:
        return t[:, 0] if n == 1 else t.flatten(0, 1)
    if sample_index.of is None:
        r = t.shape[2]
        rows = torch.arange(r, device=t.device)
        return t[:, rows // (r // n), rows]
    of = sample_index.of.expand(t.shape[2:])
    sample = torch.arange(n, device=t.device).reshape(-1, *[1] * of.dim())
    return (t * (of == sample)).sum(1)


class Forward:
    """Tangents through the plan of a sweep.

    Args:
        sweep: the plan; its graph leads to every parameter and input that has a tangent.
    """

    def __init__(self, sweep: Sweep):
        self.sweep, self.n = sweep, sweep.n

    def run(self, seeds: dict[int, Tensor], k: int) -> dict[Edge, Tensor]:
        """The tangents (K, *shape) of the root edges.

        Args:
            seeds: by id of a leaf, (K, N, *p) for a parameter, (K, *shape) for an input that has
                the batch in axis 0.
            k: K.
        """
        return own_task(lambda: self._walk(seeds, k))

    def _walk(self, seeds: dict[int, Tensor], k: int) -> dict[Edge, Tensor]:
        tangents: dict[Edge, Tensor] = {}
        for step in reversed(self.sweep.graph.steps):
            if step.leaf is not None:
                found = self._leaf(step, seeds, k)
            elif step.record is not None:
                found = self._record(step, tangents, seeds, k)
            else:
                found = self._node(step, tangents, k)
                for slot, p in step.params:
                    if id(p) in seeds:
                        (edge,) = step.into
                        t = self._parameter(step, slot, seeds[id(p)].to(step.dtype), k).to(
                            edge_dtype(edge)
                        )
                        found[edge] = found[edge] + t if edge in found else t
            for edge, t in found.items():
                tangents[edge] = self._at(edge, step, t)
        roots = {}
        for edge in self.sweep.graph.roots:
            if edge in tangents:
                t = tangents[edge]
                roots[edge] = t
        return roots

    def _by_column(self, step: Step) -> bool:
        return step in self.sweep.by_column

    def _at(self, edge: Edge, step: Step, t: Tensor) -> Tensor:
        """What a unit gives for an edge, in the way in which columns stand on that edge
        (the transpose of the split there).
        """
        state = self.sweep.state[edge]
        if self._by_column(step) and not (state is not None and state.by_column):
            return pick(t, self.n, self.sweep._sample_index(edge, step))
        return t

    def _below(self, step: Step, i: int, tangents: dict[Edge, Tensor]) -> Tensor | None:
        """The tangent of operand i as this unit sends columns there: explicit edges that it serves
        plainly are picked from.
        """
        edge = step.out[i]
        if edge is None or edge not in tangents:
            return None
        t = tangents[edge]
        state, leaving = self.sweep.state[edge], self.sweep.leaving[step, i]
        if (
            state is not None
            and state.by_column
            and not (leaving is not None and leaving.by_column)
        ):
            if leaving is None:
                raise NNJError(
                    "nnj could not find out whose the rows behind "
                    f"{describe(step, self.sweep.graph.paths)} are"
                )
            t = pick(t, self.n, leaving)
        return t

    def _leaf(self, step: Step, seeds: dict[int, Tensor], k: int) -> dict[Edge, Tensor]:
        seed = seeds.get(id(step.leaf))
        if seed is None:
            return {}
        (edge,) = step.into
        if not self._by_column(step):
            if step.leaf is self.sweep.graph.batched:
                self.sweep.check_order(step, seed.device)
            return {edge: seed}
        # each sample's column moves that sample's row alone
        if step.leaf is self.sweep.graph.batched:
            apart = seed.new_zeros(k, self.n, *seed.shape[1:])
            rows = torch.arange(self.n, device=seed.device)
            apart[:, rows, rows] = seed
            return {edge: apart.flatten(0, 1)}
        return {edge: seed.expand(k, self.n, *edge_shape(edge)).flatten(0, 1)}

    def _record(
        self, step: Step, tangents: dict[Edge, Tensor], seeds: dict[int, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        (edge,) = step.into
        parts = []
        x = self._below(step, 0, tangents)
        if x is not None:
            parts.append(self.sweep.operator(step, "input").jvp(x.to(step.dtype)))
        for slot, p in step.params:
            if id(p) in seeds:
                parts.append(self._parameter(step, slot, seeds[id(p)].to(step.dtype), k))
        if not parts:
            return {}
        return {edge: functools.reduce(torch.add, parts).to(edge_dtype(edge))}

    def _parameter(self, step: Step, slot: str, v: Tensor, k: int) -> Tensor:
        """J v for a direction (K, N or 1, *p) of each sample: rows take that of their owner."""
        j, (edge,) = self.sweep.operator(step, slot), step.into
        sample_index = self.sweep._sample_index(edge, step)
        if v.shape[1] == 1:
            out = j.jvp(v)
            return (
                out.repeat_interleave(self.n, 0) if sample_index.by_column and self.n > 1 else out
            )
        if sample_index.by_column:
            return j.jvp(v.expand(k, self.n, *j.inputs).flatten(0, 1)[:, None])
        rows = sample_index.rows(j.n, v.device)
        if rows is not None:
            return j.jvp(
                v[:, rows.clamp(min=0)] if sample_index.of is not None or j.n != self.n else v
            )
        return pick(
            torch.stack([j.jvp(v[:, i : i + 1]) for i in range(self.n)], 1).flatten(0, 1),
            self.n,
            sample_index,
        )

    def _node(self, step: Step, tangents: dict[Edge, Tensor], k: int) -> dict[Edge, Tensor]:
        below = {
            i: t for i in range(len(step.out)) if (t := self._below(step, i, tangents)) is not None
        }
        if not below:
            return {}
        sweep = self.sweep
        apart = {i: t for i, t in below.items() if (step, i) in sweep.split}
        reduced = {i: t for i, t in below.items() if (step, i) in sweep.reduced}
        plain = {i: t for i, t in below.items() if i not in apart and i not in reduced}
        total: dict[Edge, Tensor] = {}

        def add(found: dict[Edge, Tensor]) -> None:
            for edge, t in found.items():
                total[edge] = total[edge] + t if edge in total else t

        for i, t in reduced.items():
            plain[i] = self._spread(step, i, t)
        if plain:
            rows = next(iter(plain.values())).shape[0]
            add(self._transposed(step, plain, rows))
        if apart:
            found = self._transposed(step, apart, k * self.n)
            add(
                {
                    edge: pick(t, self.n, sweep._sample_index(edge, step))
                    for edge, t in found.items()
                }
            )
        return total

    def _spread(self, step: Step, i: int, t: Tensor) -> Tensor:
        """The transpose of a broadcast operand's sum: each sample's tangent (K * N, *small) at that
        sample's entries.
        """
        (source,) = step.into
        shape = edge_shape(source)
        sample_index = self.sweep._sample_index(source, step)
        lead = (1,) * (len(shape) - (t.dim() - 1))
        return pick(
            t.reshape(t.shape[0], *lead, *t.shape[1:]).expand(t.shape[0], *shape),
            self.n,
            sample_index,
        )

    def _transposed(self, step: Step, below: dict[int, Tensor], rows: int) -> dict[Edge, Tensor]:
        """Tangents of a node's outputs from those of some operands, by differentiating the node in
        its cotangents.
        """
        node = step.node
        metadata = node._input_metadata
        nrs = sorted(nr for _, nr in step.into)
        with torch.enable_grad():
            cotangents: list[Tensor | None] = [None] * len(metadata)
            for nr in nrs:
                m = metadata[nr]
                cotangents[nr] = torch.zeros(
                    rows, *m.shape, dtype=m.dtype, device=m.device, requires_grad=True
                )
            given = [t for t in cotangents if t is not None]
            if step.name == "Expand" and all((step, i) in self.sweep.reduced for i in below):
                back: list[Tensor | None] = [given[0]]
            else:
                back = self.sweep.backward(step, cotangents, rows)
            known = {i: (b, _like(t, b)) for i, t in below.items() if (b := back[i]) is not None}
            pairs = [(b, t) for b, t in known.values() if b.requires_grad]
            opaque = len(pairs) < len(known) and self._answers(
                step, [i for i, (b, _) in known.items() if not b.requires_grad]
            )
            try:
                if not opaque and pairs:
                    found = torch.autograd.grad(
                        [b for b, _ in pairs], given, [t for _, t in pairs], allow_unused=True
                    )
                    return {
                        (node, nr): g for nr, g in zip(nrs, found, strict=True) if g is not None
                    }
            except RuntimeError:  # once_differentiable
                opaque = True
        return self._entry_by_entry(step, below, rows) if opaque else {}

    def _answers(self, step: Step, operands: list[int]) -> bool:
        """Whether a node sends anything to the operands: then what autograd does not see there
        (numpy, say) is not nothing.
        """
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        for _, nr in step.into:
            m = step.node._input_metadata[nr]
            args[nr] = torch.randn(1, *m.shape, device=m.device).to(m.dtype)
        back = self.sweep.backward(step, args, 1)
        return any(b is not None and bool(b.any()) for b in (back[i] for i in operands))

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
                args: list[Tensor | None] = [None] * len(node._input_metadata)
                args[nr] = torch.zeros(1, out.shape[1], dtype=m.dtype, device=m.device)
                args[nr][0, entry] = 1  # type: ignore[index]
                args[nr] = args[nr].reshape(1, *m.shape)  # type: ignore[union-attr]
                back = self.sweep.backward(step, args, 1)
                for i, t in below.items():
                    b = back[i]
                    if b is not None:
                        out[:, entry] += (_like(t, b) * b).flatten(1).sum(1)
            total[node, nr] = out.reshape(rows, *m.shape)
        return total


def _like(t: Tensor, b: Tensor) -> Tensor:
    """A tangent broadcast and typed as the operand is in the node (the transpose of `sum_to`)."""
    t = t.to(b.dtype)
    if t.shape[1:] == b.shape[1:]:
        return t
    lead = (1,) * (b.dim() - t.dim())
    return t.reshape(t.shape[0], *lead, *t.shape[1:]).expand(t.shape[0], *b.shape[1:])

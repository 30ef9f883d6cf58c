"""The last layer needs no columns, and the first product needs no factor.

Behind a linear last layer J that all samples share, columns S^T J are made from its rows J_c as the
loss's Hessian knows best: S, which is N x C x C, is never made. At the last layer's own parameters
H itself is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nnj.graph.nodes import edge_dtype
from nnj.graph.step import Step
from nnj.jacobians.factor import Factor
from nnj.jacobians.kron import Approx, Kron
from nnj.jacobians.outer_kron import OuterKron
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import ColumnSelection
from nnj.propagation.backward import Sink, Sweep
from nnj.recording.records import Edge


class LastLayerFactor(OuterProduct):
    """B = V U^T at a parameter of the last layer, with one place for each sample: V is all of S,
    made only where columns are asked for; sum_k V^2 is diag(H).

    Args:
        hessian: of the loss in the layer's output.
        patches: U, (N, 1, I, 1).
        shape: of the parameter.
        dtype: of B.
    """

    def __init__(
        self, hessian: LossHessian, patches: Patches, shape: tuple[int, ...], dtype: torch.dtype
    ):
        self.hessian, self.patches, self.shape = hessian, patches, tuple(shape)
        self.k, self.n = hessian.rank * hessian.places, hessian.rows
        self.form = (1, hessian.block * hessian.places, 1)
        self.device, self.dtype = hessian.device, dtype
        self.of = [(hessian, 0, self.k)]
        self.is_bias = len(self.shape) == 1

    @cached_property
    def v(self) -> Tensor:  # type: ignore[override]
        return self.hessian.flat_factor()[:, :, None, :, None].to(self.dtype)

    def to(self, dtype: torch.dtype) -> Factor:
        return LastLayerFactor(self.hessian, self.patches.to(dtype), self.shape, dtype)

    def kron(self, approx: Approx = "expand") -> list[Kron] | None:
        if len(self.shape) < 2 or self.shape[0] != self.form[1]:
            return None
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        given = self.patches, lambda: self.v, self.form, like, approx, self.outer_v
        kron = LastLayerKron(self.hessian, *given)
        kron.columns = self.of
        return [kron]

    def outer_v(self) -> Tensor:
        return self._of_columns("nnj_outer", self._sum_of_hessians)

    def _sum_of_hessians(self) -> Tensor:
        """The sum of H over the samples, by some columns at a time."""
        size = self.form[1]
        eye = torch.eye(size, dtype=self.dtype, device=self.device)
        total = torch.zeros_like(eye)
        for v in self.hessian.columns_through(eye, 64):
            flat = v.reshape(-1, size)
            total.addmm_(flat.mT, flat)
        return total

    def same_v(self, other: OuterProduct) -> bool:
        return isinstance(other, LastLayerFactor) and other.hessian is self.hessian

    def with_patches(self, patches: Patches, shape: Sequence[int]) -> OuterProduct:
        return LastLayerFactor(self.hessian, patches, tuple(shape), self.dtype)

    def squared_columns(self) -> Tensor:
        return self.hessian.flat_diagonal.to(self.dtype)


class LastLayerKron(OuterKron):
    """Of V that is all of S: a place is alive where a diagonal of H is."""

    def __init__(self, hessian: LossHessian, *given: Any):
        super().__init__(*given)
        self.hessian = hessian

    def alive(self) -> Tensor:
        return (self.hessian.flat_diagonal != 0).any(-1, keepdim=True)


class LastLayerColumns:
    """The steps from the output of the loss to the first layer that is not the same linear map for
    all samples.

    Args:
        sweep: the plan.
        hessian: of the loss.
        shared: parameters that several modules own, whose blocks need columns.
        selection: the columns that walk, if not all do.
        factor: what stands at the last layer's parameters.
    """

    def __init__(
        self,
        sweep: Sweep,
        hessian: LossHessian,
        shared: set[Tensor],
        selection: ColumnSelection | None = None,
        factor: Callable[..., OuterProduct] = LastLayerFactor,
    ):
        self._made = factor
        self.sweep, self.hessian, self.shared, self.selection = sweep, hessian, shared, selection
        self.steps: list[Step] = []
        self.factors: list[tuple[Tensor, Factor]] = []  # at the last layer's parameters
        self.edge: Edge = sweep.graph.roots[0]
        self.rows: Tensor | None = None  # J: (C, 1, *shape), the product of these steps
        self.short: int | None = None  # how many columns there are after `narrow`
        self.stages: list[tuple[Edge, Tensor]] = []  # behind each step its edge and the rows there
        one = len(sweep.graph.roots) == len(hessian.shapes) == 1  # an output may be given twice
        if not one or not hessian.closed_form or hessian.rows != sweep.n or sweep.n == 1:
            return
        if sweep.state[self.edge] is not sweep.in_order:
            return
        for step in sweep.graph.steps:
            if not self._take(step):
                break

    def _take(self, step: Step) -> bool:
        """Go through one more step, if it is a linear map that all samples share."""
        if step.record is None or step.into != [self.edge]:
            return False
        out = step.out[0]
        if out is not None and self.sweep.state[out] is not self.sweep.in_order:
            return False
        j = step.slots.get("input")
        if j is None or not j.same_for_rows or j.n != self.sweep.n:
            return False
        if j.spreads and self.steps:  # columns are shorter here, and known to be separable there
            return False
        if step.dtype is None or step.dtype in (torch.float16, torch.bfloat16):
            return False
        factors = self._factors(step, step.dtype)
        if factors is None:
            return False
        self.steps.append(step)
        self.factors += factors
        if out is None:  # nothing wanted is behind it
            return False
        # the matrix of the first map is not made by sending the identity through it
        self.rows = j.shared_rows(step.dtype) if self.rows is None else j.vjp(self.rows)
        self.edge = out
        self.stages.append((out, self.rows))
        return True

    def _factors(self, step: Step, dtype: torch.dtype) -> list[tuple[Tensor, Factor]] | None:
        """The factors at the parameters of a step; None where they need columns."""
        if step.params and self.steps:
            return None
        found: list[tuple[Tensor, Factor]] = []
        columns = SimpleNamespace()  # all of them have the same
        for slot, p in step.params:
            if self.sweep.uses[p] > 1 or p in self.shared:
                return None
            patches = step.slots[slot].outer_patches()
            if patches is None:
                return None
            shape = tuple(p.shape)
            factor = self._made(self.hessian, patches.to(dtype), shape, dtype)
            factor.origin = columns
            found.append((p, factor))
        return found

    @property
    def useful(self) -> bool:
        """Whether there is anything to be saved."""
        return bool(self.steps)

    @property
    def is_end(self) -> bool:
        """Whether nothing that is wanted is behind the last layer, so that no columns walk."""
        return self.rows is None

    @property
    def k(self) -> int:
        """The number of columns."""
        return self.selection.k if self.selection else self.hessian.rank * self.hessian.places

    def parameters(self, sink: Sink) -> None:
        """Give the parameters of the last layer their factors."""
        for p, factor in self.factors:
            sink(p, factor)

    def narrow(self, memory: int) -> None:
        """Go back to where columns are shortest, if they are worth recompressing there: `columns`
        are then as many as entries.
        """
        if not self.stages:
            return
        lengths = [rows[0].numel() for _, rows in self.stages]
        at = lengths.index(min(lengths))
        d, n, behind = lengths[at], self.sweep.n, self.sweep.graph.steps[at + 1 :]
        if self.selection is not None or n * d**2 * 8 * 3 > memory:
            return
        if worth_recompressing(self.k, n, self.hessian.block, d, walk_cost(behind)):
            self.steps, (self.edge, self.rows) = self.steps[: at + 1], self.stages[at]
            self.short = d

    @property
    def walks(self) -> int:
        """How many columns `walked` gives."""
        return self.k if self.short is None else self.short

    def walked(self, size: int) -> Iterator[Tensor]:
        """What walks on from `edge`, (k, N, *shape), with k at most `size`."""
        if self.rows is None:
            return
        flat, source = self.rows.reshape(len(self.rows), -1), self.selection or self.hessian
        columns: Iterator[Tensor]
        if self.short is None:
            columns = source.columns_through(flat, size)
        else:
            columns = iter(triangular(self.hessian.gram_through(flat)).split(size))
        for v in columns:
            yield self._at_edge(v)

    def columns(self, start: int, stop: int, of: Tensor) -> Tensor:
        """Some columns of the selection at some of the samples, on `edge`: (k, M, *shape)."""
        assert self.rows is not None and self.selection is not None
        flat = self.rows.reshape(len(self.rows), -1)
        return self._at_edge(self.selection.through(flat, start, stop, of))

    def _at_edge(self, v: Tensor) -> Tensor:
        assert self.rows is not None
        return v.reshape(*v.shape[:2], *self.rows.shape[2:]).to(edge_dtype(self.edge))


def triangular(gram: Tensor) -> Tensor:
    """d columns with a given V^T V for each sample: (N, d, d), in float64 -> (d, N, d).

    Cholesky's, of the matrix scaled to a unit diagonal, so that small entries keep their accuracy,
    and lifted by its own rounding; the eigenvectors where that is not enough."""
    size = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)
    scaled = gram * inverse[:, :, None] * inverse[:, None]
    lifted = scaled.clone()
    lifted.diagonal(dim1=1, dim2=2).add_(4 * gram.shape[1] * torch.finfo(gram.dtype).eps)
    root, failed = torch.linalg.cholesky_ex(lifted)
    bad = failed.nonzero()[:, 0]
    if len(bad):
        values, vectors = torch.linalg.eigh(scaled[bad])
        root[bad] = vectors * values.clamp(min=0).sqrt()[:, None]
    result: Tensor = (size[:, :, None] * root).permute(2, 0, 1)
    return result


def worth_recompressing(k: int, n: int, c: int, d: int, cost: float) -> bool:
    """Whether n matrices d x d, each the sum over c rows, and their roots cost less than (k - d)
    columns, each of `cost`.

    Multiply-adds; those of matrices in float64, which take twice the time.
    """
    return k > d and 2.0 * n * (c * d**2 + d**3) < (k - d) * cost


def walk_cost(steps: list[Step]) -> float:
    """Multiply-adds of one column through some steps, by their parameters and places.

    A layer with one place for each sample squares columns before it multiplies them by its input:
    they cost it their length."""
    total = 0.0
    for step in steps:
        for slot, p in step.params:
            j = step.slots[slot]
            places = j.places
            back = p.numel() * places if step.out[0] is not None else 0
            total += j.n * (
                back + (2.0 * p.numel() * places if places > 1 else math.prod(j.outputs))
            )
    return max(total, 1.0)

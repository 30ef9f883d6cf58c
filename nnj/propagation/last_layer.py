"""The last layer needs no columns, and the first product needs no factor.

With H = sum_c w_c (e_c - m)(e_c - m)^T for each sample, columns behind a linear last layer J are
sqrt(w_c) (J_c - m J): its rows J_c serve all samples, and S, which is N x C x C, is never made. At
the last layer's own parameters H itself is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nnj.graph.nodes import edge_dtype
from nnj.graph.step import Step
from nnj.jacobians.factor import CHUNK, Factor
from nnj.jacobians.jacobian import Identity, LinearMap
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.weight_jacobian import PatchMatmul, ScaleShift
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import AllColumns, ColumnSelection
from nnj.loss_hessian.structured import DiagonalHessian, SoftmaxHessian
from nnj.propagation.backward import Sink, Sweep
from nnj.recording.records import Edge


class LastLayerFactor(Factor):
    """B = S J at a parameter of the last layer: one place for each sample, u of (N, I), and the
    curvature H in the place of S.
    """

    def __init__(self, hessian: LossHessian, u: Tensor, shape: tuple[int, ...]):
        self.hessian, self.u, self.shape = hessian, u, tuple(shape)
        self.k, self.n, self.device, self.dtype = (
            hessian.rank * hessian.places,
            u.shape[0],
            u.device,
            u.dtype,
        )

    def _places(self) -> OuterProduct:
        """The same with columns: (K, N, 1, O, 1)."""
        c = self.hessian
        s = c.columns(0, c.rank)
        if c.places > 1:  # a diagonal: each entry is a column to itself
            s = torch.diag_embed(s[0, :, :, 0]).movedim(1, 0)
        else:
            s = s[:, :, 0]
        return OuterProduct(
            self.u[:, None, :, None], s[:, :, None, :, None].to(self.dtype), self.shape
        )

    def dense(self) -> Tensor:
        return self._places().dense()

    def columns(self, which: slice) -> Factor:
        return self if which == slice(0, self.k) else self._places().columns(which)

    def to(self, dtype: torch.dtype) -> Factor:
        return LastLayerFactor(self.hessian, self.u.to(dtype), self.shape)

    def square_sum(self) -> Tensor:
        h = self.hessian.diagonal().reshape(self.n, -1).to(self.dtype)
        return (h.mT @ self.u.square()).reshape(self.shape)

    def gram(self, other: Factor) -> Tensor:
        theirs = other._places() if isinstance(other, LastLayerFactor) else other
        return self._places().gram(theirs)


class LastLayerColumns:
    """The units from the output of the loss to the first layer that is not the same linear map for
    all samples.

    Args:
        sweep: the plan.
        curvature: of the loss.
        shared: ids of parameters that several modules own, whose blocks need columns.
        selection: the columns that walk, if not all do.
    """

    def __init__(
        self,
        sweep: Sweep,
        hessian: LossHessian,
        shared: set[int],
        selection: ColumnSelection | AllColumns | None = None,
    ):
        self.sweep, self.hessian, self.shared, self.selection = (
            sweep,
            hessian,
            shared,
            selection,
        )
        self.steps: list[Step] = []
        self.edge: Edge = sweep.graph.roots[0]
        self.rows: Tensor | None = None  # (C, 1, *shape): the rows of the Jacobian of these units
        self.short: int | None = None  # how many columns there are after `narrow`
        self.stages: list[tuple[Edge, Tensor]] = []  # behind each unit its edge and the rows there
        simple = isinstance(hessian, DiagonalHessian) or (
            isinstance(hessian, SoftmaxHessian) and hessian.places == 1
        )
        if len(sweep.graph.roots) > 1 or not simple or hessian.rows != sweep.n or sweep.n == 1:
            return
        if sweep.state[self.edge] is not sweep.in_order:
            return
        for step in sweep.graph.steps:
            if not self._take(step):
                break

    def _take(self, step: Step) -> bool:
        """Go through one more unit, if it is a linear map that all samples share."""
        out = step.out[0] if step.record is not None else None
        if out is None or step.into != [self.edge]:
            return False
        if self.sweep.state[out] is not self.sweep.in_order:
            return False
        j = step.slots["input"]
        if not isinstance(j, Identity) and not (isinstance(j, LinearMap) and not j.per_row):
            return False
        if step.params and (
            self.steps or not all(self._one_place(step, s, p) for s, p in step.params)
        ):
            return False
        if j.n != self.sweep.n or step.dtype in (torch.float16, torch.bfloat16):
            return False
        rows = self.rows
        if rows is None:
            size = self.hessian.block * self.hessian.places
            rows = torch.eye(size, dtype=step.dtype, device=j.like.device).reshape(
                size, 1, *j.outputs
            )
        self.rows = j.vjp(rows)
        self.steps.append(step)
        self.edge = out
        self.stages.append((out, self.rows))
        return True

    def _one_place(self, step: Step, slot: str, p: Tensor) -> bool:
        j = step.slots[slot]
        if (
            not isinstance(j, (PatchMatmul, ScaleShift))
            or self.sweep.uses[p] > 1
            or id(p) in self.shared
            or len(j.outputs) != 1
        ):
            return False
        return (
            j.matrix[0] == 1
            if isinstance(j, PatchMatmul)
            else j.m is None and j.inputs == j.outputs
        )

    @property
    def useful(self) -> bool:
        """Whether there is anything to be saved."""
        return bool(self.steps)

    @property
    def k(self) -> int:
        """The number of columns."""
        return self.selection.k if self.selection else self.hessian.rank * self.hessian.places

    def parameters(self, sink: Sink) -> None:
        """Give the parameters of the last layer their factors."""
        for step in self.steps:
            for slot, p in step.params:
                j = step.slots[slot]
                u = (
                    j.patches()[:, 0, :, 0]
                    if isinstance(j, PatchMatmul)
                    else j.like.new_ones(j.n, 1, dtype=step.dtype)
                )
                sink(p, LastLayerFactor(self.hessian, u, tuple(p.shape)))

    def narrow(self, memory: int) -> None:
        """Go back to where columns are shortest, if they are worth recompressing there: `columns`
        are then as many as entries.
        """
        lengths = [rows[0].numel() for _, rows in self.stages]
        at = lengths.index(min(lengths))
        d, behind = lengths[at], self.sweep.graph.steps[at + 1 :]
        n, fits = self.sweep.n, self.sweep.n * lengths[at] ** 2 * 8 * 3 <= memory
        if (
            fits
            and self.selection is None
            and worth_recompressing(self.k, n, self.hessian.block, d, walk_cost(behind))
        ):
            self.steps, (self.edge, self.rows) = self.steps[: at + 1], self.stages[at]
            self.short = d

    @property
    def walks(self) -> int:
        """How many columns `walked` gives."""
        return self.k if self.short is None else self.short

    def walked(self, size: int) -> Iterator[Tensor]:
        """What walks on from `edge`, `size` columns at a time."""
        if self.short is None:
            yield from self.columns(size)
            return
        assert self.rows is not None
        v = (
            triangular(self.gram())
            .to(edge_dtype(self.edge))
            .reshape(self.short, self.sweep.n, *self.rows.shape[2:])
        )
        yield from v.split(size)

    def gram(self) -> Tensor:
        """sum over columns of v v^T, (N, d, d), in float64, from the rows of J, without a
        column.
        """
        assert self.rows is not None
        c, flat = self.hessian, self.rows.reshape(len(self.rows), -1).double()
        if not isinstance(c, SoftmaxHessian):
            return _weighted_gram(flat, c.diagonal().reshape(c.rows, -1).double())
        # With D_c = J_c - J_t for the likeliest class t, H is a (sum_c p_c D_c D_c^T - R R^T) and
        # R = sum_c p_c D_c: no term is larger than 1 - p_t.
        p = c.p[:, 0].double()
        top = p.argmax(1, keepdim=True)
        rest = p.scatter(1, top, 0.0)
        best, mean, mass = flat[top[:, 0]], rest @ flat, rest.sum(1, keepdim=True)
        cross, r = mean[:, :, None] * best[:, None], mean - mass * best
        whole = (
            _weighted_gram(flat, rest)
            - cross
            - cross.mT
            + mass[:, :, None] * best[:, :, None] * best[:, None]
        )
        return (whole - r[:, :, None] * r[:, None]) * c.a[:, 0, :, None].double()

    def columns(self, size: int) -> Iterator[Tensor]:
        """All columns on `edge`, (k, N, *shape), `size` at a time at most."""
        assert self.rows is not None
        rows, dtype = self.rows, edge_dtype(self.edge)
        flat = rows.reshape(len(rows), -1)
        c = self.hessian
        if self.selection:
            make = self._selected(flat, self.selection)
        else:
            make = self._softmax(flat, c) if isinstance(c, SoftmaxHessian) else self._diagonal(flat)
        for a in range(0, self.k, size):
            v = make(a, min(a + size, self.k))
            yield v.reshape(-1, self.sweep.n, *rows.shape[2:]).to(dtype)

    @staticmethod
    def _selected(
        flat: Tensor, selection: ColumnSelection | AllColumns
    ) -> Callable[[int, int], Tensor]:
        """S J, of the columns of S that walk."""
        return lambda a, b: selection.columns(a, b).mT.flatten(2).to(flat.dtype) @ flat

    def _diagonal(self, flat: Tensor) -> Callable[[int, int], Tensor]:
        """sqrt(h_c) J_c."""
        weight = self.hessian.diagonal().reshape(self.hessian.rows, -1).sqrt().to(flat.dtype).mT
        return lambda a, b: flat[a:b, None] * weight[a:b, :, None]

    def _softmax(self, flat: Tensor, c: SoftmaxHessian) -> Callable[[int, int], Tensor]:
        """sqrt(a p_c) (J_c - J_t - R / (1 + sqrt p_t)) for all classes c but the likeliest t, with
        R = sum_c p_c (J_c - J_t).

        With D_c = J_c - J_t the Hessian is a (sum_c p_c D_c D_c^T - R R^T). Columns D_c - k R in
        the place of D_c make it so if k^2 (1 - p_t) - 2 k + 1 = 0, and this k is
        1 / (1 + sqrt p_t). Where t is among the first C - 1 classes, the last class stands in its
        place."""
        p, last = c.p[:, 0].to(flat.dtype), c.block - 1
        best, top = p.max(1, keepdim=True)
        rest = p.scatter(1, top, 0.0)
        away = flat[top[:, 0]]
        mean = rest @ flat - rest.sum(1, keepdim=True) * away
        shift = away + mean / (1 + best.sqrt())
        weight = (c.a[:, 0] * c.p[:, 0]).sqrt().to(flat.dtype)
        weight = weight.scatter(1, top, weight[:, last:]).mT
        sample = torch.arange(len(p), device=p.device)

        def make(a: int, b: int) -> Tensor:
            v = flat[a:b, None] - shift
            mine = ((top[:, 0] >= a) & (top[:, 0] < b)).nonzero()[:, 0]
            v[top[mine, 0] - a, sample[mine]] = flat[last] - shift[mine]
            return v.mul_(weight[a:b, :, None])

        return make


def _weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """sum_c w_nc J_c J_c^T: rows (C, d) and weights (N, C) give (N, d, d)."""
    step = max(1, CHUNK // rows.numel())
    return torch.cat([(rows.mT * part[:, None]) @ rows for part in weight.split(step)])


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
    return (size[:, :, None] * root).permute(2, 0, 1)


def worth_recompressing(k: int, n: int, c: int, d: int, cost: float) -> bool:
    """Whether n matrices d x d, each the sum over c rows, and their roots cost less than (k - d)
    columns, each of `cost`.

    Multiply-adds; those of matrices in float64, which take twice the time.
    """
    return k > d and 2.0 * n * (c * d**2 + d**3) < (k - d) * cost


def walk_cost(steps: list[Step]) -> float:
    """Multiply-adds of one column through some units, by their parameters and places.

    A layer with one place for each sample squares columns before it multiplies them by its input:
    they cost it their length."""
    total = 0.0
    for step in steps:
        for slot, p in step.params:
            j = step.slots[slot]
            places = j.places if isinstance(j, PatchMatmul) else 1
            back = p.numel() * places if step.out[0] is not None else 0
            total += j.n * (
                back + (2.0 * p.numel() * places if places > 1 else math.prod(j.outputs))
            )
    return max(total, 1.0)

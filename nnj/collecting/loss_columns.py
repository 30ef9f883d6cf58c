"""The columns that a loss sends back: of S with H = S S^T, random combinations of them, and its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnj.checks import Refusals, all_finite, at_once, refuse_unless
from nnj.collecting.loss_reading import gradient_of_call, read
from nnj.collecting.request import EXACT, GRADIENT, ColumnSource
from nnj.errors import NNJError
from nnj.generators import of_rank, same_on
from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.loss_hessian.base import LossHessian, check_outputs, rows_of
from nnj.loss_hessian.column_selection import AllColumns, ColumnSelection, PackedColumns
from nnj.recording.loss_state import as_called
from nnj.recording.records import Edge, LossCall
from nnj.registry.loss_rules import ask_loss_rule


@contextmanager
def _forgiven() -> Iterator[None]:
    """What is refused inside is forgotten."""
    with Refusals().later(), suppress(NNJError):
        yield


class Part(NamedTuple):
    """The columns of a chunk that come from one source, and how many of it there are in all
    chunks.
    """

    columns: slice
    total: int


@dataclass(eq=False)
class Chunk:
    """Some columns on the root edges, and which of them come from where."""

    roots: dict[Edge, Tensor]
    k: int
    parts: dict[ColumnSource, Part]


class _Columns(NamedTuple):
    """Columns of one source: (k, *shape) for each output of the loss."""

    source: ColumnSource
    outputs: Sequence[Tensor]
    total: int

    @property
    def k(self) -> int:
        return self.outputs[0].shape[0]


class LossColumns:
    """What one loss contributes to the scalar: H of `(loss * scale).sum()` in the outputs, and its
    columns in chunks.

    Args:
        call: the call of the loss.
        scale: the gradient that arrived at its value, which multiplies everything.
        node: autograd's node of the value.
        curvature: whether H is asked for; else nothing is refused for the sake of H.
        sign: 1 or -1: in the place of H, its part with the eigenvalues of this sign, of their
            absolute values; then the scale may be negative. None: H itself.

    Attributes:
        mesh: of ranks that share a model, and draw the same.
        ranks: of what is drawn, which of the ranks this is that draw for samples of their own.

    Errors: `NNJError` for a negative factor, outputs that are not finite or not real, a loss that
    is not convex in its output."""

    def __init__(
        self,
        call: LossCall,
        scale: Tensor,
        node: Any,
        sign: int | None = None,
        curvature: bool = True,
    ):
        self.call, self.scale, self.node = call, scale.detach(), node
        self.sign, self.curvature = sign, curvature
        self.ranks: dict[ColumnSource, int] = {}
        self.mesh: Any = None
        self.name = call.name
        self.outputs = [call.leaves[i] for i in call.outputs]
        self._check_call()
        check_outputs(self.name, self.outputs)

    def _check_call(self) -> None:
        if any(t._version != version for t, version in self.call.versions):
            raise NNJError(
                f"{self.name}: an argument of the loss was changed in place after the call. Clone "
                "it first"
            )
        scale, name = self.scale, self.name  # not this object, which would be kept
        if not self.curvature or self.sign is not None:
            fine = all_finite(scale)
        else:
            fine = (scale >= 0) & (scale < torch.inf)  # not for nan

        def error() -> NNJError:
            if not bool(torch.isfinite(scale).all()):
                return NNJError(
                    f"{name}: the factor of the loss is not finite; the loss or what was made of "
                    "it has overflowed"
                )
            return NNJError(
                f"{name}: the loss enters the scalar with a negative factor, so that its GGN is "
                "not positive semi-definite. Collect with signed=True, or without that term, or "
                "call backward on it alone"
            )

        refuse_unless(fine.all() if fine.dim() else fine, error)

    # -- the Hessian and the gradient in the outputs -----------------------------------------------

    @cached_property
    def hessian(self) -> LossHessian:
        """H in the outputs. Errors: `NNJError` if it is not positive semi-definite."""
        by_rule = self._by_rule if self.sign is None else None
        if by_rule is not None:
            return by_rule
        with as_called(self.call), at_once():
            return autodiff_hessian(self._value, tuple(self.outputs), self.name, self.sign or 0)

    @cached_property
    def rows(self) -> int:
        """How many rows the outputs have; a rule knows best
        (an output of (C,) is one row for cross entropy).
        """
        known: LossHessian | None = None
        if self.sign is not None:
            known = self.hessian
        else:
            with nullcontext() if self.curvature else _forgiven():
                known = self._by_rule
        return rows_of([t.shape for t in self.outputs]) if known is None else known.rows

    @cached_property
    def _by_rule(self) -> LossHessian | None:
        args, kwargs = self.call.arguments(self.outputs)
        with as_called(self.call):
            return ask_loss_rule(self.call.module, self.scale, self.outputs, args, kwargs)

    def _value(self, *outputs: Tensor) -> Tensor:
        result: Tensor = (read(self.call, outputs) * self.scale).sum()
        return result

    def gradient(self) -> list[Tensor]:
        """The gradient of the scalar in each output: that of the call."""
        return gradient_of_call(self.call, self.scale, self.node)

    # -- the layout of columns ---------------------------------------------------------------------

    def select(self, sample: Tensor | None, tol: float) -> ColumnSelection:
        """The exact columns to propagate.

        Args:
            sample: (R,) that of each row, or (R, D) that of each place; None where row i is sample
                i.
            tol: what may be lost, of the trace of H.
        """
        hessian = self.hessian
        if sample is None:
            if hessian.rows == 0 or (hessian.places == 1 and tol == 0):
                return AllColumns(hessian)
            sample = torch.arange(hessian.rows, device=hessian.device)
        return PackedColumns(hessian, sample, tol)

    def chunks(
        self,
        sources: Sequence[ColumnSource],
        selection: ColumnSelection | None,
        size: int,
    ) -> Iterator[Chunk]:
        """All columns that are wanted, about `size` at a time.

        Rows of one sample, and places of one row, are factorised on their own, so each has columns
        to itself. The few columns that are not exact travel with the first exact ones.

        Args:
            sources: where columns are to come from.
            selection: which exact columns, if any.
            size: how many columns may travel together.
        """
        others = self._gradient_and_draws(sources)
        if selection is not None and EXACT in sources:
            for start in range(0, selection.k, size):
                columns = selection.columns(start, min(start + size, selection.k))
                exact = _Columns(EXACT, self.hessian.to_outputs(columns), selection.k)
                yield self._chunk([exact, *others])
                others = []
        for source, outputs, total in others:
            for start in range(0, total, size):
                yield self._chunk(
                    [_Columns(source, [t[start : start + size] for t in outputs], total)]
                )

    def _gradient_and_draws(self, sources: Sequence[ColumnSource]) -> list[_Columns]:
        found = []
        if GRADIENT in sources:
            found.append(_Columns(GRADIENT, [g[None] for g in self.gradient()], 1))
        for source in sources:
            if source.drawn_for is not None:
                draws = source.drawn_for.draws
                rank, device = self.ranks.get(source, 0), self.outputs[0].device
                own = of_rank(source.drawn_for.generator, rank, device)
                if self.mesh is not None:
                    own = same_on(self.mesh.get_group(), own, device)
                columns = self.hessian.sample(draws, own)
                found.append(_Columns(source, self.hessian.to_outputs(columns), draws))
        return found

    def _chunk(self, groups: list[_Columns]) -> Chunk:
        """Columns of several sources side by side; an output that the loss is given twice has its
        columns added.
        """
        parts, k = {}, 0
        for group in groups:
            parts[group.source] = Part(slice(k, k + group.k), group.total)
            k += group.k
        roots: dict[Edge, Tensor] = {}
        for i, edge in enumerate(self.call.edges):
            dtype = groups[0].outputs[i].dtype
            columns = torch.cat([group.outputs[i].to(dtype) for group in groups])
            roots[edge] = roots[edge] + columns if edge in roots else columns
        return Chunk(roots, k, parts)

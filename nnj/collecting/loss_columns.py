"""The columns that a loss sends back: its exact factor, random combinations of it, and its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError, PluginError
from nnj.jacobians.sample_index import SampleIndex
from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.loss_hessian.base import LossHessian, check_outputs, rows_of
from nnj.loss_hessian.column_selection import AllColumns, ColumnSelection, PackedColumns
from nnj.recording.records import Edge, LossCall
from nnj.registry.blame import at_work
from nnj.registry.layer_rules import describes
from nnj.registry.loss_rules import FunctionLoss
from nnj.registry.manager import manager


@dataclass(eq=False)
class Chunk:
    """Some columns on the root edges, and which of them are whose: {"exact": slice, "signs": …,
    "gradient": …}.
    """

    roots: dict[Edge, Tensor]
    k: int
    parts: dict[str, slice]


class LossColumns:
    """What one loss contributes to the scalar: its curvature, and the columns in chunks.

    Args:
        call: the call of the loss.
        scale: the gradient that arrived at its value, which multiplies everything.

    Errors: `NNJError` for a negative factor, outputs that are not finite or not real, a loss that
    is not convex in its output."""

    def __init__(self, call: LossCall, scale: Tensor):
        self.call, self.scale = call, scale.detach()
        self.name = call.name
        if any(t._version != version for t, version in call.versions):
            raise NNJError(
                f"{self.name}: an argument of the loss was changed in place after the call. Clone "
                "it first"
            )
        if not bool(torch.isfinite(self.scale).all()):
            raise NNJError(
                f"{self.name}: the factor of the loss is not finite; the loss or what was made of "
                "it has overflowed"
            )
        if bool((self.scale < 0).any()):
            raise NNJError(
                f"{self.name}: the loss enters the scalar with a negative factor, so that its GGN "
                "is not positive semi-definite. Collect with signed=True, or without that term, or "
                "call backward on it alone"
            )
        self.outputs = [call.leaves[i] for i in call.outputs]
        check_outputs(self.name, self.outputs)

    @cached_property
    def rows(self) -> int:
        """How many rows the outputs have; a rule knows best
        (an output of (C,) is one row for cross entropy).
        """
        return (
            rows_of([t.shape for t in self.outputs])
            if self._by_rule is None
            else self._by_rule.rows
        )

    @cached_property
    def hessian(self) -> LossHessian:
        """The Hessian in the outputs. Errors: `NNJError` if it is not positive semi-definite."""
        return self._by_rule or autodiff_hessian(self._value, tuple(self.outputs), self.name)

    @cached_property
    def _by_rule(self) -> LossHessian | None:
        module = self.call.module
        entry = manager().find("loss", type(module))
        args, kwargs = self.call.arguments(self.outputs)
        if entry is None or entry.is_fallback or not describes(entry, module):
            return None
        if (
            len(self.outputs) > 1
            or not args
            or args[0] is not self.outputs[0]
            or (kwargs and entry.key is not FunctionLoss)
        ):
            return None
        who = f"plugin '{entry.source.plugin}' (loss '{self.name}')"
        try:
            found = entry.rule(module, self.scale, *args, **kwargs)
        except NotImplementedError:
            return None
        except NNJError:  # a refusal, not a fault
            raise
        except Exception as error:
            raise PluginError(
                f"{who}: the rule failed with {type(error).__name__}: {error}"
                f"{at_work(entry.source)}"
            ) from error
        if not isinstance(found, LossHessian):
            raise PluginError(
                f"{who}: the rule returned {type(found).__name__}, expected a nnj.LossHessian"
                f"{at_work(entry.source)}"
            )
        return found

    def _value(self, *outputs: Tensor) -> Tensor:
        args, kwargs = self.call.arguments(list(outputs))
        return (self.call.module.forward(*args, **kwargs) * self.scale).sum()

    def gradient(self) -> list[Tensor]:
        """The gradient of the scalar in each output."""
        with torch.enable_grad():
            outputs = [t.detach().requires_grad_() for t in self.outputs]
            value = self._value(*outputs)
            if not torch.allclose(
                value, (self.call.value * self.scale).sum(), rtol=1e-3, equal_nan=True
            ):
                raise NNJError(
                    f"{self.name} gives another value when it is called again: it draws random "
                    "numbers, or a hook or something in place has changed it. Draw them outside of "
                    "the loss and give them as an argument"
                )
            found = torch.autograd.grad(value, outputs, allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g for t, g in zip(outputs, found, strict=True)
        ]

    # -- the layout of columns ---------------------------------------------------------------------

    def roots(self, parts: tuple[Tensor, ...] | list[Tensor]) -> dict[Edge, Tensor]:
        """Columns on the root edges; an output given twice to the loss has its columns added."""
        found: dict[Edge, Tensor] = {}
        for edge, t in zip(self.call.edges, parts, strict=True):
            found[edge] = found[edge] + t if edge in found else t
        return found

    def select(self, sample_index: SampleIndex, tol: float) -> ColumnSelection:
        """The columns that walk.

        Args:
            owner: whose the rows are.
            tol: what may be lost, of the trace of H.
        """
        hessian = self.hessian
        one = (
            hessian.rows == sample_index.n and sample_index.of is None
        ) or sample_index.n == hessian.rows == 1
        if one and (hessian.rows == 0 or (hessian.places == 1 and tol == 0)):
            return AllColumns(hessian)
        whose = (
            torch.arange(sample_index.n, device=hessian.device)
            if one
            else sample_index.rows(hessian.rows, hessian.device)
        )
        assert whose is not None
        return PackedColumns(hessian, whose, tol)

    def chunks(
        self, wants: dict[str, Any], selection: ColumnSelection | None, size: int
    ) -> Iterator[Chunk]:
        """All columns that are wanted, `size` at a time at most.

        Rows of one sample, and places of one row, are factorised on their own, so each has columns
        to itself.

        Args:
            wants: the quantities by the source of their columns; "exact" and "gradient" are shared.
            selection: which exact columns, if any.
            size: how many columns may walk together.
        """
        extra: list[tuple[str, list[Tensor]]] = []
        if "gradient" in wants:
            extra.append(("gradient", [g[None] for g in self.gradient()]))
        for name, quantity in wants.items():
            if quantity.source == "signs":
                signs = self.hessian.sample(quantity.draws, quantity.generator)
                extra.append((name, list(self.hessian.to_outputs(signs))))
        for a in range(0, selection.k if selection and "exact" in wants else 0, size):
            assert selection is not None
            exact = selection.columns(a, min(a + size, selection.k))
            yield self._join([("exact", list(self.hessian.to_outputs(exact))), *extra])
            extra = []
        for name, parts in extra:
            for a in range(0, parts[0].shape[0], size):
                yield self._join([(name, [t[a : a + size] for t in parts])])

    def _join(self, groups: list[tuple[str, list[Tensor]]]) -> Chunk:
        parts, start = {}, 0
        for name, tensors in groups:
            k = tensors[0].shape[0]
            parts[name] = slice(start, start + k)
            start += k
        joined = [
            torch.cat([t.to(g[0].dtype) for t in g])
            for g in zip(*[tensors for _, tensors in groups], strict=True)
        ]
        return Chunk(self.roots(joined), start, parts)

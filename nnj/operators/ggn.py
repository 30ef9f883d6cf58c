"""nnj.GGN: the generalised Gauss-Newton matrix of a data set, and nnj.HessianOperator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from nnj.collecting.fit import fit
from nnj.operators.data_operator import DataOperator, Given
from nnj.propagation.called import call, logits_of
from nnj.propagation.linearize import Linearization, linearization
from nnj.registry.loss_rules import hessian_of_loss


class GGN(DataOperator):
    """The sum of J^T H J over a data set, matrix-free: `nnj.GGN(model, loss, data) @ v`.

    >>> ggn = nnj.GGN(model, nn.CrossEntropyLoss(), loader)
    >>> ggn @ v, ggn.solve(v, damping=1e-3), ggn.trace(), ggn.eigsh(k=10)

    Scaled as `nnj.fit` is: with scale="sum" that of the loss summed over the data set, whatever its
    own reduction. A product makes one forward pass, one of tangents, and one backward pass for each
    column. `diagonal` and `trace` are exact, by `nnj.fit(..., "ggn_diag")`.

    Arguments, attributes and errors: see `nnj.operators.data_operator.DataOperator`; and those of
    `nnj.linearize`, where samples influence one another.
    """

    @override
    def products(self, given: Given, v: Tensor) -> Tensor:
        forward = self.how[1]
        ask = lambda model, x: (
            logits_of(call(model, x)) if forward is None else forward(model, given.batch)
        )
        at = linearization(self.model, given.inputs, "weight", self.modules, ask)
        factor = torch.as_tensor(given.loss.factor(given.n), dtype=at.y.dtype, device=self.device)
        hessian = hessian_of_loss(given.loss.module, factor, at.y, given.target)
        tangents = at.jvp(v[:, None])
        tangents = tangents.reshape(len(tangents), *at.y.shape)
        (columns,) = hessian.to_outputs(hessian.product(hessian.from_outputs([tangents])))
        found = torch.empty_like(v)
        for u, out in zip(columns.to(at.y.dtype), found, strict=True):
            self.flat(self._pulled_back(at, u), out)
        return found

    def _pulled_back(self, at: Linearization, u: Tensor) -> Sequence[Tensor | None]:
        """u J, summed over samples."""
        if not at.graph_output.requires_grad:
            return [None] * len(self.params)
        return torch.autograd.grad(
            at.graph_output, self.params, u, retain_graph=True, allow_unused=True
        )

    @override
    def diagonal(self) -> Tensor:
        """diag(A), (P,), exact: by `nnj.fit(..., "ggn_diag")`, in one reading of the data."""
        reduction, forward, target = self.how
        return fit(
            self.model,
            self.loss,
            self.data,
            "ggn_diag",
            scale=self.scale,
            reduction=reduction,
            forward=forward,
            target=target,
            modules=self.modules,
            group=self.group if self.ranks else False,
        ).vector("ggn_diag")


class HessianOperator(DataOperator):
    """The Hessian of the loss of a data set in the parameters, matrix-free, by differentiating
    twice (Pearlmutter 1994): symmetric, and not positive semi-definite in general.

    Scaled as `GGN`. `diagonal`, and `trace` without samples, take P products, 64 at a time: for a
    model of any kind no exact way is cheaper, since part of H is curvature within the model, which
    no factor of its loss knows. Give `trace(samples=)` where P is more than a few thousand.

    Arguments, attributes and errors: see `nnj.operators.data_operator.DataOperator`.
    """

    @override
    def products(self, given: Given, v: Tensor) -> Tensor:
        value = self.value(given, self.output(given))
        grads = torch.autograd.grad(value, self.params, create_graph=True, allow_unused=True)
        found = torch.empty_like(v)
        for row, out in zip(v, found, strict=True):
            self.flat(self._row(grads, row), out)
        return found

    def _row(self, grads: Sequence[Tensor | None], v: Tensor) -> Sequence[Tensor | None]:
        """The derivative of the gradients along v of (P,)."""
        pairs = zip(grads, self.at_parameters(v), strict=True)
        met = [(g, t) for g, t in pairs if g is not None and g.requires_grad]
        if not met:
            return [None] * len(self.params)
        return torch.autograd.grad(
            [g for g, _ in met],
            self.params,
            [t for _, t in met],
            retain_graph=True,
            allow_unused=True,
        )

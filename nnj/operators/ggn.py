"""nnj.GGN: the generalised Gauss-Newton matrix of a data set, and nnj.HessianOperator."""

from __future__ import annotations

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
    def products(self, given: Given, v: list[Tensor]) -> list[Tensor]:
        forward = self.how[1]
        ask = lambda model, x: (
            logits_of(call(model, x)) if forward is None else forward(model, given.batch)
        )
        at = linearization(self.model, given.inputs, "weight", self.modules, ask)
        factor = torch.as_tensor(given.loss.factor(given.n), dtype=at.y.dtype, device=self.device)
        hessian = hessian_of_loss(given.loss.module, factor, at.y, given.target)
        tangents = at.jvp(torch.cat([t.flatten(1) for t in v], 1)[:, None])
        tangents = tangents.reshape(len(tangents), *at.y.shape)
        (columns,) = hessian.to_outputs(hessian.product(hessian.from_outputs([tangents])))
        found = [self._pulled_back(at, u) for u in columns.to(at.y.dtype)]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _pulled_back(self, at: Linearization, u: Tensor) -> list[Tensor]:
        """u J, summed over samples."""
        if not at.graph_output.requires_grad:
            return [torch.zeros_like(p) for p in self.params]
        found = torch.autograd.grad(
            at.graph_output, self.params, u, retain_graph=True, allow_unused=True
        )
        pairs = zip(found, self.params, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    @override
    def diagonal(self) -> Tensor:
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
    def products(self, given: Given, v: list[Tensor]) -> list[Tensor]:
        value = self.value(given, self.output(given))
        grads = torch.autograd.grad(value, self.params, create_graph=True, allow_unused=True)
        met = [(g, t) for g, t in zip(grads, v, strict=True) if g is not None and g.requires_grad]
        found = [self._row([g for g, _ in met], [t[i] for _, t in met]) for i in range(len(v[0]))]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _row(self, grads: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        zeros = [torch.zeros_like(p) for p in self.params]
        if not grads:
            return zeros
        found = torch.autograd.grad(grads, self.params, v, retain_graph=True, allow_unused=True)
        return [z if h is None else h for h, z in zip(found, zeros, strict=True)]

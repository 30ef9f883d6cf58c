"""The truth: dense Jacobians and Hessians by torch.func in float64, of a model that nnj has never
seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev


class Truth:
    """J^T H J of `scalar(outputs)`, with outputs = call(model), over all parameters that require
    grad.

    Args:
        model: in float64, not extended.
        call: from a function that runs the model to a list of output tensors.
        scalar: from that list to the scalar that is differentiated.
    """

    def __init__(self, model: nn.Module, call, scalar):
        self.names = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        params = {n: p.detach() for n, p in self.names.items()}

        def outputs(params):
            run = lambda *args, **kwargs: functional_call(model, {**params, **rest}, args, kwargs)
            return call(run)

        shapes = [t.shape for t in outputs(params)]
        sizes = [s.numel() for s in shapes]
        flat = lambda params: torch.cat([t.reshape(-1) for t in outputs(params)])
        self.f = flat(params).detach()
        self.of_flat = lambda f: scalar(
            [t.reshape(s) for t, s in zip(f.split(sizes), shapes, strict=True)]
        )
        jacobians = jacrev(flat)(params)
        self.j = {n: j.detach().reshape(len(self.f), -1) for n, j in jacobians.items()}
        self.h = hessian(self.of_flat)(self.f).detach()
        self.g = torch.func.grad(self.of_flat)(self.f).detach()

    def diag(self, name: str) -> Tensor:
        j = self.j[name]
        return ((self.h @ j) * j).sum(0).reshape(self.names[name].shape)

    def block(self, names: list[str]) -> Tensor:
        j = torch.cat([self.j[n] for n in names], 1)
        return j.T @ self.h @ j

    def grad(self, name: str) -> Tensor:
        return (self.g @ self.j[name]).reshape(self.names[name].shape)

    def sample_grads(self, name: str, owner: Tensor, n: int) -> Tensor:
        """Shares of the gradient by the sample of each output entry."""
        rows = self.g[:, None] * self.j[name]
        return (
            torch.zeros(n, rows.shape[1], dtype=rows.dtype)
            .index_add_(0, owner, rows)
            .reshape(n, *self.names[name].shape)
        )

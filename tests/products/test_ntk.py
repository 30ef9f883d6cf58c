"""The tangent kernel against dense Jacobians, for layers of few and of many places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.jacobians import outer_kernels


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, t):
        return self.two(torch.tanh(self.one(self.table(t))).mean(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (5, 4)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.Flatten(),
            nn.Linear(24, 3)
        ),
        (5, 2, 5, 5),
    ),
    "tokens": (Tokens, (5, 3)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    other = (shape[0] - 2, *shape[1:])
    if name == "tokens":
        return model, torch.randint(7, shape), torch.randint(7, other)
    return model, torch.randn(shape).double(), torch.randn(other).double()


def dense(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    params = {name: p.detach() for name, p in model.named_parameters()}
    j = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    return torch.cat([t.flatten(2) for t in j.values()], 2)


@pytest.mark.parametrize("places", [True, False, None])
@pytest.mark.parametrize("memory", [1, 1 << 28])
@pytest.mark.parametrize("name", MODELS)
def test_against_dense_jacobians(name, memory, places, monkeypatch):
    if places is not None:  # either way to contract places
        monkeypatch.setattr(outer_kernels, "_meets_by_places", lambda one, other: places)
    model, x, other = made(name)
    j, i = dense(model, x), dense(model, other)
    expected = torch.einsum("ncp,mdp->ncmd", j, i)
    torch.testing.assert_close(nnj.ntk(model, x, other, memory=memory), expected)
    torch.testing.assert_close(
        nnj.ntk(model, x, memory=memory), torch.einsum("ncp,mdp->ncmd", j, j)
    )
    equal = expected.diagonal(dim1=1, dim2=3)
    torch.testing.assert_close(nnj.ntk(model, x, other, per_class=True, memory=memory), equal)


def test_of_some_modules():
    model, x, other = made("mlp")
    j, i = dense(model, x)[..., 30:], dense(model, other)[..., 30:]
    found = nnj.ntk(model, x, other, modules=[model[2]])
    torch.testing.assert_close(found, torch.einsum("ncp,mdp->ncmd", j, i))
    found = nnj.ntk(model, x, other, modules=model[2], per_class=True)
    torch.testing.assert_close(found, torch.einsum("ncp,mcp->nmc", j, i))

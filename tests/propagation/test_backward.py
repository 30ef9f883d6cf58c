"""Columns are written over where they are the sweep's own and nobody reads them again."""

import pytest
import torch
from torch import nn

import nnj
from nnj.jacobians.jacobian import Diagonal


class Branches(nn.Module):
    """Two activations read one pooled convolution, whose sum goes through a third."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2)
        self.one, self.two, self.three = nn.Tanh(), nn.Sigmoid(), nn.Tanh()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(self.three(self.conv(x)))
        return self.last((self.one(x) + self.two(x) + x).flatten(1))


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


def adaptive():
    """Pooling by its rule, where `plain` has autograd's node."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Sigmoid(),
        nn.AdaptiveMaxPool2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def dense(model, x):
    names, params = zip(*model.named_parameters(), strict=True)
    params = tuple(p.detach() for p in params)

    def out(*given):
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))

    jacobians = torch.func.jacrev(out, tuple(range(len(params))))(*params)
    h = torch.eye(3, dtype=x.dtype).expand(len(x), 3, 3) * 2 / (3 * len(x))  # of the mean square
    return [torch.einsum("nc...,ncd,nd...->...", j, h, j) for j in jacobians]


@pytest.mark.parametrize("memory", [1, 1 << 28])
@pytest.mark.parametrize("make", [plain, adaptive, Branches])
def test_own_columns_are_written_over(make, memory, monkeypatch):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    expected = dense(model, x)
    over, there = [], Diagonal.vjp_over

    def spied(self, u):
        found = there(self, u)
        over.append(found.data_ptr() == u.data_ptr())
        return found

    monkeypatch.setattr(Diagonal, "vjp_over", spied)
    nnj.extend(model)
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect("ggn_diag", memory=memory):
        out = model(x)
        loss(out, torch.zeros_like(out)).backward()
    assert over
    assert all(over)
    for p, diagonal in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.ggn_diag, diagonal, rtol=1e-10, atol=1e-14)


def test_columns_that_a_user_hook_sees_stay():
    torch.manual_seed(0)
    model, x = plain().double(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    found = []
    for hooked in (False, True):
        nnj.extend(model)
        loss = nnj.extend(nn.MSELoss())
        with nnj.collect("batch_grad"):
            out = model(x)
            if hooked:
                out.register_hook(lambda g: g.clone())
            loss(out, torch.zeros_like(out)).backward()
        found.append([p.batch_grad.clone() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)

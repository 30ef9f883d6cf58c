"""What a loss is asked for: nothing of its curvature where only its gradient is wanted, and the
gradient of the call itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj

pytestmark = pytest.mark.usefixtures("seeded")
N, C, T = 5, 4, 7


def batch_grad(model, value, alone):
    """The collected rows, checked against `.grad` and against samples one by one."""
    model.zero_grad()
    with nnj.collect("batch_grad"):
        value.backward()
    for p in model.parameters():
        torch.testing.assert_close(p.batch_grad.sum(0), p.grad)
    for n in range(N):
        expected = torch.autograd.grad(alone(n), list(model.parameters()))
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.batch_grad[n], g)


ROWS = {
    "concave": lambda z, y: -z.square().sum(),
    "of every sign": lambda z, y: z.sin().sum(),
    "a norm of rows": lambda z, y: z.norm(dim=1).sum(),
    "not differentiable twice": lambda z, y: F.multi_margin_loss(z, y, p=2, reduction="sum"),
    "nll of what is no log probability": nn.NLLLoss(reduction="sum"),
    "cosine": lambda z, y: nn.CosineEmbeddingLoss(reduction="sum")(
        z[:, :2], z[:, 2:], torch.ones(len(z)).double()
    ),
    "negative": lambda z, y: -F.cross_entropy(z, y, reduction="sum"),
}


@pytest.mark.parametrize("name", ROWS)
def test_batch_grad_asks_for_no_curvature(name):
    loss = ROWS[name]
    model, extended = nnj.extend(nn.Linear(3, C).double()), nnj.extend(loss)
    x, y = torch.randn(N, 3).double(), torch.randint(C, (N,))
    batch_grad(model, extended(model(x), y), lambda n: loss(model(x[n : n + 1]), y[n : n + 1]))


def test_a_negative_factor():
    model, loss = nnj.extend(nn.Linear(3, C).double()), nnj.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 3).double(), torch.randint(C, (N,))
    batch_grad(
        model,
        -2 * loss(model(x), y),
        lambda n: -2 / N * F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]),
    )
    with pytest.raises(nnj.NNJError, match="negative"), nnj.collect("batch_grad", "ggn_diag"):
        (-loss(model(x), y)).backward()


class BatchFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, C)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).transpose(0, 1)


class TimeFirst(BatchFirst):
    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("cls", [BatchFirst, TimeFirst])
@pytest.mark.parametrize("function", [True, False])
def test_ctc(cls, function):
    axis = int(cls is TimeFirst)
    model = nnj.extend(cls().double(), batch_axis=axis)
    plain = nn.CTCLoss(reduction="sum")
    given = (lambda *given: F.ctc_loss(*given, reduction="sum")) if function else plain
    loss = nnj.extend(given)
    x = torch.randn(N, T, 3).double()
    y, long, short = torch.randint(1, C, (N, 3)), torch.full((N,), T), torch.full((N,), 3)
    x = x.transpose(0, 1).contiguous() if axis else x
    value = loss(model(x).log_softmax(2), y, long, short)

    def alone(n):
        z = model(x.narrow(axis, n, 1)).log_softmax(2)
        return plain(z, y[n : n + 1], long[:1], short[:1])

    batch_grad(model, value, alone)


@pytest.mark.parametrize("function", [True, False])
def test_cross_entropy_under_autocast(function):
    """The loss is that of the call, which autocast takes in float32."""
    model = nnj.extend(nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 10)))
    loss = nnj.extend((lambda z, y: F.cross_entropy(z, y)) if function else nn.CrossEntropyLoss())
    for _ in range(30):
        x, y = torch.randn(N, 3), torch.randint(10, (N,))
        model.zero_grad()
        with nnj.collect("batch_grad", "ggn_diag"), torch.autocast("cpu", torch.bfloat16):
            loss(model(x), y).backward()
        for p in model.parameters():
            torch.testing.assert_close(p.batch_grad.sum(0), p.grad, rtol=2e-2, atol=2e-3)


def test_an_output_that_is_given_twice():
    model = nnj.extend(nn.Linear(3, C).double())
    loss = nnj.extend(lambda a, b: (a * b.sin()).sum())
    x = torch.randn(N, 3).double()
    z = model(x)

    def alone(n):
        z = model(x[n : n + 1])
        return (z * z.sin()).sum()

    batch_grad(model, loss(z, z), alone)

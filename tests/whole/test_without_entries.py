"""Tensors without entries: experts without tokens, batches without samples, widths of zero; and
parameters without axes, or without a use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import QUANTITIES
from tests.support.oracle import close

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()


class Sine(nn.Module):
    """A layer that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.w)


class Experts(nn.Module):
    """All rows go to the second expert, none to the first one."""

    def __init__(self, first: nn.Module, prepare: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.prepare = first, nn.Linear(3, 3), prepare

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 100
        idle = self.first(self.prepare(x[chosen])).reshape(-1, 3)
        return torch.cat([idle, self.second(x[~chosen])])


as_given = lambda x: x
IDLE = {
    "linear": (lambda: nn.Linear(3, 3), as_given),
    "several": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), as_given),
    "softmax": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), as_given),
    "conv": (lambda: nn.Conv1d(3, 3, 1), lambda x: x[:, :, None]),
    "layer norm": (lambda: nn.LayerNorm(3), as_given),
    "batch norm": (lambda: nn.BatchNorm1d(3).eval(), as_given),
    "embedding": (lambda: nn.Embedding(7, 3), lambda x: x[:, 0].long()),
    "no rule": (Sine, as_given),
}


def collected(model: nn.Module, x: Tensor, y: Tensor, *quantities: str) -> None:
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    nnj.extend(model)
    with nnj.collect(*quantities):
        loss(model(x), y).backward()


@pytest.mark.parametrize("make, prepare", IDLE.values(), ids=IDLE)
def test_an_expert_without_rows(make, prepare):
    model = Experts(make(), prepare).double()
    collected(model, X, torch.zeros(5, 3).double(), *QUANTITIES)
    for p in model.first.parameters():
        assert p.grad.shape == p.ggn_diag.shape == p.ggn_diag_mc.shape == p.shape
        assert p.batch_grad.shape == (5, *p.shape)
        assert not any(t.any() for t in (p.grad, p.ggn_diag, p.ggn_diag_mc, p.batch_grad))
    for m in model.first.modules():
        size = sum(p.numel() for p in m.parameters(recurse=False))
        assert not size or torch.equal(m.ggn_block, torch.zeros(size, size).double())
    expected = 2 * X.square().sum(0).expand(3, 3)
    assert close(model.second.weight.ggn_diag, expected) == ""
    assert close(model.second.weight.batch_grad.sum(0), model.second.weight.grad) == ""


def test_an_expert_without_rows_that_is_used_elsewhere():
    """What it adds there is all that it adds."""
    model = Experts(nn.Linear(3, 3), as_given).double()
    model.second.weight = model.first.weight
    collected(model, X, torch.zeros(5, 3).double(), *QUANTITIES)
    assert close(model.first.weight.ggn_diag, 2 * X.square().sum(0).expand(3, 3)) == ""
    assert close(model.first.weight.batch_grad.sum(0), model.first.weight.grad) == ""
    assert torch.equal(model.first.bias.ggn_diag, torch.zeros(3).double())


@pytest.mark.parametrize("make", [Sine, lambda: nn.Linear(3, 3)])
def test_a_batch_without_samples(make):
    model = nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2)).double()
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    nnj.extend(model)
    with nnj.collect(*QUANTITIES) as c:
        loss(model(X[:0]), torch.zeros(0, 2).double()).backward()
    assert (c.samples, c.passes) == (0, 1)
    for p in model.parameters():
        assert torch.equal(p.ggn_diag, torch.zeros_like(p)) and p.batch_grad.shape == (0, *p.shape)
    with nnj.collect("batch_grad"):  # one among others
        for rows in (X[:2], X[:0], X[2:]):
            loss(model(rows), torch.zeros(len(rows), 2).double()).backward()
    assert all(p.batch_grad.shape == (5, *p.shape) for p in model.parameters())


@pytest.mark.parametrize("quantity", ["ggn_diag", "ggn_block", "kfac", "ekfac", "input_moment"])
@pytest.mark.parametrize("first", [True, False])
def test_a_pass_without_samples_adds_nothing_to_others(quantity, first):
    """Also where it has another form: factors of no columns, moments of no rows."""
    torch.manual_seed(0)
    model = nnj.extend(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 3)).double())
    loss, found = nnj.extend(nn.MSELoss(reduction="sum")), []
    for sizes in ([5], [0, 5] if first else [5, 0]):
        with nnj.collect(quantity) as context:
            for n in sizes:
                loss(model(X[:n, None]), torch.zeros(n, 3).double()).backward()
        holders = [*model.parameters(), *model.modules()]
        every = [h.__dict__.get(quantity) for h in holders]
        found.append([t if isinstance(t, Tensor) else t and t.dense() for t in every])
        assert context.samples == 5
    for one, other in zip(*found, strict=True):
        assert (one is None) is (other is None)
        assert one is None or torch.equal(one, other)
    assert any(one is not None for one in found[0])


@pytest.mark.parametrize("widths", [(3, 0, 2), (0, 3, 2), (3, 4, 0)])
def test_widths_of_zero(widths):
    a, b, c = widths
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).double()
    x, y = torch.ones(4, a).double(), torch.zeros(4, c).double()
    collected(model, x, y, *QUANTITIES)
    for p in model.parameters():
        assert p.ggn_diag.shape == p.shape and p.batch_grad.shape == (4, *p.shape)
        assert close(p.batch_grad.sum(0), p.grad) == ""
    if c:
        assert close(model[2].bias.ggn_diag, torch.full((c,), 8.0).double()) == ""
    for wrt in ("input", "weight"):
        size = a if wrt == "input" else sum(p.numel() for p in model.parameters())
        assert nnj.jacobian(model, x, wrt).shape == (4, c, size)
        assert nnj.jvp(model, x, x.new_zeros(4, size), wrt).shape == (4, c)
        assert nnj.vjp(model, x, x.new_zeros(4, c), wrt).shape == (4, size)
        for approximate in (False, True):
            diagonal = nnj.jTmjp(model, x, None, wrt, to_diag=True, diag_backprop=approximate)
            assert diagonal.shape == (4, size)
        assert nnj.jmjTp(model, x, None, wrt).shape == (4, c, c)


class Idle(nn.Module):
    """Parameters that nothing reaches, one of them without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_fit_with_a_parameter_without_axes():
    fit = nnj.fit(
        Idle().double(), nn.MSELoss(), [(X, X[:, :2])], "ggn_diag", "batch_grad", "ggn_block"
    )
    assert torch.equal(fit["ggn_diag"]["scale"], torch.zeros(()).double())
    assert torch.equal(fit["batch_grad"]["scale"], torch.zeros(5).double())
    assert fit.vector("batch_grad").shape == (5, 9) and fit.vector("ggn_diag").shape == (9,)


class Unused(Sine):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(2))


def test_a_layer_without_a_rule_that_does_not_use_a_parameter():
    model = nn.Sequential(Unused(), nn.Linear(3, 2)).double()
    j = nnj.jacobian(model, X, "weight")
    rows = [
        torch.autograd.grad(y, list(model.parameters()), retain_graph=True, allow_unused=True)
        for y in model(X).flatten()
    ]
    dense = [
        torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(row, model.parameters(), strict=True)
            ]
        )
        for row in rows
    ]
    assert close(j, torch.stack(dense).view(5, 2, -1)) == ""
    v = torch.randn(5, j.shape[2], generator=torch.Generator().manual_seed(1)).double()
    assert close(nnj.jvp(model, X, v, "weight"), (j @ v[..., None])[..., 0]) == ""
    assert nnj.jTmjp(model, X, None, "weight", to_diag=True, diag_backprop=True).shape == v.shape

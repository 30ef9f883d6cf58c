"""Each refusal: nnj's own error, a sentence with subject, fact and remedy; gradients intact,
nothing half collected, and the next `with` as if nothing had been."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nnj
from tests.support.cases import (
    EITHER,
    MLP,
    Attention,
    Case,
    Do,
    N,
    classes,
    do,
    linear,
    plain,
    r,
    vectors,
)
from tests.support.collecting import QUANTITIES, collected, extended, intact
from tests.support.oracle import build, data_of, losses_of, run

REFUSED: dict[str, tuple[Case, str]] = {}


def refused(
    name: str,
    words: str,
    make: Callable[[], nn.Module],
    data: Any = vectors,
    how: Any = plain,
    loss: Any = nn.CrossEntropyLoss,
    **options: Any,
) -> None:
    assert name not in REFUSED
    REFUSED[name] = Case(name, make, data, how, loss, **options), words


def coupled(
    name: str,
    how: Callable[..., Any],
    data: Any = vectors,
    loss: Any = nn.CrossEntropyLoss,
    call: Any = plain,
    **parts: Callable[[], Any],
) -> None:
    refused(name, "samples influence one another", do(how, **parts), data, call, loss)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(a) @ F.normalize(b).T, torch.arange(len(a)))


def batch_hard(s: Any, x: Tensor) -> Tensor:
    z = s.one(x)
    return torch.cdist(z, z)


def memory_bank(s: Any, x: Tensor) -> Tensor:
    """Prototypes made of the batch itself."""
    z = s.one(x)
    return -(z[:, None] - torch.stack([z[:2].mean(0), z[2:].mean(0), z.mean(0)])).square().sum(-1)


class Counted(nn.Module):
    """Statistics of the batch by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


# -- samples that influence one another ------------------------------------------------------------

refused(
    "batch norm in training",
    "BatchNorm1d.*training",
    lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)),
)
refused(
    "batch norm in training, images",
    "BatchNorm2d.*training",
    lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    lambda: (r(N, 2, 4, 4), classes()),
)
refused(
    "batch norm without statistics, in eval",
    "BatchNorm1d|influence",
    lambda: nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)
    ).eval(),
)
refused("lazy batch norm", "BatchNorm1d.*training", lambda: lazy())
refused(
    "batch norm in a frozen layer in training",
    "BatchNorm1d.*training",
    lambda: nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3).requires_grad_(False), nn.Linear(3, 3)
    ),
)
coupled(
    "functional batch norm",
    lambda s, x: s.head(F.batch_norm(s.one(x), None, None, training=True)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "batch norm by hand",
    lambda s, x: s.head(Counted()(s.one(x))),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "centred", lambda s, x: s.head(s.one(x) - s.one(x).mean(0)), one=linear(4, 3), head=linear(3, 3)
)
coupled(
    "centred output",
    lambda s, x: (lambda z: z - z.mean(0, keepdim=True))(s.one(x)),
    one=linear(4, 3),
)
coupled(
    "batch attention",
    lambda s, x: s.head((s.one(x) @ s.one(x).T).softmax(-1) @ s.one(x)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "batch attention, fused",
    lambda s, x: s.head(s.attention(x[None])[0]),
    attention=lambda: Attention(4, 2),
    head=linear(4, 3),
)
coupled(
    "batch attention, as many tokens",
    lambda s, x: s.head(s.attention(x.transpose(0, 1)).transpose(0, 1).mean(1)),
    lambda: (r(3, 3, 4), classes()),
    attention=lambda: Attention(4, 2),
    head=linear(4, 3),
)
coupled("contrastive", lambda s, x: s.one(x) @ s.one(x).T, one=linear(4, 2))
coupled(
    "contrastive, two towers",
    lambda s, a, b: F.normalize(s.one(a)) @ F.normalize(s.two(b)).T,
    lambda: (r(N, 4), r(N, 2), torch.arange(N)),
    call=lambda m, l, a, b, y: l(m(a, b), y),
    one=linear(4, 3),
    two=linear(2, 3),
)
coupled("distances in the batch", batch_hard, one=linear(4, 2))
coupled("prototypes of the batch", memory_bank, one=linear(4, 2))
coupled(
    "graph of nodes",
    lambda s, x: s.head(torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]]).to(x) @ s.one(x)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "cumulative over the batch",
    lambda s, x: s.head(s.one(x).cumsum(0)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "rolled and added",
    lambda s, x: s.head(s.one(x) + s.one(x).roll(1, 0)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "softmax over the batch",
    lambda s, x: s.head(s.one(x).softmax(0)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "largest of the batch",
    lambda s, x: s.head(s.one(x) / s.one(x).abs().max()),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "mixup in the hidden layer",
    lambda s, x: s.head(0.7 * s.one(x) + 0.3 * s.one(x)[torch.tensor([1, 2, 0])]),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "norm of the whole batch",
    lambda s, x: s.head(F.layer_norm(s.one(x), (3, 3))),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled(
    "coupled in the derivative alone",
    lambda s, x: s.head(
        s.one(x) * s.one(x).mean(0).detach() + (s.one(x).sum(0) - s.one(x).sum(0).detach())
    ),
    one=linear(4, 3),
    head=linear(3, 3),
)
refused(
    "a loss that couples rows",
    "couples rows|influence|several times",
    MLP,
    lambda: (r(N, 4), r(N, 4)),
    lambda m, l, a, b: l(m(a), m(b)),
    lambda: info_nce,
)
refused(
    "a loss of the mean output",
    "couples rows|influence",
    MLP,
    lambda: (r(N, 4), r(3)),
    plain,
    lambda: lambda z, y: (z.mean(0) - y).square().sum(),
)


# -- the loss --------------------------------------------------------------------------------------

refused("negative factor", "negative", MLP, how=lambda m, l, x, y: -l(m(x), y))
refused(
    "difference of losses",
    "negative",
    MLP,
    how=lambda m, l, x, y: l(m(x), y) - 0.1 * l(m(x), (y + 1) % 3),
)
refused(
    "negative weight of a row",
    "negative",
    MLP,
    loss=lambda: nn.CrossEntropyLoss(reduction="none"),
    how=lambda m, l, x, y: (l(m(x), y) * torch.tensor([1.0, -1.0, 1.0]).double()).sum(),
)
refused(
    "not convex", "not positive semi-definite", MLP, loss=lambda: lambda z, y: torch.sin(z).sum()
)
refused("concave", "not positive semi-definite", MLP, loss=lambda: lambda z, y: -z.square().sum())
refused(
    "gaussian nll of two outputs",
    "not positive semi-definite",
    MLP,
    lambda: (r(N, 4), r(N)),
    loss=lambda: lambda z, y: F.gaussian_nll_loss(z[:, 0], y, z[:, 1].exp()),
)
refused(
    "random numbers in the loss",
    "another value",
    MLP,
    loss=lambda: lambda z, y: F.cross_entropy(F.dropout(z, 0.5), y),
)
refused(
    "infinite output",
    "not finite",
    do(lambda s, x: s.one(x) / torch.zeros(3).double(), one=linear(4, 3)),
    loss=nn.MSELoss,
    data=lambda: (r(N, 4), r(N, 3)),
)
refused(
    "nan in the output",
    "not finite",
    do(lambda s, x: s.one(x) * torch.tensor([1.0, float("nan"), 1.0]), one=linear(4, 3)),
)
refused(
    "masked with -inf",
    "not finite.*mask",
    do(
        lambda s, x: s.one(x).masked_fill(torch.tensor([False, False, True]), -torch.inf),
        one=linear(4, 3),
    ),
    lambda: (r(N, 4), classes(N, 2)),
)
refused(
    "complex output",
    "complex.*view_as_real",
    do(lambda s, x: torch.complex(s.one(x), s.two(x)), one=linear(4, 3), two=linear(4, 3)),
    lambda: (r(N, 4), r(N, 3)),
    loss=lambda: lambda z, y: (z - y).abs().square().mean(),
)
refused(
    "complex model",
    "complex.*view_as_real",
    do(lambda s, x: torch.fft.fft(s.one(x)), one=linear(4, 3)),
    lambda: (r(N, 4), r(N, 3)),
    loss=lambda: lambda z, y: (z - y).abs().square().mean(),
)
refused(
    "a loss with a way past its arguments",
    "otherwise than through its arguments",
    MLP,
    loss=lambda: lambda box, y: F.cross_entropy(box.z, y),
    how=lambda m, l, x, y: l(Box(m(x)), y),
)
refused(
    "an argument changed in place",
    "in place",
    MLP,
    loss=nn.L1Loss,
    data=lambda: (r(N, 4), r(N, 3)),
    how=lambda m, l, x, y: (lambda z: (lambda v: (z.add_(1), v)[1])(l(z, y)))(m(x) + 0),
)


# -- the model -------------------------------------------------------------------------------------

refused(
    "reentrant checkpoint",
    "use_reentrant=False",
    do(
        lambda s, x: s.head(checkpoint(s.one, x, use_reentrant=True)),
        one=linear(4, 3),
        head=linear(3, 3),
    ),
    lambda: (r(N, 4).requires_grad_(), classes()),
)
refused(
    "rows that do not divide",
    "influence|divide|rows",
    do(
        lambda s, x: s.head(torch.tanh(s.one(x)).reshape(4, 9)),
        one=linear(4, 12),
        head=linear(9, 3),
    ),
    lambda: (r(N, 4), classes(4)),
)


class Box:
    def __init__(self, z: Tensor):
        self.z = z


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 3))
    model(torch.zeros(3, 4))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    case, words = REFUSED[name]
    alone = build(case)
    run(case, alone, losses_of(case)).backward()
    model, losses = extended(case)
    with (
        pytest.raises(nnj.NNJError, match=re.compile(words, re.S)) as error,
        nnj.collect(*QUANTITIES),
    ):
        run(case, model, losses).backward()
    assert len(str(error.value)) > 40 and "sweep failed" not in str(error.value)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (
            p.grad is None or torch.equal(p.grad, q.grad) or bool(q.grad.isnan().any())
        )
    intact(model)
    for first, second in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(first, second), "running statistics are those of one forward pass"
    after(model)


def after(model: nn.Module) -> None:
    """The next `with`, on another model and on the same parameters, is as if nothing had been."""
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []
    p = next(p for p in model.parameters() if p.requires_grad)
    weight = nnj.extend(Do(lambda s, x: x * s.p.sum(), p=p))
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.MSELoss())(
            weight(torch.ones(2, 1).double()), torch.zeros(2, 1).double()
        ).backward()
    torch.testing.assert_close(p.ggn_diag, torch.full_like(p, 2.0))


@pytest.mark.parametrize("name", EITHER)
def test_exact_or_refused(name):
    try:
        found = collected(EITHER[name], "ggn_diag", "ggn_block", "batch_grad")
    except nnj.NNJError as error:
        assert re.search(
            "influence one another|whose|belong", str(error)
        ) and "sweep failed" not in str(error)
        assert (
            "influence" in str(error) or collected(EITHER[name], "ggn_diag", "ggn_block") == []
        ), "the gradient alone is not known"
    else:
        assert found == []


def test_a_refused_pass_among_others_adds_nothing():
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(x), y).backward()
        there = {n: (p.ggn_diag.clone(), p.batch_grad.clone()) for n, p in model.named_parameters()}
        with pytest.raises(nnj.NNJError, match="negative"):
            (-loss(model(x), y)).backward()
        for n, p in model.named_parameters():
            assert torch.equal(p.ggn_diag, there[n][0]) and torch.equal(p.batch_grad, there[n][1])
        loss(model(x), y).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, 2 * there[n][0])
        assert p.batch_grad.shape[0] == 2 * N


def test_one_refused_loss_of_two():
    model, losses = extended(
        Case("", MLP, vectors, loss=lambda: (nn.CrossEntropyLoss(), nn.MSELoss()))
    )
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"MSELoss.*negative"), nnj.collect("ggn_diag"):
        z = model(x)
        (losses[0](z, y) - losses[1](z, torch.zeros(N, 3).double())).backward()
    intact(model)

"""Columns behind a global pooling are squared as one, wherever it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.jacobians import outer_product
from nnj.jacobians.jacobian import Diagonal, LinearMap
from nnj.jacobians.separable import note, separable
from tests.support.fitting import agree, dense

pytestmark = pytest.mark.usefixtures("seeded")
N, C = 3, 4


class Branches(nn.Module):
    """Two paths to one pooling, of which one is scaled: their sum is separable no more."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Conv2d(2, 5, 3), nn.Conv2d(2, 5, 3), nn.Linear(5, C)
        self.pool, self.wide = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh() + self.other(x)
        return self.head((self.pool(h) + self.pool(self.wide(h))).flatten(1))


def behind(*layers: nn.Module, width: int = 6, pool: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        *layers, pool or nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, C)
    )


def statistics(width: int) -> nn.Module:
    norm = nn.BatchNorm2d(width)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)
    return norm


twice = nn.Conv2d(6, 6, 3, padding=1)
# a model, the shape of a sample, and whether a layer before the pooling has one column
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "relu": (lambda: behind(nn.Conv2d(2, 6, 3), nn.ReLU()), (2, 5, 6), True),
    "no activation": (lambda: behind(nn.Conv2d(2, 6, 3)), (2, 5, 6), True),
    "norm, activation": (
        lambda: behind(nn.Conv2d(2, 6, 3), statistics(6), nn.SiLU()),
        (2, 5, 6),
        True,
    ),
    "groups": (lambda: behind(nn.Conv2d(2, 6, 3, groups=2), nn.Tanh()), (2, 5, 6), True),
    "parameter of the slope": (lambda: behind(nn.Conv2d(2, 6, 3), nn.PReLU(6)), (2, 5, 6), True),
    "two convolutions": (
        lambda: behind(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 6, 2), nn.ReLU()),
        (2, 5, 6),
        True,
    ),
    "window": (
        lambda: behind(nn.Conv2d(2, 6, 3), nn.ReLU(), pool=nn.AvgPool2d(3)),
        (2, 5, 5),
        True,
    ),
    "one axis": (
        lambda: behind(nn.Conv1d(2, 6, 3), nn.Tanh(), pool=nn.AdaptiveAvgPool1d(1)),
        (2, 7),
        True,
    ),
    "a softmax between": (
        lambda: behind(nn.Conv2d(2, 6, 3), nn.Softmax(1)),
        (2, 5, 6),
        False,
    ),
    "four windows": (
        lambda: behind(nn.Conv2d(2, 6, 3), nn.ReLU(), width=24, pool=nn.AdaptiveAvgPool2d(2)),
        (2, 5, 6),
        False,
    ),
    "one layer twice": (
        lambda: behind(nn.Conv2d(2, 6, 1), twice, nn.Tanh(), twice),
        (2, 4, 4),
        False,
    ),
    "branches": (Branches, (2, 6, 6), False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", [2**28, 20_000])
def test_the_diagonal_is_exact(monkeypatch: Any, name: str, memory: int) -> None:
    make, shape, one = MODELS[name]
    model, loss = make().double().eval(), nnj.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, *shape).double(), torch.randint(C, (N,))
    nnj.extend(model)
    made = []
    explicit = outer_product.explicit_squares
    monkeypatch.setattr(
        outer_product,
        "explicit_squares",
        lambda v, *more: made.append(len(v)) or explicit(v, *more),
    )
    with nnj.collect("ggn_diag", "batch_ggn_diag", memory=memory, verify=False):
        loss(model(x), y).backward()
    found = {name: p.ggn_diag for name, p in model.named_parameters()}
    agree(found, dense(model, nn.CrossEntropyLoss(), x, y)[0])
    for p in model.parameters():
        torch.testing.assert_close(p.batch_ggn_diag.sum(0), p.ggn_diag)
    assert (1 in made) or not one


def pooling(x: Tensor) -> LinearMap:
    return LinearMap(
        lambda v: v.mean(2, keepdim=True),
        lambda u: u.expand(-1, -1, x.shape[2]) / x.shape[2],
        x.shape[1:],
        (x.shape[1], 1),
        x,
        by_channel=True,
    )


def test_what_was_written_over_is_known_no_more() -> None:
    x, d = torch.randn(2, N, 5, 7)
    j, u = pooling(x), torch.randn(C, N, 5, 1)
    v = j.vjp(u)
    assert j.spreads and separable(v) is None
    note(j, u, v)
    slopes = Diagonal(d)
    w = slopes.vjp(v)
    note(slopes, v, w)
    known = separable(w)
    assert known is not None
    torch.testing.assert_close(known.one_column().square()[0], w.square().sum(0))
    w.mul_(2)
    assert separable(w) is None and separable(w + 0) is None


def test_a_row_of_one_axis_has_no_places() -> None:
    x = torch.randn(N, 5)
    assert not Diagonal(x).entrywise
    assert not LinearMap(lambda v: v, lambda u: u, (5, 2), (5, 2), x, by_channel=True).spreads

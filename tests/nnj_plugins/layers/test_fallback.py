"""A layer that nobody knows runs a few times more than the user calls it, which leaves no trace."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.oracle import close

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()


class Keeps(nn.Module):
    """Keeps what it computes, wherever one can keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.list: list[Tensor] = []
        self.nested: dict[str, list[Tensor]] = {"y": []}
        self.by_name: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.queue: deque[Tensor] = deque(maxlen=8)
        self.last: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(x * self.w.tanh())
        self.list.append(y)
        self.nested["y"].append(y)
        self.by_name["y"].append(y)
        self.queue.append(y)
        self.last, self.calls = y, self.calls + 1
        return y


class Draws(nn.Module):
    """Draws numbers of which nothing depends, with both generators; or seeds them."""

    def __init__(self, seeds: bool = False):
        super().__init__()
        self.w, self.seeds = nn.Parameter(torch.randn(3)), seeds

    def forward(self, x: Tensor) -> Tensor:
        if self.seeds:
            random.seed(1)
            torch.manual_seed(1)
        noise = random.random() + torch.rand(())
        return torch.sin(x * self.w.tanh()) + 0 * noise


def model_of(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2)).double()


def collect(model: nn.Module) -> None:
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    nnj.extend(model)
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(X), torch.zeros(4, 2).double()).backward()


USES = {
    "collect": collect,
    "jacobian": lambda model: nnj.jacobian(model, X, "weight"),
    "jvp": lambda model: nnj.jvp(model, X, torch.ones(4, 3).double()),
    "vjp": lambda model: nnj.vjp(model, X, torch.ones(4, 2).double(), "weight"),
    "jTmjp": lambda model: nnj.jTmjp(model, X, to_diag=True),
    "fit": lambda model: nnj.fit(
        model, nn.MSELoss(), [(X, torch.zeros(4, 2).double())], "ggn_diag"
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_a_layer_keeps_is_that_of_one_call(use):
    layer = Keeps()
    model = model_of(layer)
    use(model)
    kept = [layer.list, layer.nested["y"], layer.by_name["y"], layer.queue]
    assert layer.calls == 1 and [len(several) for several in kept] == [1, 1, 1, 1]
    assert all(torch.stack(list(several)).shape == (1, 4, 3) for several in kept)
    assert all(several[0] is layer.last for several in kept)


def test_its_values_are_right():
    layer = Keeps()
    model = model_of(layer)
    collect(model)
    y = layer.last.detach()
    weights = model[2].weight.detach().square().sum(0)
    x = model[0](X).detach()
    w = layer.w.detach().tanh()
    slope = x * torch.cos(x * w) * (1 - w.square())
    assert close(layer.w.ggn_diag, 2 * (slope.square() * weights).sum(0)) == ""
    assert close(model[2].weight.ggn_diag, 2 * y.square().sum(0).expand(2, 3)) == ""


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_generators_stand_where_one_call_leaves_them(use, seeds):
    model = model_of(Draws(seeds))
    random.seed(0)
    torch.manual_seed(0)
    model(X)
    expected = torch.get_rng_state(), random.getstate()
    random.seed(0)
    torch.manual_seed(0)
    use(model)
    assert torch.equal(torch.get_rng_state(), expected[0]) and random.getstate() == expected[1]

"""A rule that breaks its contract is named, with its plugin and the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.registry.manager import use
from nnj_plugins.losses import classification as losses
from tests.support.cases import MLP, Case, vectors
from tests.support.collecting import QUANTITIES, collected, intact


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Broken(nnj.Jacobian):
    """A map of the right shapes that gives others."""

    def jvp(self, v: Tensor) -> Tensor:
        return v[..., :2]

    def vjp(self, u: Tensor) -> Tensor:
        return u[..., :2]


def fault_dict(m: Any, x: Tensor, y: Tensor) -> Any:
    return [nnj.Diagonal(torch.ones_like(x))]


def fault_name(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)), "wieght": nnj.Diagonal(x)}


def fault_kind(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": torch.ones_like(x), "weight": torch.ones_like(x)}


def fault_raises(m: Any, x: Tensor, y: Tensor) -> Any:
    return {}["input"]


def fault_shape(m: Any, x: Tensor, y: Tensor) -> Any:
    return {
        "input": nnj.Dense(torch.ones(len(x), 3, 2).to(x), (2,), (3,)),
        "weight": nnj.Diagonal(x),
    }


def fault_rows(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)[:1]), "weight": nnj.Diagonal(x)}


def fault_vjp(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": Broken((3,), (3,), x), "weight": nnj.Diagonal(x)}


@pytest.mark.parametrize(
    "rule, words",
    [
        (fault_dict, "returned list, expected a dict"),
        (fault_name, "'wieght'.*neither"),
        (fault_kind, "Tensor, expected a nnj.Jacobian"),
        (fault_raises, "failed with KeyError"),
        (fault_shape, r"\(2,\).*expected \(3,\)"),
        (fault_rows, "1 rows.*expected"),
        (fault_vjp, r"vjp of 'input' returned .*, expected"),
    ],
)
def test_a_broken_rule_is_named(rule, words):
    from nnj_plugins.layers import linear as linear_rule
    from nnj_plugins.quantities import ggn_diag

    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register: Any) -> None:
            register(Toy, rule)

    manager = nnj.PluginManager(load=False)
    for name, plugin in (
        ("nnj-losses", losses),
        ("nnj-ggn-diag", ggn_diag),
        ("nnj-linear", linear_rule),
        ("nnj-toy", Plugin()),
    ):
        manager.register(plugin, name)
    former = use(manager)
    try:
        model = nnj.extend(nn.Sequential(nn.Linear(4, 3), Toy(), nn.Linear(3, 3)))
        alone = nn.Sequential(nn.Linear(4, 3), Toy(), nn.Linear(3, 3))
        alone.load_state_dict(model.state_dict())
        loss, (x, y) = nnj.extend(nn.CrossEntropyLoss()), vectors()
        F.cross_entropy(alone(x), y).backward()
        with pytest.raises(nnj.PluginError, match=words) as error, nnj.collect("ggn_diag"):
            loss(model(x), y).backward()
        assert "plugin 'nnj-toy' (layer '1')" in str(error.value)
        assert all(
            torch.equal(p.grad, q.grad)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True)
        )
        intact(model)
    finally:
        use(former)
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []

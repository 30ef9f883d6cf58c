"""check_layer says what it checks: a rule, or, if asked for, the fallback.

What it finds in rules is tested in `tests/registry/test_layer_rules.py`, and with every layer of
our own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.testing import check_layer


class Frequency(nn.Module):
    """A layer of the user's, for which he believes to have registered a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.weight * x)


class Coupled(Frequency):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_a_layer_without_a_rule_is_not_checked_by_the_fallback_in_silence():
    message = (
        r"^no rule is registered for Frequency: check_layer would check the fallback of plugin "
        r"'nnj-fallback' .*, which is taken for every module\. Register a rule for Frequency \(if "
        r"there is one, its plugin is not installed\), or say check_layer\(\.\.\., fallback=True\)$"
    )
    with pytest.raises(nnj.NNJError, match=message):
        check_layer(Frequency(), torch.randn(4, 3))


def test_the_fallback_is_checked_where_it_is_asked_for():
    torch.manual_seed(0)
    check_layer(Frequency(), torch.randn(4, 3), fallback=True)
    check_layer(nn.Linear(3, 2), torch.randn(4, 3), fallback=True)  # its own rule
    with pytest.raises(AssertionError, match="rows of the batch influence one another"):
        check_layer(Coupled(), torch.randn(4, 3), fallback=True)


def test_a_disabled_plugin_is_named(monkeypatch):
    former = nnj.registry.manager.use(nnj.PluginManager())
    monkeypatch.setenv("NNJ_DISABLED_PLUGINS", "nnj-linear")
    try:
        with pytest.raises(nnj.NNJError, match=r"is not installed or is disabled \(nnj-linear\)\)"):
            check_layer(nn.Linear(3, 2), torch.randn(4, 3))
    finally:
        nnj.registry.manager.use(former)

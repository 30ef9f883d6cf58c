"""Nodes that belong to an engine are the identity, and are run by it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.recording.engine import behind_engine, is_engine, through_engine
from nnj.recording.records import edge_of
from tests.support.collecting import X, Y, base
from tests.support.engine import Owned
from tests.support.oracle import Truth, build, close, dense


class _DDPSink(torch.autograd.Function):
    """One of a user, under the same name."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 2


class Mixed(nn.Module):
    """Among the results are some that are no tensors, and one that needs no gradient."""

    def forward(self, x: Tensor) -> tuple:
        return None, x * 2, 3, x.detach(), x.sum(), "word", x + 1


def test_edges_lead_behind_them():
    x = torch.ones(3, requires_grad=True)
    out = Owned(Owned(Mixed()))(x)
    for nr, name in {1: "MulBackward0", 4: "SumBackward0", 6: "AddBackward0"}.items():
        assert is_engine(out[nr].grad_fn)
        node, number = edge_of(out[nr])
        assert node.name() == name and number == 0
    node = out[1].grad_fn
    assert behind_engine((node, 3)) is behind_engine((node, 0)) is None
    assert behind_engine((x * 2).grad_fn.next_functions[0])[0].variable is x
    kept = Owned(Mixed())(x)  # torch 2.6 keeps no node of a Function without its outputs
    inner = kept[1].grad_fn
    assert through_engine(inner, [*"abcdefg"]) == ["b", None, "e", "g"]


def test_a_function_of_the_same_name_is_a_users():
    y = _DDPSink.apply(torch.ones(3, requires_grad=True))
    assert y.grad_fn.name() == "_DDPSinkBackward" and not is_engine(y.grad_fn)
    assert edge_of(y) == (y.grad_fn, 0)


@pytest.mark.parametrize("extend", ["inside", "outside"])
@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad"])
@pytest.mark.parametrize("verify", [True, False])
def test_only_the_engine_runs_them(extend, quantity, verify):
    """The loss read again, the verification and the columns go past the node."""
    model = build(base())
    owned = Owned(nnj.extend(model)) if extend == "inside" else nnj.extend(Owned(model))
    loss = nnj.extend(lambda z, y: nn.functional.cross_entropy(z, y) + 0.1 * z.square().mean())
    with nnj.collect(quantity, verify=verify):
        loss(owned(X), Y).backward()
    assert owned.runs == 1
    truth = Truth(base(loss=lambda: lambda z, y: loss.function(z, y)))
    for name, p in model.named_parameters():
        found = getattr(p, quantity)
        expected = truth.diag(name) if quantity == "ggn_diag" else truth.batch_grad(name)
        assert close(found, expected) == ""


class Hooked(nn.Module):
    """Its gradient is not what its forward says."""

    def __init__(self, hook: Callable[[Tensor], Tensor]):
        super().__init__()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(self.hook)
        return y


def test_one_inside_of_a_model():
    """What is before and behind the node is verified, each by itself."""
    model, loss = build(base()), nnj.extend(nn.CrossEntropyLoss())
    truth = Truth(base())
    twice, clamped = Hooked(lambda g: 2 * g), Hooked(lambda g: g.clamp(-1e-3, 1e-3))
    for extra in ([], [clamped], [twice]):
        refused = clamped in extra
        behind = nn.Sequential(model.one, *extra, nn.Tanh(), model.two)
        parts = nnj.extend(nn.Sequential(Owned(behind), nn.Sigmoid(), Owned(model.three)))
        with (
            nnj.collect("ggn_diag"),
            pytest.raises(nnj.NNJError, match="a gradient hook") if refused else nullcontext(),
        ):
            loss(parts(X), Y).backward()
        assert parts[0].runs == parts[2].runs == 1
        for name, p in model.named_parameters():
            if refused:
                assert not hasattr(p, "ggn_diag")
            else:
                times = 4 if twice in extra and name.startswith("one") else 1
                assert close(p.ggn_diag, times * truth.diag(name)) == ""


def test_a_parameter_before_and_behind_one():
    """Autograd cannot be asked without running the node; the results are right all the same."""
    torch.manual_seed(0)
    tied = nn.Linear(4, 4, dtype=torch.float64)
    parts = nnj.extend(nn.Sequential(Owned(nn.Sequential(tied, nn.Tanh())), tied))
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss(parts(X), Y).backward()
    assert parts[0].runs == 1
    twin = nn.Sequential(tied, nn.Tanh(), tied)
    expected = dense(
        copy.deepcopy(twin), lambda run: [run(X)], lambda z: nn.functional.cross_entropy(z[0], Y)
    )
    for name, p in twin.named_parameters():
        assert close(p.ggn_diag, expected.diag(name)) == ""


def test_a_loss_behind_them():
    """A model may return its loss through the node."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = build(base()), nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.model(x), y)

    whole = Owned(WithLoss())
    nnj.extend(whole)
    with nnj.collect("ggn_diag"):
        (whole(X, Y) * 1).backward()
    assert whole.runs == 1
    truth = Truth(base())
    for name, p in whole.module.model.named_parameters():
        assert close(p.ggn_diag, truth.diag(name)) == ""

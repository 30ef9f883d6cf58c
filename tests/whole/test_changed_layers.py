"""Layers that are not what their class says, before and after extend, and hooks of users."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import nnj
from tests.support.cases import MLP
from tests.support.collecting import QUANTITIES, Fixed, X, Y, base, exact, net, pair, same
from tests.support.oracle import Truth, build, dense


def changed_output(model: MLP) -> None:
    model.two.register_forward_hook(lambda m, args, y: y * 2 + args[0])


def changed_output_in_place(model: MLP) -> None:
    model.two.register_forward_hook(lambda m, args, y: y.sin_())


def changed_input(model: MLP) -> None:
    model.two.register_forward_pre_hook(lambda m, args: (args[0] ** 2,))


def changed_gradient(model: MLP) -> None:
    """A full backward hook is torch's own layer of autograd functions; one that changes nothing."""
    model.two.register_full_backward_hook(lambda m, gi, go: None)


def pruned(model: MLP) -> None:
    prune.l1_unstructured(model.two, "weight", 0.4)
    prune.random_structured(model.one, "weight", 0.3, dim=0)


def old_weight_norm(model: MLP) -> None:
    nn.utils.weight_norm(model.two)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        changed_output,
        changed_output_in_place,
        changed_input,
        changed_gradient,
        pruned,
        old_weight_norm,
    ],
)
def test_changed_layers(change, late):
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = MLP().double()
        change(model)
        return model

    case = base(make=make, twin=MLP if change is changed_gradient else None)
    if not late:
        exact(case)
        return
    model = nnj.extend(build(base()))
    twin = Fixed(copy.deepcopy(nnj.retract(copy.deepcopy(model))))
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    if change is not changed_gradient:  # torch.func does not take these
        change(twin)
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(X), Y).backward()
    expected = Truth(base(twin=lambda: twin))
    same(model, expected)
    same(model, expected, "batch_grad")


def test_a_layer_whose_hook_reads_is_taken_as_it_is():
    seen = []
    model, loss = pair()
    model.two.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))
    assert len(seen) == 1


def test_hooks_of_users_run_once_and_in_their_order():
    """Neither the sweep nor a rule calls a module again."""
    calls: list[str] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = MLP(), nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            calls.append("forward")
            return self.net(x) * self.scale

    model, loss = pair(base(make=Noting))
    for p in model.parameters():
        p.register_hook(lambda g: calls.append("grad"))
    with nnj.collect(*QUANTITIES):
        loss(model(X), Y).backward()
    assert calls == ["forward"] + ["grad"] * 21  # and twice more, as that is compared with autograd
    calls.clear()
    with nnj.collect(*QUANTITIES):
        loss(model(X), Y).backward()
    assert calls == ["forward"] + ["grad"] * 7


def first_doubled(m):
    m[0].register_forward_hook(lambda module, args, y: y * 2)


def last_of_the_sine(m):
    m[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def first_tripled_in_place(m):
    m[0].register_forward_hook(lambda module, args, y: y.mul_(3))


def first_with_another_forward(m):
    own = m[0].forward
    m[0].forward = lambda x: own(x).sin()


def first_pruned(m):
    prune.random_unstructured(m[0], "weight", 0.4)


def last_normed(m):
    torch.nn.utils.weight_norm(m[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", [True, False], ids=["then extended", "after extend"])
@pytest.mark.parametrize(
    "change",
    [
        first_doubled,
        last_of_the_sine,
        first_tripled_in_place,
        first_with_another_forward,
        first_pruned,
        last_normed,
    ],
)
def test_a_rule_is_taken_only_where_it_describes_the_module(change, first):
    model, plain = net(), net()
    if not first:
        nnj.extend(model)
    for m in (model, plain):
        torch.manual_seed(3)
        change(m)
    if first:
        nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    params = list(plain.parameters())
    f = plain(X)
    rows = torch.eye(f.numel()).double().reshape(-1, *f.shape)
    jacobians = [
        torch.stack([torch.autograd.grad(f, p, r, retain_graph=True)[0] for r in rows])
        for p in params
    ]
    h = torch.func.hessian(lambda z: F.cross_entropy(z.reshape(f.shape), Y))(f.detach().reshape(-1))
    for p, d in zip(model.parameters(), jacobians, strict=True):
        d = d.reshape(len(d), -1)
        torch.testing.assert_close(p.ggn_diag, ((h @ d) * d).sum(0).reshape(p.shape))


def test_a_layer_that_changed_after_its_call_is_not_taken_at_its_word():
    act = nn.LeakyReLU(0.1)
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 3)).double()
    found = dense(copy.deepcopy(model), lambda run: [run(X)], lambda f: F.cross_entropy(f[0], Y))
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    value = loss(model(X), Y)
    act.negative_slope = 0.9
    with nnj.collect("ggn_diag"):
        value.backward()
    torch.testing.assert_close(model[0].weight.ggn_diag, found.diag("0.weight"))

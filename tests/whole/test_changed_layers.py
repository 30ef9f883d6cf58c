"""Layers that are not what their class says, hooks of users, and other precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import nnj
from tests.support.cases import CASES, MLP, Case
from tests.support.collecting import QUANTITIES, Fixed, X, Y, base, exact, extended, pair, same
from tests.support.oracle import Truth, build, data_of, truth


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
    assert calls == ["forward"] + ["grad"] * 7


@pytest.mark.parametrize(
    "name", ["mlp", "lm-tied", "residual-inplace", "dropout-train", "experts-for-tokens"]
)
def test_in_float32(name):
    """The numbers of float64, to the precision of float32."""
    case = CASES[name]
    torch.manual_seed(0)
    model, losses = extended(case)
    model.float()
    data = tuple(
        t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in data_of(case)
    )
    if name == "dropout-train":
        model.eval()
        case = Case("", lambda: build_eval(name), case.data)
    with nnj.collect("ggn_diag", "batch_grad"):
        case.run(model, losses[0].float(), *data).backward()
    expected = truth(name) if name != "dropout-train" else Truth(case)
    for n, p in model.named_parameters():
        want = expected.diag(n)
        torch.testing.assert_close(
            p.ggn_diag.double(), want, rtol=2e-3, atol=1e-4 * float(want.abs().max())
        )


def build_eval(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().eval()

"""collect with several models, and with parts of models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.cases import MLP, Case, WithLoss, tied_linears
from tests.support.collecting import QUANTITIES, Fixed, X, Y, base, exact, pair, same
from tests.support.oracle import Truth, build, close


def test_two_models_in_one_loss():
    one, loss = pair(base(loss=nn.MSELoss))
    two = nnj.extend(build(base(make=lambda: MLP(h=2))))
    pairing = nn.ModuleDict({"one": build(base()), "two": build(base(make=lambda: MLP(h=2)))})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = pairing

        def forward(self, x: Tensor) -> Any:
            return self.both["one"](x), self.both["two"](x)

    with nnj.collect("ggn_diag"):
        loss(one(X), two(X)).backward()
    expected = Truth(
        Case(
            "", MLP, lambda: (X,), lambda m, l, x: l(*m(x)), nn.MSELoss, twin=lambda: Fixed(Both())
        )
    )
    for name, p in [
        *((f"both.one.{n}", p) for n, p in one.named_parameters()),
        *((f"both.two.{n}", p) for n, p in two.named_parameters()),
    ]:
        assert close(p.ggn_diag, expected.diag(name)) == ""


def test_a_teacher_without_nnj():
    teacher = build(base(make=lambda: MLP(h=5)))

    def how(m: Any, l: Any, x: Tensor, y: Tensor) -> Tensor:
        return l(m(x), teacher(x).detach())

    exact(
        base(
            how,
            lambda: (
                lambda z, t: F.kl_div(
                    z.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True
                )
            ),
        )
    )


def test_only_a_part_is_extended():
    model = build(base())
    loss = nnj.extend(nn.CrossEntropyLoss())
    nnj.extend(model.three)
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X), Y).backward()
    assert close(model.three.ggn_block, Truth(base()).block(["three.weight", "three.bias"])) == ""
    assert not hasattr(model.one.weight, "ggn_diag")


def test_a_model_that_returns_its_loss():
    model = nnj.extend(WithLoss().double())
    twin = Fixed(copy.deepcopy(model.net))
    with nnj.collect(*QUANTITIES):
        model(X, Y).backward()
    expected = Truth(Case("", MLP, lambda: (X, Y), twin=lambda: nnj.retract(twin)))
    same(model.net, expected)
    same(model.net, expected, "batch_grad")


def test_several_models_take_turns():
    """A model that took no part in a pass has nothing of it."""
    one, loss = pair()
    other = nnj.extend(nn.Linear(3, 3).double())
    with nnj.collect("ggn_diag"):
        loss(one(X), Y).backward()
    assert getattr(other.weight, "ggn_diag", None) is None
    with nnj.collect("ggn_diag"):
        loss(other(one(X).detach()), Y).backward()
    assert other.weight.ggn_diag is not None and getattr(one.one.weight, "ggn_diag", None) is None


class Counting(torch.autograd.Function):
    """Counts the backward passes that come by."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        Counting.calls += 1
        return g


class Watched(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.sigmoid(self.two(Counting.apply(torch.tanh(self.one(x))))))


@pytest.mark.parametrize(
    "modules, walks", [(["three"], False), (["two", "three"], False), (["one"], True), ([""], True)]
)
def test_modules_and_no_further_than_needed(modules, walks):
    case = base(make=Watched)
    model, loss = pair(case)
    parts = [model.get_submodule(path) for path in modules]
    Counting.calls = 0
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad", modules=parts):
        loss(model(X), Y).backward()
    assert (Counting.calls > 1) == walks
    mine = {id(p) for part in parts for p in part.parameters()}
    expected = Truth(base())
    for name, p in model.named_parameters():
        assert hasattr(p, "ggn_diag") == hasattr(p, "batch_grad") == (id(p) in mine)
        assert id(p) not in mine or close(p.ggn_diag, expected.diag(name)) == ""
    for path in ("one", "two", "three"):
        module = model.get_submodule(path)
        if any(module is m for part in parts for m in part.modules()):
            assert close(module.ggn_block, expected.block([f"{path}.weight", f"{path}.bias"])) == ""
        else:
            assert not hasattr(module, "ggn_block")


def test_frozen_prefixes_cost_nothing():
    model, loss = pair(base(make=Watched))
    model.one.requires_grad_(False)
    Counting.calls = 0
    with nnj.collect(*QUANTITIES):
        loss(model(X.clone().requires_grad_()), Y).backward()
    assert Counting.calls == 1
    assert not hasattr(model.one.weight, "ggn_diag") and not hasattr(model.one, "ggn_block")


def test_all_quantities_are_one_walk():
    model, loss = pair(base(make=Watched))
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()  # which is compared with autograd, once
    Counting.calls = 0
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    one = Counting.calls
    Counting.calls = 0
    with (
        nnj.collect("ggn_diag"),
        nnj.collect("ggn_block"),
        nnj.collect("ggn_diag_mc", "batch_grad"),
    ):
        loss(model(X), Y).backward()
    assert Counting.calls == one + 2, "two more columns: a random one and the gradient"


def test_frozen_after_the_forward_pass():
    model, loss = pair()
    value = loss(model(X), Y)
    model.two.weight.requires_grad_(False)
    with nnj.collect("ggn_diag"):
        value.backward()
    assert getattr(model.two.weight, "ggn_diag", None) is None
    assert close(model.one.weight.ggn_diag, Truth(base()).diag("one.weight")) == ""


def test_a_shared_parameter():
    model = exact(base(make=tied_linears))
    assert torch.equal(model[0].weight.ggn_diag, model[2].weight.ggn_diag)
    expected = Truth(base(make=tied_linears))
    assert close(model[0].ggn_block, expected.block(["0.weight", "0.bias"])) == ""
    assert close(model[2].ggn_block, expected.block(["0.weight", "2.bias"])) == ""
    model, loss = pair(base(make=tied_linears))
    with nnj.collect("ggn_diag", "ggn_block", modules=[model[2]]):
        loss(model(X), Y).backward()
    assert close(model[0].weight.ggn_diag, expected.diag("0.weight")) == "", (
        "over all uses, also those in other modules"
    )
    assert close(model[2].ggn_block, expected.block(["0.weight", "2.bias"])) == ""


def test_a_block_has_a_limit_before_it_is_allocated():
    model = nnj.extend(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 50_000)))
    loss = nnj.extend(nn.MSELoss())
    with pytest.raises(nnj.NNJError, match=r"'1'.*200000.*block_limit"), nnj.collect("ggn_block"):
        loss(model(torch.randn(2, 4)), torch.zeros(2, 50_000)).backward()
    model, loss = pair()
    with (
        pytest.raises(nnj.NNJError, match=r"15.*block_limit=14"),
        nnj.collect("ggn_block", block_limit=14),
    ):
        loss(model(X), Y).backward()
    with nnj.collect("ggn_block", block_limit=15):
        loss(model(X), Y).backward()
    assert model.one.ggn_block.shape == (15, 15)
    with nnj.collect("ggn_block", block_limit=14, modules=[model.two]):
        loss(model(X), Y).backward()

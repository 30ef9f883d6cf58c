"""Several backward passes, and passes of every kind, in one collect or in several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, MLP, Case
from tests.support.collecting import X, Y, base, pair, same
from tests.support.oracle import Truth, build, close, data_of


def test_passes_add_up_as_grad_does():
    model, loss = pair()
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        for part in parts:
            loss(model(X[part]), Y[part]).backward()
    each = [Truth(base(data=lambda part=part: (X[part], Y[part]))) for part in parts]
    same(model, {n: sum(t.diag(n) for t in each) for n, _ in model.named_parameters()})
    same(
        model,
        {n: torch.cat([t.batch_grad(n) for t in each]) for n, _ in model.named_parameters()},
        "batch_grad",
    )
    names = ["two.weight", "two.bias"]
    assert close(model.two.ggn_block, sum(t.block(names) for t in each)) == ""


def test_training_goes_on_inside():
    """Each pass is taken at the parameters that it had, and the optimiser sees the gradients that
    it sees without nnj.
    """
    model, loss = pair()
    alone = build(base())
    optimisers = [torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (model, alone)]
    total: dict[str, Tensor] = {}
    with nnj.collect("ggn_diag"):
        for part in (slice(0, 3), slice(3, 6), slice(0, 6)):
            case = base(data=lambda part=part: (X[part], Y[part]))
            before = copy.deepcopy(alone.state_dict())
            moved = Case("", lambda: MLP(), case.data, twin=lambda before=before: Loaded(before))
            expected = Truth(moved)
            for name, _ in alone.named_parameters():
                total[name] = total.get(name, 0) + expected.diag(name)
            for m, l, optimiser in (
                (model, loss, optimisers[0]),
                (alone, nn.CrossEntropyLoss(), optimisers[1]),
            ):
                optimiser.zero_grad()
                l(m(X[part]), Y[part]).backward()
                optimiser.step()
    same(model, total)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )


class Loaded(MLP):
    """An MLP that keeps its own parameters, whatever it is asked to load."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.double()
        super().load_state_dict(state)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


def test_batch_grad_of_what_only_one_pass_reached():
    case = CASES["two-inputs"]
    model, loss = pair(case)
    a, b, y = data_of(case)
    with nnj.collect("batch_grad"):
        loss(model.one(a), y).backward()
        loss(model(a, b), y).backward()
    assert model.two.weight.batch_grad.shape == (6, *model.two.weight.shape)
    assert not model.two.weight.batch_grad[:3].any() and model.two.weight.batch_grad[3:].any()
    torch.testing.assert_close(model.one.weight.batch_grad.sum(0), model.one.weight.grad)


def test_a_new_with_starts_from_nothing_and_leaves_others_alone():
    model, loss = pair()
    other, other_loss = pair()
    with nnj.collect("ggn_diag", "batch_grad"):
        (loss(model(X), Y) + other_loss(other(X), Y)).backward()
    same(other, Truth(base()))
    assert model.one.weight.batch_grad.shape == (12, 3, 4) or model.one.weight.batch_grad.shape == (
        6,
        3,
        4,
    )
    with nnj.collect("ggn_diag"):
        assert not hasattr(model.one.weight, "ggn_diag") and not hasattr(
            other.one.weight, "ggn_diag"
        )
        assert hasattr(model.one.weight, "batch_grad")
        loss(model(X), Y).backward()
    same(model, Truth(base()))
    assert getattr(other.one.weight, "ggn_diag", None) is None


def test_one_collect_may_be_entered_again():
    model, loss = pair()
    collect = nnj.collect("ggn_diag", "ggn_block", "batch_grad")
    for _ in range(3):
        with collect:
            loss(model(X), Y).backward()
        same(model, Truth(base()))
        same(model, Truth(base()), "batch_grad")


def test_nested():
    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        with nnj.collect("batch_grad", "ggn_block"):
            loss(model(X[:2]), Y[:2]).backward()
            with nnj.collect("ggn_diag_mc", samples=2):
                loss(model(X[2:]), Y[2:]).backward()
        loss(model(X), Y).backward()
    a, b, c = (
        Truth(base(data=lambda s=s: (X[s], Y[s]))) for s in (slice(0, 6), slice(0, 2), slice(2, 6))
    )
    same(model, {n: 2 * a.diag(n) + b.diag(n) + c.diag(n) for n, _ in model.named_parameters()})
    same(
        model,
        {n: torch.cat([b.batch_grad(n), c.batch_grad(n)]) for n, _ in model.named_parameters()},
        "batch_grad",
    )
    assert model.one.weight.ggn_diag_mc.shape == (3, 4)


def test_an_error_of_the_user_inside():
    model, loss = pair()
    with pytest.raises(ZeroDivisionError), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), nnj.collect("ggn_diag"):
        raise ZeroDivisionError
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_a_backward_pass_that_raises_adds_nothing():
    model, loss = pair()

    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    with nnj.collect("ggn_diag", "batch_grad"):
        handle = model.one.weight.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss(model(X), Y).backward()
        handle.remove()
        loss(model(X), Y).backward()
    same(model, Truth(base()))
    same(model, Truth(base()), "batch_grad")


def test_forward_or_loss_before_the_with():
    model, loss = pair()
    z = model(X)
    with nnj.collect("ggn_diag"):
        loss(z, Y).backward()
    same(model, Truth(base()))
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag"):
        value.backward()
    same(model, Truth(base()))


def test_extended_after_the_forward_pass():
    """No layer has a record: autograd's own nodes do, exactly, or the pass is refused."""
    model, loss = build(base()), nnj.extend(nn.CrossEntropyLoss())
    value = loss(model(X), Y)
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        value.backward()
    same(model, Truth(base()))


def test_the_graph_again():
    model, loss = pair()
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        value.backward(retain_graph=True)
        (0.5 * value).backward()
    same(model, Truth(base()), factor=1.5)
    assert model.one.weight.batch_grad.shape[0] == 12
    with nnj.collect("ggn_diag"):
        with pytest.raises(RuntimeError, match="second time|retain_graph"):
            value.backward()
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_partial_backward_passes():
    model, loss = pair()
    expected = Truth(base())
    with nnj.collect("ggn_diag", "ggn_block"):
        torch.autograd.grad(loss(model(X), Y), [model.two.weight, model.three.bias])
    assert close(model.two.weight.ggn_diag, expected.diag("two.weight")) == ""
    assert close(model.three.bias.ggn_diag, expected.diag("three.bias")) == ""
    assert (
        model.one.weight.ggn_diag is None
        and model.two.bias.ggn_diag is None
        and model.one.ggn_block is None
    )
    with nnj.collect("ggn_diag"):
        z = model(X)
        torch.autograd.grad(loss(z, Y), z)
    assert all(p.ggn_diag is None for p in model.parameters())
    x = X.clone().requires_grad_()
    with nnj.collect("ggn_diag"):
        torch.autograd.grad(loss(model(x), Y), x)
    assert all(p.ggn_diag is None for p in model.parameters())


def test_create_graph_and_a_gradient_penalty():
    model, loss = pair()
    alone = build(base())
    with nnj.collect("ggn_diag"):
        for m, l in ((model, loss), (alone, nn.CrossEntropyLoss())):
            value = l(m(X), Y)
            grads = torch.autograd.grad(value, list(m.parameters()), create_graph=True)
            sum(g.square().sum() for g in grads).backward()
    same(model, Truth(base()))
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )

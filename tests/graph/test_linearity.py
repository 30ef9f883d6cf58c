"""collect takes exactly the scalar on which backward was called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.graph.linearity import runs_to_all_leaves
from tests.support.cases import CASES
from tests.support.collecting import QUANTITIES, T, X, Y, base, exact, pair, same
from tests.support.oracle import Truth, build, data_of


def none() -> nn.Module:
    return nn.CrossEntropyLoss(reduction="none")


def two() -> tuple[nn.Module, nn.Module]:
    return nn.CrossEntropyLoss(), nn.MSELoss()


W = torch.rand(6, generator=torch.Generator().manual_seed(3)).double()
SCALARS: dict[str, tuple[Any, Any]] = {
    "half": (nn.CrossEntropyLoss, lambda l, z: 0.5 * l(z, Y)),
    "accumulation": (nn.CrossEntropyLoss, lambda l, z: l(z, Y) / 8),
    "factor in a tensor": (nn.CrossEntropyLoss, lambda l, z: torch.tensor(0.3) * l(z, Y) * W[0]),
    "times a one-element tensor": (nn.CrossEntropyLoss, lambda l, z: (W[:1] * l(z, Y)).squeeze()),
    "zero": (nn.CrossEntropyLoss, lambda l, z: 0.0 * l(z, Y) + z.sum() * 0),
    "cast and copied": (
        nn.CrossEntropyLoss,
        lambda l, z: l(z, Y).clone().to(torch.float64).double().contiguous().view(1).sum(),
    ),
    "added in place": (nn.CrossEntropyLoss, lambda l, z: l(z, Y).mul(2).add_(1.0)),
    "sum of a list": (two, lambda l, z: sum([l[0](z, Y), l[1](z, T), l[0](z, Y)]) / 3),
    "stacked": (two, lambda l, z: torch.stack([l[0](z, Y), 2 * l[1](z, T)]).mean()),
    "stacked and weighed": (two, lambda l, z: torch.stack([l[0](z, Y), l[1](z, T)]) @ W[:2]),
    "torch.add with alpha": (two, lambda l, z: torch.add(l[0](z, Y), l[1](z, T), alpha=0.25)),
    "rows weighed": (none, lambda l, z: (W * l(z, Y)).sum() / W.sum()),
    "rows in a dot product": (none, lambda l, z: l(z, Y) @ W),
    "rows masked": (none, lambda l, z: l(z, Y)[W > 0.3].mean()),
    "rows where": (none, lambda l, z: torch.where(W > 0.3, l(z, Y), 0.0).sum()),
    "rows gathered": (none, lambda l, z: l(z, Y).index_select(0, torch.tensor([0, 0, 5])).sum()),
    "hardest rows": (none, lambda l, z: (lambda v: v[v.detach().topk(3)[1]].mean())(l(z, Y))),
    "rows by einsum": (none, lambda l, z: torch.einsum("i,i->", l(z, Y), W)),
    "rows reshaped": (none, lambda l, z: (l(z, Y).view(2, 3).mean(1) * W[:2]).sum()),
    "rows of two losses": (
        lambda: (none(), nn.MSELoss(reduction="none")),
        lambda l, z: (l[0](z, Y) + W * l[1](z, T).sum(1)).mean(),
    ),
    "rows concatenated": (
        none,
        lambda l, z: torch.cat([l(z[:2], Y[:2]), 3 * l(z[2:], Y[2:])]).mean(),
    ),
}


@pytest.mark.parametrize("name", SCALARS)
def test_the_scalar(name):
    loss, how = SCALARS[name]
    numbers = (
        (lambda outs, data: [torch.arange(2), torch.arange(2, 6)])
        if name == "rows concatenated"
        else None
    )
    options = {} if numbers is None else {"numbers": numbers}
    exact(base(lambda m, l, x, y: how(l, m(x)), loss, **options))


CROOKED: dict[str, Any] = {
    "squared": lambda l, z: l(z, Y) ** 2,
    "root": lambda l, z: l(z, Y).sqrt(),
    "log": lambda l, z: l(z, Y).log(),
    "exp": lambda l, z: l(z, Y).exp(),
    "product": lambda l, z: l(z, Y) * l(z, 2 - Y),
    "divided": lambda l, z: 1 / l(z, Y),
    "logsumexp": lambda l, z: torch.logsumexp(torch.stack([l(z, Y), l(z, 2 - Y)]), 0),
    "norm": lambda l, z: torch.stack([l(z, Y), l(z, 2 - Y)]).norm(),
    "weighed by itself": lambda l, z: (lambda v: v * torch.exp(-v.detach() / 2) * v)(l(z, Y)),
    "times the output": lambda l, z: l(z, Y) * z.square().mean(),
}


@pytest.mark.parametrize("name", CROOKED)
def test_what_is_not_linear_in_a_loss(name):
    """Refused, since the loss's Hessian is not that of the scalar."""
    how = CROOKED[name]
    model, loss = pair()
    with pytest.raises(nnj.NNJError, match=r"not linear|negative factor"), nnj.collect("ggn_diag"):
        how(loss, model(X)).backward()


def test_a_gradient_given_to_backward():
    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward(gradient=torch.tensor(2.0, dtype=torch.float64))
    same(model, Truth(base()), factor=2.0)
    model, loss = pair(base(loss=none))
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(X), Y).backward(gradient=W)
    expected = Truth(base(lambda m, l, x, y: (l(m(x), y) * W).sum(), none))
    same(model, expected)
    same(model, expected, "batch_grad")


def test_several_losses_at_once_by_torch_autograd_backward():
    case = base(lambda m, l, x, y: (lambda z: l[0](z, y) + 2 * l[1](z, T))(m(x)), two)
    model, loss = pair(case)
    with nnj.collect("ggn_diag", "batch_grad"):
        z = model(X)
        torch.autograd.backward(
            [loss[0](z, Y), loss[1](z, T)], [torch.tensor(1.0).double(), torch.tensor(2.0).double()]
        )
    same(model, Truth(case))
    same(model, Truth(case), "batch_grad")


def test_learned_weights_of_losses():
    """exp(-s) * loss + s: the weight is a factor; the GGN of s is none of the model's."""
    model, loss = pair()
    s = nn.Parameter(torch.tensor(0.7).double())
    with nnj.collect("ggn_diag"):
        (torch.exp(-s) * loss(model(X), Y) + s).backward()
    same(model, Truth(base()), factor=float(torch.exp(-s).detach()))
    assert not hasattr(s, "ggn_diag")


def test_terms_that_no_loss_made():
    def how(m: Any, l: Any, x: Tensor, y: Tensor) -> Tensor:
        return (
            l(m(x), y) + 0.1 * sum(p.square().sum() for p in m.parameters()) + m(x).square().mean()
        )

    alone = build(base())
    how(alone, nn.CrossEntropyLoss(), X, Y).backward()
    model, loss = pair()
    with nnj.collect(*QUANTITIES):
        how(model, loss, X, Y).backward()
    same(model, Truth(base()))
    same(model, Truth(base()), "batch_grad")
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )


def test_a_parameter_that_only_weight_decay_reaches():
    model, loss = pair(CASES["unreached-branch"])
    x, y = data_of(CASES["unreached-branch"])
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        (loss(model(x)[0], y) + sum(p.square().sum() for p in model.parameters())).backward()
    assert model.never.weight.grad is not None and model.aside.bias.grad is not None
    for module in (model.never, model.aside):
        assert (
            module.weight.ggn_diag is None
            and module.weight.batch_grad is None
            and module.ggn_block is None
        )


def test_whether_a_pass_runs_to_all_leaves() -> None:
    seen: list[bool] = []
    leaf, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def scalar() -> Tensor:
        z = leaf * other
        z.register_hook(lambda g: seen.append(runs_to_all_leaves()))
        return z.sum()

    assert not runs_to_all_leaves()  # no pass runs
    scalar().backward()
    scalar().backward(inputs=[leaf])
    torch.autograd.grad(scalar(), leaf)
    torch.autograd.backward([scalar()], [torch.ones(())])
    assert seen == [True, False, False, True]

"""What a user may do with collect, beyond one backward pass of one loss; and that nothing is left behind."""
from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import nnj
from tests.cases import CASES, MLP, Case, WithLoss, plain, tied_linears
from tests.oracle import Truth, build, close, data_of, losses_of, run, truth
from tests.test_models import extended, wrong

QUANTITIES = ("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(1))
T = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).double()


def base(how: Any = plain, loss: Any = nn.CrossEntropyLoss, make: Any = MLP, data: Any = lambda: (X, Y), **options: Any) -> Case:
    return Case("", make, data, how, loss, **options)


def pair(case: Case | None = None) -> tuple[nn.Module, Any]:
    model, losses = extended(base() if case is None else case)
    return model, losses[0] if len(losses) == 1 else losses


def same(model: nn.Module, expected: Truth | dict[str, Tensor], quantity: str = "ggn_diag", factor: float = 1.0) -> None:
    for name, p in model.named_parameters():
        want = expected[name] if isinstance(expected, dict) else getattr(expected, quantity.removeprefix("ggn_"))(name)
        assert close(getattr(p, quantity), factor * want) == "", f"{quantity} of {name}"


def exact(case: Case) -> nn.Module:
    """Collected in one backward pass, and compared with the truth and with the gradient of a model without nnj."""
    alone = build(case)
    run(case, alone, losses_of(case)).backward()
    model, losses = extended(case)
    with nnj.collect(*QUANTITIES):
        run(case, model, losses).backward()
    expected = Truth(case)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
        for quantity, value in (("ggn_diag", expected.diag), ("batch_grad", expected.batch_grad)):
            if p.grad is not None:
                assert close(getattr(p, quantity), value(name)) == "", f"{quantity} of {name}"
    return model


# -- the scalar --------------------------------------------------------------------------------------------------------

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
    "cast and copied": (nn.CrossEntropyLoss, lambda l, z: l(z, Y).clone().to(torch.float64).double().contiguous().view(1).sum()),
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
    "rows of two losses": (lambda: (none(), nn.MSELoss(reduction="none")),
                           lambda l, z: (l[0](z, Y) + W * l[1](z, T).sum(1)).mean()),
    "rows concatenated": (none, lambda l, z: torch.cat([l(z[:2], Y[:2]), 3 * l(z[2:], Y[2:])]).mean()),
}


@pytest.mark.parametrize("name", SCALARS)
def test_the_scalar(name):
    loss, how = SCALARS[name]
    numbers = (lambda outs, data: [torch.arange(2), torch.arange(2, 6)]) if name == "rows concatenated" else None
    options = {} if numbers is None else {"numbers": numbers}
    exact(base(lambda m, l, x, y: how(l, m(x)), loss, **options))


CROOKED: dict[str, Any] = {
    "squared": lambda l, z: l(z, Y) ** 2, "root": lambda l, z: l(z, Y).sqrt(), "log": lambda l, z: l(z, Y).log(),
    "exp": lambda l, z: l(z, Y).exp(), "product": lambda l, z: l(z, Y) * l(z, 2 - Y), "divided": lambda l, z: 1 / l(z, Y),
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
        torch.autograd.backward([loss[0](z, Y), loss[1](z, T)], [torch.tensor(1.0).double(), torch.tensor(2.0).double()])
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
        return l(m(x), y) + 0.1 * sum(p.square().sum() for p in m.parameters()) + m(x).square().mean()

    alone = build(base())
    how(alone, nn.CrossEntropyLoss(), X, Y).backward()
    model, loss = pair()
    with nnj.collect(*QUANTITIES):
        how(model, loss, X, Y).backward()
    same(model, Truth(base()))
    same(model, Truth(base()), "batch_grad")
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_parameter_that_only_weight_decay_reaches():
    model, loss = pair(CASES["unreached-branch"])
    x, y = data_of(CASES["unreached-branch"])
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        (loss(model(x)[0], y) + sum(p.square().sum() for p in model.parameters())).backward()
    assert model.never.weight.grad is not None and model.aside.bias.grad is not None
    for module in (model.never, model.aside):
        assert module.weight.ggn_diag is None and module.weight.batch_grad is None and module.ggn_block is None


# -- passes ------------------------------------------------------------------------------------------------------------

def test_passes_add_up_as_grad_does():
    model, loss = pair()
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        for part in parts:
            loss(model(X[part]), Y[part]).backward()
    each = [Truth(base(data=lambda part=part: (X[part], Y[part]))) for part in parts]
    same(model, {n: sum(t.diag(n) for t in each) for n, _ in model.named_parameters()})
    same(model, {n: torch.cat([t.batch_grad(n) for t in each]) for n, _ in model.named_parameters()}, "batch_grad")
    names = ["two.weight", "two.bias"]
    assert close(model.two.ggn_block, sum(t.block(names) for t in each)) == ""


def test_training_goes_on_inside():
    """Each pass is taken at the parameters that it had, and the optimiser sees the gradients that it sees without nnj."""
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
            for m, l, optimiser in ((model, loss, optimisers[0]), (alone, nn.CrossEntropyLoss(), optimisers[1])):
                optimiser.zero_grad()
                l(m(X[part]), Y[part]).backward()
                optimiser.step()
    same(model, total)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


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
    assert model.one.weight.batch_grad.shape == (12, 3, 4) or model.one.weight.batch_grad.shape == (6, 3, 4)
    with nnj.collect("ggn_diag"):
        assert not hasattr(model.one.weight, "ggn_diag") and not hasattr(other.one.weight, "ggn_diag")
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
    a, b, c = (Truth(base(data=lambda s=s: (X[s], Y[s]))) for s in (slice(0, 6), slice(0, 2), slice(2, 6)))
    same(model, {n: 2 * a.diag(n) + b.diag(n) + c.diag(n) for n, _ in model.named_parameters()})
    same(model, {n: torch.cat([b.batch_grad(n), c.batch_grad(n)]) for n, _ in model.named_parameters()}, "batch_grad")
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
    assert model.one.weight.ggn_diag is None and model.two.bias.ggn_diag is None and model.one.ggn_block is None
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
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


# -- several models, parts of models -----------------------------------------------------------------------------------

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
    expected = Truth(Case("", MLP, lambda: (X,), lambda m, l, x: l(*m(x)), nn.MSELoss, twin=lambda: Fixed(Both())))
    for name, p in [*((f"both.one.{n}", p) for n, p in one.named_parameters()),
                    *((f"both.two.{n}", p) for n, p in two.named_parameters())]:
        assert close(p.ggn_diag, expected.diag(name)) == ""


def Fixed(model: nn.Module) -> nn.Module:
    model.load_state_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model.double()


def test_a_teacher_without_nnj():
    teacher = build(base(make=lambda: MLP(h=5)))

    def how(m: Any, l: Any, x: Tensor, y: Tensor) -> Tensor:
        return l(m(x), teacher(x).detach())

    exact(base(how, lambda: lambda z, t: F.kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)))


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


@pytest.mark.parametrize("modules, walks", [(["three"], False), (["two", "three"], False), (["one"], True), ([""], True)])
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
    Counting.calls = 0
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    one = Counting.calls
    Counting.calls = 0
    with nnj.collect("ggn_diag"), nnj.collect("ggn_block"), nnj.collect("ggn_diag_mc", "batch_grad"):
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
    assert close(model[0].weight.ggn_diag, expected.diag("0.weight")) == "", "over all uses, also those in other modules"
    assert close(model[2].ggn_block, expected.block(["0.weight", "2.bias"])) == ""


def test_a_block_has_a_limit_before_it_is_allocated():
    model = nnj.extend(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 50_000)))
    loss = nnj.extend(nn.MSELoss())
    with pytest.raises(nnj.NNJError, match=r"'1'.*200000.*block_limit"), nnj.collect("ggn_block"):
        loss(model(torch.randn(2, 4)), torch.zeros(2, 50_000)).backward()
    model, loss = pair()
    with pytest.raises(nnj.NNJError, match=r"15.*block_limit=14"), nnj.collect("ggn_block", block_limit=14):
        loss(model(X), Y).backward()
    with nnj.collect("ggn_block", block_limit=15):
        loss(model(X), Y).backward()
    assert model.one.ggn_block.shape == (15, 15)
    with nnj.collect("ggn_block", block_limit=14, modules=[model.two]):
        loss(model(X), Y).backward()


# -- random estimates --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mlp", "called-twice"])
def test_the_mean_and_the_variance_of_ggn_diag_mc(name):
    case = CASES[name]
    model, losses = extended(case)
    value = run(case, model, losses)

    def draws(count: int, samples: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(4)
        for _ in range(count):
            with nnj.collect("ggn_diag_mc", samples=samples, generator=generator):
                value.backward(retain_graph=True)
            for n, p in model.named_parameters():
                found.setdefault(n, []).append(p.ggn_diag_mc)
        return {n: torch.stack(t) for n, t in found.items()}

    one, eight = draws(300, 1), draws(150, 8)
    ratios = []
    for n in truth(name).jacobian:
        expected = truth(name).diag(n)
        for found in (one[n], eight[n]):
            error = (found.mean(0) - expected).abs()
            assert bool((error <= 6 * found.std(0) / len(found) ** 0.5 + 1e-12).all()), n
        ratios.append((one[n].var(0).sum(), eight[n].var(0).sum()))
    assert 6 < float(sum(a for a, _ in ratios) / sum(b for _, b in ratios)) < 10.7


def test_a_generator_makes_it_repeatable_and_leaves_the_global_one_alone():
    model, loss = pair()
    found = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        with nnj.collect("ggn_diag_mc", samples=2, generator=torch.Generator().manual_seed(seed)):
            loss(model(X), Y).backward()
        assert torch.equal(state, torch.get_rng_state())
        found.append(model.one.weight.ggn_diag_mc)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_exact_quantities_do_not_draw():
    model, loss = pair(CASES["token-major-mixed"])
    x, y = data_of(CASES["token-major-mixed"])
    state = torch.get_rng_state()
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        loss(model(x), y).backward()
    assert torch.equal(state, torch.get_rng_state())


# -- extend, retract, copies -------------------------------------------------------------------------------------------

def hooks(module: nn.Module) -> list[dict[Any, Any]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks")
    return [dict(getattr(part, name)) for part in module.modules() for name in names]


def test_extend_and_retract():
    model, loss, function = build(base()), nn.CrossEntropyLoss(), F.cross_entropy
    keys, before = [list(vars(part)) for part in model.modules()], hooks(model)
    mine = model.one.register_forward_hook(lambda *args: None)
    with_mine = hooks(model)
    for _ in range(2):
        assert nnj.extend(model) is model and nnj.extend(loss) is loss
    once = nnj.extend(function)
    assert isinstance(once, nn.Module) and nnj.extend(once) is once and len(once._forward_hooks) == 1
    assert torch.equal(once(T, Y), F.cross_entropy(T, Y))
    assert nnj.retract(model) is model and nnj.retract(loss) is loss
    assert hooks(model) == with_mine
    mine.remove()
    assert hooks(model) == before and not any(hooks(loss)) and [list(vars(part)) for part in model.modules()] == keys
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    nnj.extend(model), nnj.extend(loss)
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("collected", [False, True])
def test_copies(how, collected):
    model, loss = pair()
    if collected:
        with nnj.collect("ggn_diag", "ggn_block"):
            loss(model(X), Y).backward()
    other, other_loss = COPIES[how](model), COPIES[how](loss)
    with nnj.collect("ggn_diag", "ggn_block"):
        other_loss(other(X), Y).backward()
    same(other, Truth(base()))
    assert not collected or getattr(model.one.weight, "ggn_diag", None) is None, "a new `with` removes those of the same name"
    nnj.retract(other)
    assert not any(hooks(other))
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_state_dicts():
    model, loss = pair()
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X), Y).backward()
    state = saved(model.state_dict())
    assert list(state) == list(build(base()).state_dict())
    fresh = MLP().double()
    fresh.load_state_dict(state)
    model.load_state_dict(state)
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_moved_to_another_dtype_after_extend():
    model, loss = pair()
    model.float()
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X.float()), Y).backward()
    for name, p in model.named_parameters():
        assert p.ggn_diag.dtype == torch.float32
        torch.testing.assert_close(p.ggn_diag.double(), Truth(base()).diag(name), rtol=1e-4, atol=1e-7)


# -- nothing is kept ---------------------------------------------------------------------------------------------------

def leaky_step(model: nn.Module, loss: nn.Module, how: str) -> weakref.ref[Any]:
    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    z = model(X.clone())
    value = loss(z, Y)
    handle = None
    try:
        with nnj.collect(*QUANTITIES):
            if how == "refused":
                (-value).backward()
            elif how == "raised":
                handle = model.one.weight.register_hook(fail)
                value.backward()
            elif how == "no backward":
                loss(model(X), Y).backward()
            elif how == "retained":
                value.backward(retain_graph=True)
            else:
                value.backward()
    except (nnj.NNJError, ZeroDivisionError) as error:
        error.__traceback__ = None
    if handle is not None:
        handle.remove()
    return weakref.ref(z)


@pytest.mark.parametrize("how", ["backward", "retained", "no backward", "refused", "raised"])
@pytest.mark.parametrize("name", ["", "checkpoint", "transformer", "token-major-mixed"])
def test_nothing_is_kept_alive(how, name):
    case = CASES[name] if name else base()
    model, loss = pair(case)
    if name:
        model = nnj.extend(nn.ModuleDict({"one": nn.Linear(1, 1).double()}))
        inner, loss = pair(case)
        x, y = data_of(case)

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner
                self.one = Holder(next(inner.parameters()))

            def forward(self, _: Tensor) -> Tensor:
                return self.inner(x)

        model, target = Call(), y
        real = loss
        loss = lambda z, _: real(z, target)  # type: ignore[assignment]
    count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(2):
        ref = leaky_step(model, loss, how)
    gc.collect()
    assert ref() is None
    before = count()
    for _ in range(10):
        leaky_step(model, loss, how)
    gc.collect()
    assert count() <= before


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


def test_results_hold_no_graph():
    model, loss = pair()
    z = model(X)
    ref = weakref.ref(z)
    gc.disable()
    try:
        with nnj.collect(*QUANTITIES):
            loss(z, Y).backward()
        del z
        assert ref() is None, "freed without the garbage collector"
    finally:
        gc.enable()
    for p in model.parameters():
        assert all(not getattr(p, q).requires_grad for q in ("ggn_diag", "ggn_diag_mc", "batch_grad"))


# -- layers that are not what their class says -------------------------------------------------------------------------

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
    "change", [changed_output, changed_output_in_place, changed_input, changed_gradient, pruned, old_weight_norm]
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


@pytest.mark.parametrize("name", ["mlp", "lm-tied", "residual-inplace", "dropout-train", "experts-for-tokens"])
def test_in_float32(name):
    """The numbers of float64, to the precision of float32."""
    case = CASES[name]
    torch.manual_seed(0)
    model, losses = extended(case)
    model.float()
    data = tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in data_of(case))
    if name == "dropout-train":
        model.eval()
        case = Case("", lambda: build_eval(name), case.data)
    with nnj.collect("ggn_diag", "batch_grad"):
        case.run(model, losses[0].float(), *data).backward()
    expected = truth(name) if name != "dropout-train" else Truth(case)
    for n, p in model.named_parameters():
        want = expected.diag(n)
        torch.testing.assert_close(p.ggn_diag.double(), want, rtol=2e-3, atol=1e-4 * float(want.abs().max()))


def build_eval(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().eval()


def test_wrong_is_seen():
    """The comparison of the table is not blind."""
    case = CASES["mlp"]
    model, losses = extended(case)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        run(case, model, losses).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert wrong(case, model, ("ggn_diag", "ggn_block", "batch_grad"), grads) == []
    model.two.weight.ggn_diag[0, 0] *= 1 + 1e-6
    model.three.ggn_block[0, 1] += 1e-6
    model.one.bias.batch_grad = None
    assert [w.split(" is")[0] for w in wrong(case, model, ("ggn_diag", "ggn_block", "batch_grad"), grads)] == [
        "batch_grad of one.bias", "ggn_diag of two.weight", "ggn_block of 'three'"]

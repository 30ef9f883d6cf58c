"""The curvature is that of the loss as it was called, whatever becomes of it until the backward
pass; reading it again moves nothing.
"""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

import nnj

pytestmark = pytest.mark.usefixtures("seeded")
N, C = 5, 3


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    return nnj.extend(made)


def data():
    return torch.randn(N, 4).double(), torch.randint(0, C, (N,)), torch.randn(N, C).double()


def truth(model, x, loss):
    """ggn_diag of a loss of the outputs, by dense matrices."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    z = model(x).detach()
    h = hessian(loss)(z).reshape(z.numel(), z.numel())
    jac = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    found = {}
    for k, p in params.items():
        j = jac[k].reshape(z.numel(), -1)
        found[k] = torch.einsum("ap,ab,bp->p", j, h, j).reshape(p.shape)
    return found


def check(model, expected, name="ggn_diag"):
    for k, p in model.named_parameters():
        torch.testing.assert_close(getattr(p, name), expected[k], msg=k)


# -- changed between the call and backward ---------------------------------------------------------


def reduce_by_sum(loss):
    loss.reduction = "sum"


def narrow(loss):
    loss.delta = 0.1


def smooth(loss):
    loss.beta = 2.0


def weigh(loss):
    loss.weight = torch.tensor([1.0, 5.0, 0.2]).double()


def smooth_labels(loss):
    loss.label_smoothing = 0.3


CHANGES = {
    "delta": (nn.HuberLoss, narrow),
    "beta": (nn.SmoothL1Loss, smooth),
    "reduction": (nn.MSELoss, reduce_by_sum),
    "weight": (lambda: nn.CrossEntropyLoss(weight=torch.ones(C).double()), weigh),
    "label smoothing": (nn.CrossEntropyLoss, smooth_labels),
    "reduction of cross entropy": (nn.CrossEntropyLoss, reduce_by_sum),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad"])
def test_options_changed_after_the_call(model, name, quantity):
    make, change = CHANGES[name]
    loss = nnj.extend(make())
    x, y, t = data()
    value = loss(model(x), y if isinstance(loss, nn.CrossEntropyLoss) else t)
    change(loss)
    with pytest.raises(nnj.NNJError, match="another value"), nnj.collect(quantity):
        value.backward()


@pytest.mark.parametrize("make", [nn.HuberLoss, nn.CrossEntropyLoss])
def test_what_changes_no_number_is_fine(model, make):
    loss = nnj.extend(make())
    x, y, t = data()
    y = y if make is nn.CrossEntropyLoss else t
    expected = truth(model, x, lambda z: make()(z, y))
    value = loss(model(x), y)
    loss.eval()
    with nnj.collect("ggn_diag"):
        value.backward()
    check(model, expected)


class Own(nn.HuberLoss):
    """Has the rule of its class, and a copy of what it was."""


def test_the_options_of_the_call_count_where_they_are_known(model):
    loss = nnj.extend(Own(delta=1.0))
    x, _, t = data()
    expected = truth(model, x, lambda z: F.huber_loss(z, t))
    with nnj.collect("ggn_diag"):
        value = loss(model(x), t)
        loss.delta = 0.01
        value.backward()
    check(model, expected)
    assert loss.delta == 0.01


def test_a_closure_of_another_scope(model):
    scale = {"by": 1.0}
    loss = nnj.extend(lambda z, t: scale["by"] * F.mse_loss(z, t))
    x, _, t = data()
    expected = truth(model, x, lambda z: F.mse_loss(z, t))
    with nnj.collect("ggn_diag"):
        value = loss(model(x), t)
        scale["by"] = 3.0
        value.backward()
    check(model, expected)
    assert scale == {"by": 3.0}


class Box:
    by = 1.0


@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad"])
def test_an_object_that_nobody_copies(model, quantity):
    box = Box()
    loss = nnj.extend(lambda z, t: box.by * F.mse_loss(z, t))
    x, _, t = data()
    value = loss(model(x), t)
    box.by = 3.0
    with pytest.raises(nnj.NNJError, match="another value"), nnj.collect(quantity):
        value.backward()


@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad"])
def test_the_same_value_with_another_gradient(model, quantity):
    box = Box()
    loss = nnj.extend(lambda z, t: F.mse_loss(z, t) + box.by * (z - z.detach()).sum())
    x, _, t = data()
    value = loss(model(x), t)
    box.by = 3.0
    with pytest.raises(nnj.NNJError, match="another gradient"), nnj.collect(quantity):
        value.backward()


@pytest.mark.parametrize("make", [nn.MSELoss, Own])
def test_a_hook_of_a_user_before_extend(model, make):
    loss = make()
    loss.register_forward_hook(lambda module, args, value: 2 * value)
    nnj.extend(loss)
    x, _, t = data()
    with pytest.raises(nnj.NNJError, match="a hook"), nnj.collect("ggn_diag"):
        loss(model(x), t).backward()


def test_a_hook_that_only_looks(model):
    loss, seen = nn.MSELoss(), []
    loss.register_forward_hook(lambda module, args, value: seen.append(value.item()))
    nnj.extend(loss)
    x, _, t = data()
    expected = truth(model, x, lambda z: F.mse_loss(z, t))
    with nnj.collect("ggn_diag"):
        loss(model(x), t).backward()
    check(model, expected)
    assert len(seen) == 1


# -- reading it again moves nothing ----------------------------------------------------------------


class Centred(nn.Module):
    """A running centre, as in self-distillation, a counter, a list and a number of draws."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(C).double())
        self.register_buffer("count", torch.tensor(0))
        self.calls, self.log, self.last = 0, [], None

    def forward(self, z, t):
        target = (t - self.centre).softmax(1)
        self.calls += 1
        self.count += 1
        self.log.append(self.calls)
        self.last = t
        with torch.no_grad():
            self.centre.mul_(0.9).add_(0.1 * t.mean(0))
        return F.cross_entropy(z, target)


class CentredAnew(Centred):
    def forward(self, z, t):
        target = (t - self.centre).softmax(1)
        self.calls, self.log = self.calls + 1, [*self.log, self.calls + 1]
        self.count = self.count + 1
        self.centre = 0.9 * self.centre + 0.1 * t.mean(0)
        return F.cross_entropy(z, target)


@pytest.mark.parametrize("cls", [Centred, CentredAnew])
@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad", "ggn_diag_mc"])
def test_a_loss_with_a_state(model, cls, quantity):
    loss, plain = nnj.extend(cls(), loss=True), cls()
    x, _, t = data()
    for i in range(3):
        centre = plain.centre.clone()
        expected = truth(model, x, lambda z: F.cross_entropy(z, (t - centre).softmax(1)))  # noqa: B023
        plain(torch.zeros(N, C).double(), t)
        with nnj.collect(quantity):
            loss(model(x), t).backward()
        if quantity == "ggn_diag":
            check(model, expected)
        assert loss.calls == loss.count == plain.calls == i + 1
        assert loss.log == plain.log
        assert torch.equal(loss.centre, plain.centre)


def test_a_function_with_a_state(model):
    count, calls = 0, []

    def function(z, t):
        nonlocal count
        count += 1
        calls.append(count)
        function.seen = count
        return (z - t).pow(4).sum() * (1 + count)

    loss = nnj.extend(function)
    x, _, t = data()
    for i in (1, 2):
        expected = truth(model, x, lambda z: (z - t).pow(4).sum() * (1 + i))  # noqa: B023
        with nnj.collect("ggn_diag"):
            loss(model(x), t).backward()
        check(model, expected)
        assert (count, calls, function.seen) == (i, list(range(1, i + 1)), i)


class Called:
    """An object that is called, with a method that is a loss, too."""

    def __init__(self):
        self.count = 0

    def __call__(self, z, t):
        self.count += 1
        return (z - t).pow(4).sum()

    def method(self, z, t):
        return self(z, t)


@pytest.mark.parametrize("way", ["object", "method"])
def test_an_object_with_a_state(model, way):
    held = Called()
    loss = nnj.extend(held if way == "object" else held.method)
    x, _, t = data()
    with nnj.collect("ggn_diag"):
        loss(model(x), t).backward()
    assert held.count == 1


def test_a_loss_that_keeps_its_value_keeps_one_graph(model):
    class Keeps(nn.Module):
        last = None

        def forward(self, z, t):
            self.last = (z - t).pow(4).sum()
            return self.last

    loss, seen = nnj.extend(Keeps(), loss=True), []
    x, _, t = data()
    for _ in range(4):
        z = model(x)
        z.grad_fn.metadata["box"] = box = Box()
        seen.append(weakref.ref(box))
        del box
        with nnj.collect("ggn_diag"):
            loss(z, t).backward()
        del z
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 1


def test_generators_stay_where_they_are(model):
    def function(z, t):
        torch.rand(3)
        random.random()
        return (z - t).pow(4).sum()

    loss = nnj.extend(function)
    x, _, t = data()
    value = loss(model(x), t)
    before, python = torch.get_rng_state(), random.getstate()
    with nnj.collect("ggn_diag"):
        value.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_a_loss_that_raised_before(model):
    def function(z, t):
        if z.shape != t.shape:
            raise ValueError
        return (z - t).pow(4).sum()

    loss = nnj.extend(function)
    x, _, t = data()
    with pytest.raises(ValueError):
        loss(model(x), t[1:])
    expected = truth(model, x, lambda z: (z - t).pow(4).sum())
    with nnj.collect("ggn_diag"):
        loss(model(x), t).backward()
    check(model, expected)


# -- losses in losses ------------------------------------------------------------------------------


def test_an_extended_loss_in_a_function_counts_once(model):
    ce = nnj.extend(nn.CrossEntropyLoss())
    loss = nnj.extend(lambda z, y: ce(z, y) + z.square().mean())
    x, y, _ = data()
    expected = truth(model, x, lambda z: F.cross_entropy(z, y) + z.square().mean())
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    check(model, expected)


class WithTerm(nn.Module):
    """A cross entropy and a term of its own."""

    def __init__(self, ce=None):
        super().__init__()
        self.ce = nn.CrossEntropyLoss() if ce is None else ce

    def forward(self, z, y):
        return self.ce(z, y) + z.square().mean()


class Functional(nn.Module):
    def forward(self, z, y):
        return F.cross_entropy(z, y) + z.square().mean()


class Both(nn.Module):
    """Two of torch's losses and nothing else."""

    def __init__(self):
        super().__init__()
        self.ce, self.mse = nn.CrossEntropyLoss(), nn.MSELoss()

    def forward(self, z, y):
        return self.ce(z, y) + 0.5 * self.mse(z, F.one_hot(y, C).to(z))


class InSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = WithTerm()

    def forward(self, z, y):
        return 2 * self.inner(z, y)


class Named(nn.Module):
    """Gives more than a scalar, so that what it calls counts."""

    def __init__(self):
        super().__init__()
        self.inner = WithTerm()

    def forward(self, z, y):
        return {"loss": self.inner(z, y)}


class Calls(nn.Module):
    """Has a model and a loss, and is called with neither's outputs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, WithTerm()

    def forward(self, x, y):
        return self.loss(self.model(x), y)


def term(z, y):
    return F.cross_entropy(z, y) + z.square().mean()


def both(z, y):
    return F.cross_entropy(z, y) + 0.5 * F.mse_loss(z, F.one_hot(y, C).to(z))


NESTED = {
    "module": (WithTerm, term),
    "module, said to be a loss": (lambda: nnj.extend(WithTerm(), loss=True), term),
    "inner extended before": (lambda: WithTerm(nnj.extend(nn.CrossEntropyLoss())), term),
    "functional": (Functional, term),
    "sum of losses": (Both, both),
    "in another": (InSequence, lambda z, y: 2 * term(z, y)),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_module_that_is_a_loss(model, name):
    make, truly = NESTED[name]
    loss = nnj.extend(make())
    x, y, _ = data()
    expected = truth(model, x, lambda z: truly(z, y))
    for _ in range(2):
        with nnj.collect("ggn_diag"):
            loss(model(x), y).backward()
        check(model, expected)
    found = nnj.fit(model, loss, [(x, y)], "ggn_diag", scale="sum", reduction="mean")
    for k, v in found["ggn_diag"].items():
        torch.testing.assert_close(v, N * expected[k])
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    check(model, expected)


def test_losses_in_what_is_no_loss(model):
    x, y, _ = data()
    expected = truth(model, x, lambda z: term(z, y))
    loss = nnj.extend(Named())
    with nnj.collect("ggn_diag"):
        loss(model(x), y)["loss"].backward()
    check(model, expected)
    whole = nnj.extend(Calls(model))
    with nnj.collect("ggn_diag"):
        whole(x, y).backward()
    check(model, expected)


def test_a_module_in_a_function_counts_once(model):
    inner = nnj.extend(WithTerm())
    loss = nnj.extend(lambda z, y: 3 * inner(z, y))
    x, y, _ = data()
    expected = truth(model, x, lambda z: 3 * term(z, y))
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    check(model, expected)


class WithParameter(WithTerm):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(C).double())

    def forward(self, z, y):
        return super().forward(z * self.scale, y)


def test_a_loss_with_parameters(model):
    """What it calls is not all of it. Its own parameters are refused, those of the model right."""
    x, y, _ = data()
    loss = nnj.extend(WithParameter())
    with pytest.raises(nnj.NNJError, match="otherwise than through its arguments"):
        with nnj.collect("ggn_diag"):
            loss(model(x), y).backward()
    expected = truth(model, x, lambda z: term(z, y))
    with nnj.collect("ggn_diag", modules=[model]):
        loss(model(x), y).backward()
    check(model, expected)


def test_a_head_that_computes_its_loss_is_a_model():
    """Its parameters are those of a model, and the loss inside counts."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.ce = nn.Linear(6, C), nn.CrossEntropyLoss()

        def forward(self, h, y):
            return self.ce(self.linear(h), y)

    x, y, _ = data()
    body, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double(), Head().double()
    whole = nn.Sequential(body, head.linear)
    expected = truth(whole, x, lambda z: F.cross_entropy(z, y))
    nnj.extend(body)
    nnj.extend(head)
    with nnj.collect("ggn_diag"):
        head(body(x), y).backward()
    check(whole, expected)


def test_an_inner_loss_that_raises_leaves_nothing(model):
    class Raises(WithTerm):
        def forward(self, z, y):
            super().forward(z, y)
            raise KeyError

    x, y, _ = data()
    with pytest.raises(KeyError):
        nnj.extend(Raises())(model(x), y)
    loss = nnj.extend(nn.CrossEntropyLoss())
    expected = truth(model, x, lambda z: F.cross_entropy(z, y))
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    check(model, expected)

"""signed=True: losses that are not convex in the output, and negative factors, against J^T H J from
torch.func.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import nnj
from tests.support.losses import soft, y, z
from tests.support.posteriors import dense_jacobian, small

pytestmark = pytest.mark.usefixtures("seeded")
N, C = 5, 4


class Net(nn.Module):
    def __init__(self, out=C):
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, out)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class Sine(nn.Module):
    """Of every sign."""

    def forward(self, z):
        return (3 * z).sin().sum() + 0.5 * z.prod(1).sum()


def first(z):
    return (z,)


def halves(z):
    return z[:, :2], z[:, 2:]


def mean_and_variance(z):
    return z[:, :2], z[:, 2:].exp()


CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
# How the outputs of the loss are made, the losses with their other arguments, and the scalar of
# their values.
CASES = {
    "cosine": (halves, [(nn.CosineEmbeddingLoss(), lambda: torch.ones(N))], lambda v: v),
    "triplet": (halves, [(nn.TripletMarginLoss(margin=9.0), z(N, 2))], lambda v: v),
    "triplet of rows": (
        halves,
        [(nn.TripletMarginLoss(margin=9.0, reduction="none"), z(N, 2))],
        lambda v: (v * v.detach()).sum(),
    ),
    "mean and variance": (
        lambda z: (z[:, :2],),
        [(lambda m, t, v: F.gaussian_nll_loss(m, t, v), z(N, 2), lambda: soft(N, 2)() + 1)],
        lambda v: -v,
    ),
    "a function": (first, [(Sine(),)], lambda v: v),
    "a function, negative": (first, [(Sine(),)], lambda v: -0.3 * v),
    "entrywise": (first, [(lambda z: z.sin().sum(),)], lambda v: v),
    "convex": (first, [(CE, y(C, N))], lambda v: v),
    "convex, negative": (first, [(CE, y(C, N))], lambda v: -2 * v),
    "convex, either sign": (
        first,
        [(nn.CrossEntropyLoss(reduction="none"), y(C, N))],
        lambda v: (v * torch.randn(N).double()).sum(),
    ),
    "weights of either sign": (
        first,
        [
            (
                nn.CrossEntropyLoss(torch.tensor([1.0, -2.0, 0.5, -1.0]).double(), reduction="sum"),
                lambda: torch.arange(N) % C,
            )
        ],
        lambda v: v,
    ),
    "a function of weights of either sign": (
        first,
        [
            (
                lambda z, t: F.cross_entropy(
                    z, t, torch.tensor([1.0, -2.0, 0.5, -1.0]).double(), reduction="sum"
                ),
                lambda: torch.arange(N) % C,
            )
        ],
        lambda v: v,
    ),
    "a difference": (first, [(CE, y(C, N)), (MSE, z(N, C))], lambda v, w: v - 0.7 * w),
}


def dense(model, x, split, losses, combine):
    """J^T H J over all parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    f = model(x).detach()

    def scalar(flat):
        torch.manual_seed(7)
        return combine(*[loss(*split(flat.reshape(f.shape)), *args) for loss, *args in losses])

    # H is that in what the losses are given, so in what `split` makes.
    outs = [t.detach() for t in split(f)]
    sizes, shapes = [t.numel() for t in outs], [t.shape for t in outs]

    def of_outputs(flat):
        torch.manual_seed(7)
        parts = [t.reshape(s) for t, s in zip(flat.split(sizes), shapes, strict=True)]
        return combine(*[loss(*parts, *args) for loss, *args in losses])

    h = jacrev(jacrev(of_outputs))(torch.cat([t.flatten() for t in outs])).detach()
    j = jacrev(lambda p: torch.cat([t.flatten() for t in split(functional_call(model, p, (x,)))]))(
        params
    )
    j = {name: t.detach().reshape(len(h), -1) for name, t in j.items()}
    return lambda *names: (flat := torch.cat([j[name] for name in names], 1)).T @ h @ flat


@pytest.mark.parametrize("name", CASES)
def test_exact(name):
    split, losses, combine = CASES[name]
    model, x = Net().double(), z(N, 3)()
    losses = [(loss, *[make() for make in makes]) for loss, *makes in losses]
    truth = dense(model, x, split, losses, combine)
    nnj.extend(model)
    torch.manual_seed(7)
    with nnj.collect("ggn_diag", "ggn_block", signed=True):
        out = split(model(x))
        combine(*[nnj.extend(loss, loss=True)(*out, *args) for loss, *args in losses]).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.ggn_diag.flatten(), truth(key).diagonal(), rtol=1e-9, atol=1e-11
        )
    for key in ("one", "two"):
        block = truth(f"{key}.weight", f"{key}.bias")
        torch.testing.assert_close(getattr(model, key).ggn_block, block, rtol=1e-9, atol=1e-11)
    grads = [p.grad for p in model.parameters()]
    alone = [
        (loss if not isinstance(loss, nn.Module) else nnj.retract(loss), *args)
        for loss, *args in losses
    ]
    torch.manual_seed(7)
    expected = torch.autograd.grad(
        combine(*[loss(*split(model(x)), *args) for loss, *args in alone]), list(model.parameters())
    )
    torch.testing.assert_close(grads, list(expected), rtol=1e-12, atol=1e-14)


def test_passes_add_up_and_convex_losses_are_as_they_were():
    model, x, t = nnj.extend(Net().double()), z(N, 3)(), y(C, N)()
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss(model(x), t).backward()
    plain = [p.ggn_diag for p in model.parameters()]
    with nnj.collect("ggn_diag", signed=True):
        loss(model(x), t).backward()
    assert all(torch.equal(p.ggn_diag, q) for p, q in zip(model.parameters(), plain, strict=True))
    with nnj.collect("ggn_diag", signed=True):
        loss(model(x), t).backward()
        (-loss(model(x), t)).backward()
    assert all(not p.ggn_diag.any() for p in model.parameters())


def test_beside_a_collection_that_is_not_signed():
    model, x, t = nnj.extend(Net().double()), z(N, 3)(), y(C, N)()
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", signed=True), nnj.collect("batch_grad", "ggn_block"):
        loss(model(x), t).backward()
    assert model.one.weight.batch_grad.shape == (N, 5, 3)
    weight = model.two.ggn_block.diagonal()[: 5 * C].reshape(C, 5)
    torch.testing.assert_close(model.two.weight.ggn_diag, weight, rtol=1e-9, atol=1e-12)
    with (
        pytest.raises(nnj.NNJError, match="negative factor"),
        nnj.collect("ggn_diag", signed=True),
        nnj.collect("batch_grad"),
    ):
        (-loss(model(x), t)).backward()


@pytest.mark.parametrize("name", ["ggn_diag_mc", "batch_grad"])
def test_what_is_not_linear_in_the_hessian(name):
    with pytest.raises(nnj.NNJError, match=f"{name} cannot be collected with signed=True"):
        nnj.collect("ggn_diag", name, signed=True)


@pytest.mark.parametrize(
    "loss, message",
    [
        (nn.NLLLoss(), "log_softmax"),
        (lambda z, t: z.logsumexp(0).sum(), "couples rows"),
        (lambda z, t: z.sqrt().sum(), "not finite"),
    ],
)
def test_other_refusals_stay(loss, message):
    model, x, t = nnj.extend(Net().double()), z(N, 3)(), y(C, N)()
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag", signed=True):
        nnj.extend(loss)(model(x).relu(), t).backward()


def test_refusals_name_the_option():
    model, x, t = nnj.extend(Net()), torch.randn(N, 3), y(C, N)()
    sine, entropy = nnj.extend(Sine(), loss=True), nnj.extend(nn.CrossEntropyLoss())
    for run in (lambda: sine(model(x)), lambda: -entropy(model(x), t)):
        with pytest.raises(nnj.NNJError, match="signed=True"), nnj.collect("ggn_diag"):
            run().backward()


def test_not_with_a_tolerance():
    with pytest.raises(nnj.NNJError, match="tol= gives a lower bound"):
        nnj.collect("ggn_diag", signed=True, tol=0.1)


@pytest.mark.parametrize("factor", [-2.0, 0.0, 2.0])
def test_a_linear_loss_has_no_curvature_of_either_sign(factor):
    model, loss = nnj.extend(Net().double()), nnj.extend(lambda z: z.sum())
    with nnj.collect("ggn_diag", "ggn_block", signed=True):
        (factor * loss(model(torch.randn(N, 3).double()))).backward()
    for p in model.parameters():
        assert torch.equal(p.ggn_diag, torch.zeros_like(p))
    assert not model.one.ggn_block.any() and not model.two.ggn_block.any()


class Pair(nnj.Quantity):
    """A sum whose state is a table of tensors."""

    degree = 1

    def parameter(self, factor, total_columns):
        return factor.square_sum()

    def end_pass(self, state):
        return {"once": state, "twice": 2 * state}

    def finish(self, state, samples):
        return state["twice"] - state["once"]


def test_states_that_are_tables():
    model, loss = nnj.extend(Net().double()), nnj.extend(Sine())
    x = torch.randn(N, 3).double()
    with nnj.collect(Pair(), "ggn_diag", signed=True):
        loss(model(x)).backward()
    assert any(bool((p.ggn_diag < 0).any()) for p in model.parameters())
    for p in model.parameters():
        torch.testing.assert_close(p.pair, p.ggn_diag)


@pytest.mark.parametrize("form", ["one loss of three outputs", "two losses of two"])
@pytest.mark.parametrize("kind", ["classes", "images"])
def test_a_contrastive_loss_of_calls_of_one_model(kind, form):
    """|a - p|² / 2 - |a - n|² / 2: the diagonal of (J_a - J_p)^T (J_a - J_p) less that of n."""
    net, x = small(kind).model, small(kind).x[:6]
    inputs = [x, x.flip(0), x.roll(1, 0) + 0.1]
    a, p, n = (dense_jacobian(net, t) for t in inputs)
    expected = ((a - p).square() - (a - n).square()).sum((0, 1))
    nnj.extend(net)
    if form == "two losses of two":
        square = nnj.extend(nn.MSELoss(reduction="sum"))
        with nnj.collect("ggn_diag", signed=True):
            za, zp, zn = map(net, inputs)
            (0.5 * square(za, zp) - 0.5 * square(za, zn)).backward()
    else:
        loss = nnj.extend(
            lambda a, p, n: ((a - p).square().sum() - (a - n).square().sum()) / 2, loss=True
        )
        with nnj.collect("ggn_diag", signed=True):
            loss(*map(net, inputs)).backward()
    found = torch.cat([q.ggn_diag.flatten() for q in net.parameters()])
    torch.testing.assert_close(found, expected)
    assert (found < 0).any() and (found > 0).any()

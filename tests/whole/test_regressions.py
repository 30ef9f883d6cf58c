"""Cases in which a number once looked right and was wrong; each was found by somebody who looked
for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.jacobians.outer_product import OuterProduct
from tests.support.oracle import dense

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(1))
linear = lambda i=3, o=3: nn.Linear(i, o)
P = lambda *shape: nn.Parameter(torch.randn(*shape))


class Net(nn.Module):
    """A model given by its parts and its forward."""

    def __init__(self, forward: Callable[..., Any], **parts: Any):
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def compare(model, x=X, y=Y, loss=F.cross_entropy, twin=None, owner=None):
    """ggn_diag, and batch_grad by sample, against the dense truth."""
    model = model.double()
    each = None
    if owner is not None:
        each = owner.repeat_interleave(model(x).numel() // len(owner))
    truth = dense(
        copy.deepcopy(twin or model).double(), lambda run: [run(x)], lambda f: loss(f[0], y), each
    )
    nnj.extend(model)
    extended = nnj.extend(nn.CrossEntropyLoss() if loss is F.cross_entropy else loss)
    with nnj.collect("ggn_diag", "batch_grad"):
        extended(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, truth.diag(name), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(p.batch_grad.sum(0), p.grad)
        if owner is not None:
            torch.testing.assert_close(p.batch_grad, truth.batch_grad(name))


class Borrowed(nn.Module):
    """A leaf with a parameter of its own that uses another layer's weight, too: the fallback must
    not cut that path.
    """

    def __init__(self, other):
        super().__init__()
        self.others, self.scale = [other], nn.Parameter(torch.ones(3))

    def forward(self, x):
        return F.linear(x, self.others[0].weight) * self.scale.exp()


def test_a_layer_that_uses_another_layers_weight():
    torch.manual_seed(0)
    a = linear()
    compare(Net(lambda s, x: s.b(s.a(x).tanh()), a=a, b=Borrowed(a)))


class Centred(nn.Module):
    """Its y is that of each sample alone, its derivative is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.w.exp() + (x.mean(0) - x.mean(0).detach())


def test_samples_coupled_in_the_derivative_alone_are_refused():
    model, loss = (
        nnj.extend(nn.Sequential(linear(), Centred()).double()),
        nnj.extend(nn.CrossEntropyLoss()),
    )
    with pytest.raises(nnj.NNJError, match="influence one another"), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.calls, self.last = nn.Parameter(torch.ones(3)), [], None

    def forward(self, x):
        self.calls.append(1)
        self.last = x
        return x * self.w.exp()


def test_the_fallback_leaves_no_trace_on_the_users_module():
    model = nn.Sequential(linear(), Counting())
    compare(model)
    assert type(model[1].last) is torch.Tensor and model[1].last.shape == X.shape


def test_contributions_of_two_outputs_do_not_cancel_in_the_probe():
    torch.manual_seed(0)

    def forward(s, x):
        a, b = s.a(x), s.b(x.flip(0)).flip(0)
        return torch.stack([a + b, a - b], 1)

    model = Net(lambda s, x: forward(s, x).unbind(1), a=linear(), b=linear()).double()
    flat = Net(forward, a=copy.deepcopy(model.a), b=copy.deepcopy(model.b)).double()
    truth = dense(
        flat,
        lambda run: [run(X)],
        lambda f: f[0][:, 0].square().sum() + 2 * f[0][:, 1].square().sum(),
    )
    nnj.extend(model)
    loss = nnj.extend(lambda f, g: f.square().sum() + 2 * g.square().sum())
    with nnj.collect("ggn_diag"):
        loss(*model(X)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, truth.diag(name))


def test_entries_that_cancel_in_half_precision():
    model = nnj.extend(linear(3, 64).to(torch.bfloat16))
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    h = model(torch.randn(8, 3).to(torch.bfloat16)).flip(0)
    output = torch.cat([h, -h], 1)
    with nnj.collect("ggn_diag"):
        loss(output, torch.zeros_like(output)).backward()
    assert bool((model.bias.ggn_diag == 32).all())


def test_options_that_change_between_two_calls_of_one_layer():
    def forward(s, x):
        s.norm.eps = 1.0
        h = s.norm(s.a(x))
        s.norm.eps = 1e-5
        return s.b(s.norm(h))

    compare(Net(forward, a=linear(), norm=nn.LayerNorm(3), b=linear()))


def test_kernels_of_places_that_cancel():
    torch.manual_seed(0)
    common, noise = torch.randn(4, 1, 60, 1), torch.randn(4, 1, 60, 8)
    u = common + 1e-4 * noise
    v = torch.randn(50, 4, 1, 5, 8)
    v = v - v.mean(-1, keepdim=True)
    factor = OuterProduct(u, v, (5, 60))
    assert factor.by_gram(50)
    exact = OuterProduct(u.double(), v.double(), (5, 60)).dense().square().sum((0, 1))
    found = factor.square_sum()
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", ["by hand", "squared"])
def test_a_weight_used_by_a_layer_and_in_another_form(shape):
    other = (
        (lambda s, h: F.linear(h, s.a.weight))
        if shape == "by hand"
        else (lambda s, h: h * s.a.weight.square().sum())
    )
    compare(Net(lambda s, x: s.b(other(s, s.a(x).tanh())), a=linear(), b=linear()))


def test_a_layer_on_one_vector():
    compare(Net(lambda s, x: s.b(x + s.a(s.v)), a=linear(), b=linear(), v=P(3)))


def test_a_loss_changed_in_place_after_it_was_made():
    model, loss = nnj.extend(linear().double()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("batch_grad"):
        value = loss(model(X), Y)
        value /= 2
        value.backward()
    torch.testing.assert_close(model.weight.batch_grad.sum(0), model.weight.grad)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(cell):
    first = lambda h: h[0] if isinstance(h, tuple) else h
    compare(Net(lambda s, x: s.b(first(s.a(x))), a=cell(3, 3), b=linear()))


def positions(s, x):
    return s.head(s.embed(x) + s.place(torch.arange(x.shape[1]))).reshape(-1, 3)


@pytest.mark.parametrize("n, t", [(1, 4), (2, 4), (3, 3)])
def test_samples_of_a_language_model_whatever_its_sizes(n, t):
    torch.manual_seed(0)
    x, y = torch.randint(0, 5, (n, t)), torch.randint(0, 3, (n * t,))
    model = Net(positions, embed=nn.Embedding(5, 4), place=nn.Embedding(t, 4), head=linear(4, 3))
    compare(model, x, y, owner=torch.arange(n * t) // t)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.head(s.embed(x.flip(0)).flip(0)).reshape(-1, 3),
        lambda s, x: s.head(s.embed(x.t()).transpose(0, 1)).reshape(-1, 3),
    ],
    ids=["sorted and put back", "transposed and put back"],
)
def test_samples_that_the_glue_before_the_first_layer_has_moved(forward):
    torch.manual_seed(0)
    x, y = torch.randint(0, 5, (3, 3)), torch.randint(0, 3, (9,))
    compare(
        Net(forward, embed=nn.Embedding(5, 4), head=linear(4, 3)), x, y, owner=torch.arange(9) // 3
    )


def test_the_batch_is_not_always_the_first_argument():
    model = nnj.extend(
        Net(lambda s, table, x: s.a(x) + s.b(table).sum(0), a=linear(), b=linear()).double()
    )
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("batch_grad"):
        loss(model(torch.randn(2, 3).double(), X), Y).backward()
    assert model.a.weight.batch_grad.shape == (4, 3, 3)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_saturated_network(dtype, rtol):
    """The last layer is walked through without a factor; sure samples must not drown in
    rounding.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[2].weight.mul_(30)
    twin = copy.deepcopy(model)
    truth = dense(twin, lambda run: [run(X)], lambda f: F.cross_entropy(f[0], Y))
    nnj.extend(model.to(dtype))
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.CrossEntropyLoss())(model(X.to(dtype)), Y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag.double(), truth.diag(name), rtol=rtol, atol=0)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_more_outputs_than_features(loss):
    """Columns are recompressed behind the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 50)
    ).double()
    x = torch.randn(3, 30).double()
    y = (
        torch.randint(0, 50, (3,))
        if isinstance(loss, nn.CrossEntropyLoss)
        else torch.randn(3, 50).double()
    )
    truth = dense(copy.deepcopy(model), lambda run: [run(x)], lambda f: loss(f[0], y))
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", block_limit=2000):
        nnj.extend(loss)(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, truth.diag(name), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(model[4].ggn_block, truth.block(["4.weight", "4.bias"]))


def test_a_node_whose_batching_rule_in_torch_is_wrong():
    """vmap over the backward of cdist gives wrong numbers (torch 2.13), and so does jacrev: the
    truth is taken row by row.
    """
    torch.manual_seed(0)
    near = lambda s, x: s.head(torch.exp(-torch.cdist(s.a(x), s.centres)))
    model = Net(near, a=linear(), centres=P(5, 3), head=linear(5)).double()
    f = model(X)
    rows = torch.eye(f.numel()).double().reshape(-1, *f.shape)
    h = torch.func.hessian(lambda z: F.cross_entropy(z.reshape(f.shape), Y))(f.detach().reshape(-1))
    by_row = lambda p: torch.stack(
        [torch.autograd.grad(f, p, r, retain_graph=True)[0] for r in rows]
    )
    dense = {n: by_row(p) for n, p in model.named_parameters()}
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.CrossEntropyLoss())(model(X), Y).backward()
    for name, p in model.named_parameters():
        d = dense[name].reshape(len(rows), -1)
        torch.testing.assert_close(p.ggn_diag, ((h @ d) * d).sum(0).reshape(p.shape))


def test_queries_that_all_samples_share_go_through_a_layer():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3).double()
    attend = lambda s, x: s.head((s.q(s.queries) @ s.k(x).mT).softmax(-1) @ x).mean(1)
    compare(
        Net(attend, q=linear(), k=linear(), queries=P(2, 3), head=linear()),
        x,
        owner=torch.arange(4),
    )

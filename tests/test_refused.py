"""Each refusal is a sentence of nnj's own; after it the gradient is intact, and the next `with` works."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nnj
from nnj import plugins, quantities
from nnj_plugins import losses
from tests.parts import Net


def data():
    torch.manual_seed(0)
    return torch.randn(4, 3), torch.randint(0, 2, (4,))


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def batch_attention(s, x):
    h = s.a(x)
    return s.b((h @ h.T).softmax(-1) @ h)


def centred(s, x):
    h = s.a(x)
    return s.b(h - h.mean(0))


def ragged(s, x):
    h = s.a(x)
    return s.b(h.view(4, 9)[:, :3] + h.mean(0))


two = lambda: dict(a=nn.Linear(3, 3), b=nn.Linear(3, 2))
ce = nn.CrossEntropyLoss
REFUSED = {
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        ce(),
        "BatchNorm1d in training mode .* influence one another.*eval",
    ),
    "functional batch norm": (
        lambda: Net(lambda s, x: s.b(F.batch_norm(s.a(x), None, None, training=True)), **two()),
        ce(),
        "samples influence one another",
    ),
    "batch attention": (lambda: Net(batch_attention, **two()), ce(), "samples influence one another"),
    "centred batch": (lambda: Net(centred, **two()), ce(), "samples influence one another"),
    "contrastive": (
        lambda: Net(lambda s, x: F.normalize(s.a(x)) @ F.normalize(s.a(x)).T, **two()),
        lambda f, y: F.cross_entropy(f, torch.arange(4)),
        "influence one another",
    ),
    "coupling loss": (linear, lambda f, y: f.sum().square(), "couples rows of the batch"),
    "negative factor": (linear, lambda f, y: f, "negative factor"),
    "not convex": (linear, lambda f, y: -f.square().sum(), "not positive semi-definite"),
    "not finite": (
        lambda: Net(lambda s, x: s.a(x) * 1e38 * 1e38, **two()),
        lambda f, y: f.clamp(-1, 1).square().sum(),
        "not finite",
    ),
    "complex": (
        lambda: Net(lambda s, x: torch.view_as_complex(s.b(x).view(-1, 1, 2)), **two()),
        lambda f, y: f.abs().square().sum(),
        "complex",
    ),
    "nonlinear use": (linear, lambda f, y: f, "not linear in this loss"),
    "reentrant checkpoint": (
        lambda: Net(lambda s, x: s.b(checkpoint(s.a, x.requires_grad_(), use_reentrant=True)), **two()),
        ce(),
        "use_reentrant=False",
    ),
    "closure": (linear, lambda f, y: f, "otherwise than through its arguments"),
}


def run(name, model, loss, x, y):
    if name == "negative factor":
        return -nn.functional.mse_loss(model(x), y.float()[:, None].expand(4, 2)) if loss is None else -loss(model(x), y)
    if name == "nonlinear use":
        return loss(model(x), y).exp()
    if name == "closure":
        f = model(x)
        outer = (
            nnj.extend(lambda z, t: F.cross_entropy(z, t) + f.square().sum())
            if loss is not None
            else (lambda z, t: F.cross_entropy(z, t) + f.square().sum())
        )
        return outer(f * 1, y)
    return loss(model(x), y)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_leaves_everything_intact(name):
    make, loss, words = REFUSED[name]
    x, y = data()
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    function = loss if name not in ("negative factor", "nonlinear use") else (lambda f, t: F.cross_entropy(f, t))
    run(name, plain, None if name == "closure" else function, x.clone(), y).backward()
    nnj.extend(model)
    extended = nnj.extend(copy.deepcopy(function))
    with pytest.raises(nnj.NNJError, match=words), nnj.collect("ggn_diag"):
        run(name, model, extended, x.clone(), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad) or not bool(q.grad.isfinite().all())
        assert getattr(p, "ggn_diag", None) is None
    other, good = nnj.extend(linear()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        good(other(x), y).backward()
    assert other.weight.ggn_diag.shape == (2, 3)


def test_output_of_integers():
    with pytest.raises(nnj.NNJError, match="not of floating point"):
        nnj.curvature.check_outputs("the loss", [torch.ones(3, dtype=torch.long)])


def test_unknown_quantity_names_the_known_and_a_close_match():
    with pytest.raises(nnj.NNJError, match="unknown quantity 'ggn_dialog'; did you mean 'ggn_diag'.*Known: .*ggn_block"):
        nnj.collect("ggn_dialog")
    with pytest.raises(nnj.NNJError, match="unknown option 'sampels'.*did you mean 'samples'"):
        nnj.collect("ggn_diag_mc", sampels=3)
    with pytest.raises(nnj.NNJError, match="at least 1"):
        nnj.collect("ggn_diag_mc", samples=0)
    with pytest.raises(nnj.NNJError, match="needs the name"):
        nnj.collect()


def test_nothing_collected_is_said_when_the_with_ends():
    x, y = data()
    model = nnj.extend(linear())
    with pytest.raises(nnj.NNJError, match="nothing was collected for ggn_diag: no extended loss"), nnj.collect("ggn_diag"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(ZeroDivisionError), nnj.collect("ggn_diag"):  # the user's own error is not hidden by ours
        raise ZeroDivisionError


def test_rows_that_do_not_divide():
    torch.manual_seed(0)
    model = nnj.extend(Net(ragged, **two()))
    loss = nnj.extend(nn.CrossEntropyLoss())
    with pytest.raises(nnj.NNJError, match="influence one another"), nnj.collect("ggn_diag"):
        loss(model(torch.randn(12, 3)), torch.randint(0, 2, (4,))).backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(backend):
    x, y = data()
    model = nnj.extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    loss = nnj.extend(nn.CrossEntropyLoss())
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(nnj.NNJError, match="torch.compile"):
        nnj.extend(compiled)
    if backend == "aot_eager":
        with pytest.raises(nnj.NNJError, match="torch.compile.*_orig_mod"), nnj.collect("ggn_diag"):
            loss(compiled(x), y).backward()


def test_a_block_beyond_the_limit_is_refused_before_it_is_allocated():
    x = torch.randn(2, 1000)
    model = nnj.extend(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2)))  # a block of 3.6 TiB
    loss = nnj.extend(nn.CrossEntropyLoss())
    with (
        pytest.raises(nnj.NNJError, match=r"ggn_block of '0' \(Linear\) would be 1001000 x 1001000.*block_limit=10000.*ggn_diag"),
        nnj.collect("ggn_block"),
    ):
        loss(model(x), torch.tensor([0, 1])).backward()
    with nnj.collect("ggn_block", modules=[model[1]], block_limit=2002):
        loss(model(x), torch.tensor([0, 1])).backward()
    assert model[1].ggn_block.shape == (2002, 2002)


class Squash(nn.Module):
    def forward(self, x):
        return x.tanh()


class Wrong(nnj.Jacobian):
    """Returns the wrong shape."""

    def jvp(self, v):
        return v

    def vjp(self, u):
        return u[..., :-1]


def test_a_rule_that_returns_the_wrong_shape():
    class Plugin:
        @staticmethod
        @nnj.hookimpl
        def nnj_register_layers(register):
            register(Squash, lambda m, x, y: {"input": Wrong(x.shape[1:], y.shape[1:], x)})

    manager = nnj.PluginManager(load=False)
    manager.register(Plugin, "nnj-squash")
    manager.register(losses, "nnj-losses")
    manager.register(quantities, "nnj-quantities")
    former = plugins.use(manager)
    try:
        model = nnj.extend(nn.Sequential(nn.Linear(3, 4), Squash()))
        loss = nnj.extend(nn.CrossEntropyLoss())
        with (
            pytest.raises(
                nnj.PluginError, match=r"plugin 'nnj-squash' \(layer '1'\): vjp of 'input' returned .*3\), expected .*4\)"
            ),
            nnj.collect("ggn_diag"),
        ):
            loss(model(data()[0]), data()[1]).backward()
    finally:
        plugins.use(former)

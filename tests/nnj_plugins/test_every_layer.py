"""Every rule of our own against dense derivatives, and what rules refuse or decline."""

from __future__ import annotations

import gc
import importlib
import weakref

import pytest
import torch
from torch import nn

import nnj
from nnj.registry.layer_rules import Declined, Described, ask_rule, find_rule
from nnj.registry.manager import use
from nnj.testing import check_layer
from tests.support.layers import ACTIVATIONS, CASES, INPLACE

FILES = (
    "linear",
    "conv",
    "pooling",
    "shape",
    "padding",
    "upsample",
    "dropout",
    "norm",
    "embedding",
    "activation",
    "extra",
    "abstract_jacobian",
    "fallback",
)


@pytest.fixture(autouse=True)
def manager():
    """Our own plugins in a fresh manager, and a fixed seed."""
    torch.manual_seed(0)
    new = nnj.PluginManager(load=False)
    for name in FILES:
        new.register(importlib.import_module(f"nnj_plugins.layers.{name}"), f"nnj-{name}")
    former = use(new)
    yield new
    use(former)


def slots_of(module, x):
    """What the rule says of a module at x; None where it declines."""
    with torch.no_grad():
        kept = x.clone()
        y = module(x)
        said = ask_rule(find_rule(module), module, kept, y, {module: "net.layer"})
        return None if isinstance(said, Declined) else said.jacobians


@pytest.mark.parametrize("module, x", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_layer(module, x):
    module, x = module(), x()
    check_layer(module, x)


@pytest.mark.parametrize("name, module, x", [pytest.param(*case, id=case[0]) for case in CASES])
def test_layer_is_described_by_its_own_rule(name, module, x):
    assert find_rule(module()).is_fallback == name.startswith("fallback")


@pytest.mark.parametrize("module, x", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_nothing_outlives_the_operators(module, x):
    """No cycle of references keeps the point or what was derived from it: memory is free as soon as
    a sweep is done.
    """
    module, x = module().double(), x()
    x = x.double() if x.is_floating_point() else x
    entry = find_rule(module)
    with torch.no_grad():
        kept, y = x.clone(), module(x.clone()).clone()
    gc.disable()
    try:
        said = ask_rule(entry, module, kept, y)
        assert isinstance(said, Described)
        slots = said.jacobians
        for j in slots.values():
            j.vjp(torch.ones_like(y)[None])
            j.square()
        held = [weakref.ref(t) for t in (kept, y, *slots.values())]
        del said, slots, j, kept, y
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


KINKS = torch.tensor(
    [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 1.5, -1.5, 20.0, -20.0, 200.0, -200.0]
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=f"{name}{suffix}")
        for suffix, table in (("", ACTIVATIONS), ("-inplace", INPLACE))
        for name, make in table.items()
    ],
)
def test_slopes_at_kinks_and_far_out_are_autograds(make, dtype):
    x = KINKS.to(dtype)[:, None].requires_grad_()
    module = make().to(dtype)
    y = module(x.clone())
    (expected,) = torch.autograd.grad(y.sum(), x)
    j = slots_of(module, x.detach().clone())["input"]
    found = j.vjp(torch.ones(1, *y.shape, dtype=dtype))[0]
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    # slopes told from y are as fine as y
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=2 * eps)


def test_largest_of_equal_numbers_is_torchs_choice():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    module = nn.MaxPool2d(3, stride=1, padding=1)
    y = module(x)
    u = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, u)
    torch.testing.assert_close(slots_of(module, x.detach())["input"].vjp(u[None])[0], expected)


@pytest.mark.parametrize(
    "module, x, message",
    [
        (
            nn.BatchNorm2d(2),
            torch.randn(3, 2, 2, 2),
            (
                r"^layer 'net.layer': BatchNorm2d in training mode makes the samples .* call "
                r"model.eval\(\), or freeze"
            ),
        ),
        (
            nn.BatchNorm1d(2, track_running_stats=False).eval(),
            torch.randn(3, 2),
            (
                r"^layer 'net.layer': BatchNorm1d without running statistics .* use "
                r"track_running_stats=True and model.eval\(\)"
            ),
        ),
    ],
)
def test_coupled_samples_are_refused(module, x, message):
    with pytest.raises(nnj.NNJError, match=message) as caught:
        slots_of(module, x)
    assert not isinstance(caught.value, nnj.PluginError)


class Coupled(nn.Module):
    """Takes the mean of the batch away: no row is a function of its own input alone."""

    def forward(self, x):
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x * self.seen


DECLINED = {
    "conv-unbatched": (nn.Conv2d(2, 2, 2), (2, 3, 3)),
    "maxpool-unbatched": (nn.MaxPool2d(2), (2, 4, 4)),
    "avgpool-unbatched": (nn.AvgPool2d(2), (2, 4, 4)),
    "flatten-batch": (nn.Flatten(0), (2, 2, 2)),
    "unflatten-batch": (nn.Unflatten(0, (2, 1)), (2, 2)),
    "dropout": (nn.Dropout(0.5), (2, 3)),
    "dropout2d": (nn.Dropout2d(0.5), (2, 3, 2, 2)),
    "alpha-dropout": (nn.AlphaDropout(0.5), (2, 3)),
    "instancenorm-unbatched": (nn.InstanceNorm1d(2), (2, 3)),
    "layernorm-batch": (nn.LayerNorm((2, 3)), (2, 3)),
    "rmsnorm-batch": (nn.RMSNorm((2, 3)), (2, 3)),
    "leakyrelu-negative": (nn.LeakyReLU(-0.5), (2, 3)),
    "elu-negative": (nn.ELU(-0.5), (2, 3)),
    "threshold-high-value": (nn.Threshold(0.5, 1.0), (2, 3)),
    "rrelu": (nn.RReLU(), (2, 3)),
    **{
        f"{cls.__name__}-inplace": (cls(inplace=True), (2, 3))
        for cls in (nn.SiLU, nn.Mish, nn.Hardswish)
    },
    "softmax-batch": (nn.Softmax(0), (2, 3)),
    "logsoftmax-batch": (nn.LogSoftmax(-2), (2, 3)),
    "softmax2d-unbatched": (nn.Softmax2d(), (2, 3, 2)),
    "fallback-coupled": (Coupled(), (3, 2)),
    "fallback-random": (Noisy(), (4, 3)),
    "fallback-batchnorm": (nn.Sequential(nn.BatchNorm1d(3)), (4, 3)),
    "fallback-dropout": (nn.Sequential(nn.Dropout()), (4, 3)),
    "fallback-batch-grows": (nn.Sequential(nn.Flatten(0)), (4, 3)),
}


@pytest.mark.parametrize("module, shape", DECLINED.values(), ids=DECLINED.keys())
def test_declined(module, shape):
    with torch.no_grad():
        x = torch.randn(shape)
        y = module(x.clone())
        before = {name: t.clone() for name, t in module.state_dict().items()}
        assert isinstance(ask_rule(find_rule(module), module, x, y), Declined)
    for name, t in module.state_dict().items():
        assert t.equal(before[name])


@pytest.mark.parametrize("options", [{"max_norm": 1.0}])
def test_embedding_declines(options):
    assert slots_of(nn.Embedding(4, 2, **options), torch.tensor([[0, 1]])) is None


def test_max_pool_that_returns_indices_is_declined():
    entry, x = find_rule(nn.MaxPool2d(2)), torch.randn(2, 2, 4, 4)
    assert isinstance(
        ask_rule(entry, nn.MaxPool2d(2, return_indices=True), x, x[..., ::2, ::2]), Declined
    )


def test_fallback_leaves_buffers_alone():
    module = Counting()
    x = torch.randn(2, 3)
    y = module(x)
    # the next call multiplies by another number
    assert isinstance(ask_rule(find_rule(module), module, x, y), Declined)
    assert module.seen == 1


def test_fallback_with_frozen_and_tied_parameters():
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    check_layer(module, torch.randn(4, 2))

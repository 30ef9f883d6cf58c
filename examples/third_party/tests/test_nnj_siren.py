"""Every rule against a dense derivative in float64, and all of them together in a model."""
import pytest
import torch
from nnj_siren import Charbonnier, Sine, fast, sine
from torch import nn
from torch.func import functional_call, hessian, jacrev

import nnj
from nnj.plugins import manager
from nnj.testing import check_layer, check_loss, check_model


def test_the_plugins_are_installed():
    assert manager().find("layer", Sine).rule is fast.sine
    assert manager().find("loss", Charbonnier) is not None and manager().quantity("ggn_trace") is not None


@pytest.fixture(params=[fast, sine], ids=["fast", "jacobian"])
def only(request):
    """One of the two rules in a manager of its own: else the fast one always wins."""
    from nnj import plugins

    mine = nnj.PluginManager(load=False)
    mine.register(request.param)
    former = plugins.use(mine)
    yield
    plugins.use(former)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 2, 5, 3), (1, 3)])
def test_sine(only, shape):
    check_layer(Sine(3, frequency=2.0), torch.randn(shape))


def test_charbonnier():
    check_loss(Charbonnier(eps=0.5), torch.randn(4, 3), torch.randn(4, 3))
    check_loss(Charbonnier(eps=0.5), torch.randn(4, 3), torch.randn(3))  # broadcast: declined, and differentiated twice


def siren() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), Sine(5, frequency=2.0), nn.Linear(5, 5), Sine(5, frequency=1.5), nn.Linear(5, 3))
    return net.double(), torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_trace(reduction):
    net, x, target = siren()
    loss_func = Charbonnier(0.5, reduction)
    params = {name: p.detach() for name, p in net.named_parameters()}
    j = jacrev(lambda p: functional_call(net, p, (x,)).flatten())(params)
    h = hessian(lambda y: loss_func(y, target.flatten()))(net(x).detach().flatten())
    model, loss_func = nnj.extend(net), nnj.extend(loss_func)
    with nnj.collect("ggn_trace", "ggn_diag"):
        (3 * loss_func(model(x), target)).backward()
    for name, p in model.named_parameters():
        flat = j[name].reshape(len(h), -1)
        expected = 3 * (flat.T @ h @ flat).diagonal()
        assert p.ggn_trace.shape == ()
        torch.testing.assert_close(p.ggn_diag.flatten(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.ggn_trace, expected.sum(), rtol=1e-9, atol=1e-12)


def test_passes_add_up():
    net, x, target = siren()
    model, loss_func = nnj.extend(net), nnj.extend(Charbonnier(0.5, "sum"))
    with nnj.collect("ggn_trace"):
        loss_func(model(x), target).backward()
    whole = [p.ggn_trace for p in model.parameters()]
    with nnj.collect("ggn_trace"):
        for rows in (slice(0, 2), slice(2, 6)):
            loss_func(model(x[rows]), target[rows]).backward()
    torch.testing.assert_close([p.ggn_trace for p in model.parameters()], whole, rtol=1e-9, atol=1e-12)


def test_a_whole_model():
    net, x, target = siren()
    check_model(net, Charbonnier(0.5), x, target)

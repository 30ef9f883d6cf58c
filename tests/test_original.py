"""The layers of the original nnj are torch's, with the products as methods; and the classes of
pytorch-laplace, which stand on them, give the dense terms.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.testing import check_layer
from tests.support.posteriors import dense_jacobian

close = torch.testing.assert_close
Made = tuple[nn.Module, nn.Module | None, Callable[[], Tensor]]

# by name: ours, torch's, an input
LAYERS: dict[str, Callable[[], Made]] = {
    "Linear": lambda: (nnj.Linear(4, 3), nn.Linear(4, 3), lambda: torch.randn(5, 4)),
    "Conv2d": lambda: (
        nnj.Conv2d(2, 3, 3, padding=1, add_hooks=False),
        nn.Conv2d(2, 3, 3, padding=1),
        lambda: torch.randn(5, 2, 4, 4),
    ),
    "Tanh": lambda: (nnj.Tanh(add_hooks=True), nn.Tanh(), lambda: torch.randn(5, 4)),
    "ReLU": lambda: (nnj.ReLU(), nn.ReLU(), lambda: torch.randn(5, 4)),
    "Sigmoid": lambda: (nnj.Sigmoid(), nn.Sigmoid(), lambda: torch.randn(5, 4)),
    "Softplus": lambda: (nnj.Softplus(2), nn.Softplus(2), lambda: torch.randn(5, 4)),
    "Flatten": lambda: (nnj.Flatten(), nn.Flatten(), lambda: torch.randn(5, 2, 3)),
    "MaxPool2d": lambda: (nnj.MaxPool2d(2), nn.MaxPool2d(2), lambda: torch.randn(5, 2, 4, 4)),
    "Upsample": lambda: (
        nnj.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2),
        lambda: torch.randn(5, 2, 3, 3),
    ),
    "Sinusoidal": lambda: (nnj.Sinusoidal(), None, lambda: torch.randn(5, 4)),
    "TruncExp": lambda: (nnj.TruncExp(), None, lambda: torch.randn(5, 4)),
    "L2Norm": lambda: (nnj.L2Norm(1e-3, add_hooks=True), None, lambda: torch.randn(5, 4)),
    "Reshape": lambda: (nnj.Reshape(2, 2), None, lambda: torch.randn(5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_torchs(name):
    torch.manual_seed(0)
    ours, theirs, data = LAYERS[name]()
    x = data()
    if theirs is not None:
        assert isinstance(ours, type(theirs)) and type(ours).forward is type(theirs).forward
        ours.load_state_dict(theirs.state_dict())
        close(ours(x), theirs(x))
    check_layer(ours.double(), x.double())  # by the rule of torch's class
    u = torch.randn_like(ours(x.double()))
    close(ours.vjp(x.double(), None, u), nnj.vjp(ours, x.double(), u))
    file = io.BytesIO()
    torch.save(copy.deepcopy(ours), file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x.double()), ours(x.double()))


def test_every_layer_has_a_case():
    import nnj.original as original

    found = {
        name
        for name, cls in vars(original).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and not name.startswith("_")
    }
    assert found == {*LAYERS, "Sequential", "SkipConnection"} and found <= set(nnj.__all__)


def network(head: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    skip = nnj.SkipConnection(nnj.Linear(4, 3), nnj.Tanh(), add_hooks=True)
    layers = [skip, nnj.Linear(7, 3), *([head] if head else [])]
    return nnj.Sequential(*layers, add_hooks=True).double()


def test_a_network_of_them():
    model, x = network(nnj.L2Norm()), torch.randn(6, 4).double()
    close(model.jacobian(x, wrt="weight"), dense_jacobian(model, x))
    nnj.extend(model)
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    with nnj.collect("ggn_diag"):
        loss(model(x), torch.zeros(6, 3).double()).backward()
    j = dense_jacobian(model, x)
    found = torch.cat([p.ggn_diag.flatten() for p in model.parameters()])
    close(found, 2 * j.square().sum((0, 1)))
    assert model._n_params == sum(p.numel() for p in model.parameters())


# -- the classes of pytorch-laplace ----------------------------------------------------------------


def theirs() -> Any:
    reason = "pytorch-laplace, or BackPACK, which it imports, is not installed"
    return pytest.importorskip("pytorch_laplace", reason=reason)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


JOBS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(6, 4),
    ),
    "cnn": lambda: (cnn(), torch.randn(6, 1, 6, 6)),
    "autoencoder": lambda: (
        nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)),
        torch.randn(6, 4),
    ),
    "metric learner": lambda: (nn.Sequential(cnn(), nnj.L2Norm()), torch.randn(6, 1, 6, 6)),
    "original": lambda: (network(), torch.randn(6, 4)),
}


def job(name: str) -> tuple[Any, Tensor, Tensor]:
    """A converted model, its input, and the dense Jacobian."""
    torch.manual_seed(0)
    model, x = JOBS[name]()
    model, x = nnj.utils.convert_to_nnj(model.double()), x.double()
    return model, x, dense_jacobian(model, x)


@pytest.mark.parametrize("name", JOBS)
def test_squared_error_and_cross_entropy(name):
    package = theirs()
    model, x, j = job(name)
    found = package.MSEHessianCalculator().compute_hessian(x, model)
    close(found, j.square().sum(1).mean(0))
    p = model(x).detach().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    found = package.CEHessianCalculator().compute_hessian(x, model)
    close(found, torch.einsum("ncp,ncd,ndp->np", j, h, j).mean(0))


@pytest.mark.parametrize("name", JOBS)
def test_binary_cross_entropy(name):
    package = theirs()
    model, x, j = job(name)
    p = model(x).detach().sigmoid()
    expected = torch.einsum("ncp,nc,ncp->np", j, p * (1 - p), j).mean(0)
    # it takes "approx" for exact, and the other way round
    calculator = package.BCEHessianCalculator(approximation_accuracy="approx")
    close(calculator._compute_hessian_nnj(x, None, model), expected)


@pytest.mark.parametrize("method", ["full", "pos", "fix"])
@pytest.mark.parametrize("name", JOBS)
def test_contrastive_losses(name, method):
    package = theirs()
    model, x, j = job(name)
    a, p, n = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([4, 5, 3])
    calculator = package.ContrastiveHessianCalculator(method)
    found = calculator._compute_hessian_nnj(x, model, (a, p, n))
    apart = lambda one, two: (j[one] - j[two]).square().sum((0, 1))
    if method == "fix":
        expected = j[p].square().sum((0, 1)) - j[n].square().sum((0, 1))
    else:
        expected = apart(a, p) - (apart(a, n) if method == "full" else 0)
    close(found, expected)


@pytest.mark.parametrize("name", JOBS)
def test_approximations(name):
    package = theirs()
    model, x, _ = job(name)
    found = package.MSEHessianCalculator(approximation_accuracy="approx").compute_hessian(x, model)
    exact = nnj.jTmjp(model, x, None, wrt="weight", to_diag=True, diag_backprop=True)
    close(found, exact.mean(0))
    one = nnj.utils.convert_to_nnj(nn.Sequential(nn.Linear(4, 3)).double())
    x = torch.randn(6, 4).double()  # of one layer the approximation is exact
    calculator = package.MSEHessianCalculator(approximation_accuracy="approx")
    close(calculator.compute_hessian(x, one), dense_jacobian(one, x).square().sum(1).mean(0))


@pytest.mark.parametrize("name", JOBS)
def test_approximations_of_other_losses(name):
    """Put together of the same products, which are checked by themselves."""
    package = theirs()
    model, x, j = job(name)
    approx = lambda m: nnj.jTmjp(
        model, x, m, wrt="weight", from_diag=True, to_diag=True, diag_backprop=True
    )
    p = model(x).detach().softmax(1)
    outer = torch.einsum("ncp,nc->np", j, p).square()
    found = package.CEHessianCalculator(approximation_accuracy="approx").compute_hessian(x, model)
    close(found, (approx(p) - outer).mean(0))
    s = model(x).detach().sigmoid()
    calculator = package.BCEHessianCalculator(approximation_accuracy="exact")
    close(calculator._compute_hessian_nnj(x, None, model), approx(s * (1 - s)).mean(0))
    calculator = package.ContrastiveHessianCalculator("fix", approximation_accuracy="approx")
    a, p, n = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([4, 5, 3])
    found = calculator._compute_hessian_nnj(x, model, (a, p, n))
    each = nnj.jTmjp(model, x, None, wrt="weight", to_diag=True, diag_backprop=True)
    close(found, each[p].sum(0) - each[n].sum(0))


@pytest.mark.parametrize("method", ["full", "pos", "fix"])
@pytest.mark.parametrize("name", JOBS)
def test_arccos_terms(name, method):
    """As the package writes them, without its constructor, which fails."""
    theirs()
    from pytorch_laplace.hessian import contrastive as module

    model, x, j = job(name)
    calculator = module.ArccosHessianCalculator.__new__(module.ArccosHessianCalculator)
    nn.Module.__init__(calculator)
    calculator.method, calculator.hessian_shape = method, "diag"
    calculator.approximation_accuracy = "exact"
    a, p, n = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([4, 5, 3])

    def terms(one: Tensor, two: Tensor) -> Tensor:
        h = module._arccos_hessian(model(x[one]).detach(), model(x[two]).detach())
        pairs = ((j[one], j[one]), (j[one], j[two]), (j[two], j[two]))
        first, cross, last = (
            torch.einsum("ncp,ncd,ndp->p", left, m, right)
            for (left, right), m in zip(pairs, h, strict=True)
        )
        return first + last - (0 if method == "fix" else 2 * cross)

    found = calculator._compute_hessian_nnj(x, None, model, (a, p, n))
    close(found, terms(a, p) - (0 if method == "pos" else terms(a, n)))


def test_what_fails_by_its_own_fault():
    """As the guide says; a later version of the package may have mended it."""
    package = theirs()
    from pytorch_laplace.hessian.contrastive import ArccosHessianCalculator

    model, x, _ = job("mlp")
    with pytest.raises(TypeError):
        package.MSEHessianCalculator(hessian_shape="block").compute_hessian(x, model)
    with pytest.raises(TypeError):
        package.CEHessianCalculator(hessian_shape="full").compute_hessian(x, model)
    with pytest.raises((TypeError, AttributeError)):
        package.BCEHessianCalculator().compute_hessian(x, model)
    with pytest.raises((TypeError, AttributeError)):
        ArccosHessianCalculator(method="full")
    mean = nn.utils.parameters_to_vector(model.parameters())
    hessian, prior = torch.ones(model._n_params).double(), torch.ones(()).double()
    with pytest.raises(AttributeError):
        package.optimize_prior_precision(mean, hessian, 1.0)
    assert package.optimize_prior_precision(mean.detach(), hessian, prior) > 0
    assert all(p.grad is None for p in model.parameters())
    package.optimize_prior_precision(mean, hessian, prior)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", JOBS)
def test_posteriors(name):
    package = theirs()
    model, x, j = job(name)
    hessian = package.MSEHessianCalculator().compute_hessian(x, model)
    posterior = package.DiagLaplace()
    mean, variance = posterior.linearized_laplace(x, hessian, model, scale=6.0, prior_prec=2.0)
    scale = 1 / ((6 * hessian + 2).sqrt() + 1e-6)
    close(mean, model(x).detach())
    close(variance, torch.einsum("ncp,p,ncp->n", j, scale, j))
    drawn, _ = posterior.laplace(x, hessian, model, scale=6.0, prior_prec=1e8, n_samples=3)
    close(drawn, mean, atol=1e-2, rtol=0)
    online = package.OnlineDiagLaplace()
    start = online.init_hessian(60, model, "cpu")
    kept = online.average_hessian_samples([start, online.scale(hessian, 6, 60)])
    close(kept, (60 + 10 * hessian) / 2)

"""The variance of rows of the gradient, over passes, batches and files; and the scale of noise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import X, Y, base, pair
from tests.support.fitting import CLASSES, LOADER, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import close


def test_over_all_samples_of_the_with_and_zeros_of_those_that_did_not_reach_it():
    model, loss = pair()
    model.extra = nn.Linear(4, 3).double()
    with nnj.collect("grad_variance", "batch_grad"):
        loss(model(X[:3]), Y[:3]).backward()
        loss(model(X[3:]) + model.extra(X[3:]), Y[3:]).backward()
        loss(model(X[:1]), Y[:1]).backward()
    for p in model.parameters():
        assert close(p.grad_variance, p.batch_grad.var(0, unbiased=False)) == ""
    assert len(model.extra.weight.batch_grad) == 7


def test_terms_by_definition():
    """Under a mean loss the trace of the covariance of a sample's gradient, and what is left of the
    squared norm of the mean one.
    """
    model, loss = pair()
    with nnj.collect("grad_variance", "batch_grad") as context:
        loss(model(X), Y).backward()
    gradients = 6 * torch.cat([p.batch_grad.flatten(1) for p in model.parameters()], 1)
    tr = gradients.mT.cov().trace()
    g2 = gradients.mean(0).square().sum() - tr / 6
    assert close(context.noise_terms, torch.stack([tr, g2])) == ""
    assert float(context.noise_scale) == (tr / g2 if g2 > 0 else torch.inf)


def test_terms_are_unbiased():
    """Over all batches of 3 of 6 samples, the trace is that of all of them, whose mean is known."""
    model, loss = pair()
    with nnj.collect("batch_grad"):
        loss(model(X), Y).backward()
    every = 6 * torch.cat([p.batch_grad.flatten(1) for p in model.parameters()], 1)
    found = []
    for chosen in product(range(6), repeat=3):  # with replacement: independent samples
        with nnj.collect("grad_variance", verify=False) as context:
            loss(model(X[list(chosen)]), Y[list(chosen)]).backward()
        found.append(context.noise_terms)
    tr, g2 = torch.stack(found).mean(0)
    assert close(tr, every.var(0, unbiased=False).sum()) == ""
    assert close(g2, every.mean(0).square().sum()) == ""


def test_one_sample_has_no_terms_and_equal_ones_no_noise():
    model, loss = pair()
    with nnj.collect("grad_variance") as context:
        loss(model(X[:1]), Y[:1]).backward()
    assert bool(context.noise_terms.isnan().all()) and bool(context.noise_scale.isnan())
    assert not bool(model.one.weight.grad_variance.any())
    with nnj.collect("grad_variance") as context:
        loss(model(X[:1].expand(4, -1)), Y[:1].expand(4)).backward()
    assert 0 <= float(context.noise_scale) < 1e-12


class Far(nn.Module):
    """A sum of outputs, nearly the same for each sample."""

    def forward(self, z: Tensor) -> Tensor:
        return (1e3 * z + 0.5 * z.square()).sum()


def test_a_mean_that_dominates_leaves_digits_and_nothing_below_zero():
    """In single precision, where squares of rows have no digit of the variance."""
    model, loss = nn.Linear(4, 3), Far()
    x = 1 + 1e-3 * X.float()
    nnj.extend(model)
    with nnj.collect("grad_variance", "batch_grad"):
        nnj.extend(loss)(model(x)).backward()
    for p in model.parameters():
        rows = p.batch_grad.double()
        expected = rows.var(0, unbiased=False)
        naive = (p.batch_grad.square().mean(0) - p.batch_grad.mean(0).square()).double()
        assert bool((p.grad_variance >= 0).all())
        assert bool(((p.grad_variance.double() - expected).abs() <= 1e-3 * expected).all())
        assert bool(((naive - expected).abs() > 0.1 * expected).any())


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_fits_of_parts_are_one_of_all(scale, tmp_path):
    """Also of parameters that only one part reaches."""
    loss, names = nn.CrossEntropyLoss(), ("grad_variance", "batch_grad")
    whole = nnj.fit(mlp(), loss, [(DATA, CLASSES)], *names, scale=scale)
    by_batches = nnj.fit(mlp(), loss, LOADER, *names, scale=scale)
    fits = [nnj.fit(mlp(), loss, [b], *names, scale=scale) for b in LOADER]
    fits[0].save(tmp_path / "fit")
    merged = nnj.Fit.merge([nnj.Fit.load(tmp_path / "fit"), *fits[1:]])
    for name, g in whole["batch_grad"].items():
        for fit in (whole, by_batches, merged):
            assert close(fit["grad_variance"][name], g.var(0, unbiased=False)) == ""
    rows, n = whole.vector("batch_grad"), len(DATA)
    tr = n**2 * rows.mT.cov().trace()
    terms = torch.stack([tr, rows.sum(0).square().sum() - tr / n])
    for fit in (whole, by_batches, merged):
        assert close(fit.context["noise_terms"], terms) == ""
        assert close(fit.context["noise_scale"], whole.context["noise_scale"]) == ""


def test_a_scale_that_is_finite_does_not_depend_on_that_of_the_loss():
    found = []
    for factor in (1, 7):
        how = lambda m, l, x, y, factor=factor: factor * l(m(x), y)
        model, loss = pair(base(loss=nn.MSELoss))
        with nnj.collect("grad_variance") as context:
            how(model, loss, X, torch.full((6, 3), 9.0).double()).backward()
        found.append(context.noise_scale)
    assert 0 < float(found[0]) < 1e3
    assert close(found[1], found[0]) == ""


def test_parameters_that_no_sample_of_a_fit_reaches_are_zero():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = mlp(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.net(x)

    fit = nnj.fit(Spare(), nn.CrossEntropyLoss(), LOADER, "grad_variance")
    assert not bool(fit["grad_variance"]["spare.weight"].any())
    sizes = sum(p.numel() for p in Spare().parameters())
    assert fit.vector("grad_variance").shape == (sizes,)

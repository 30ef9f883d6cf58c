"""Probabilities of a classifier: each link against its formula, and Monte Carlo as the truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.posterior.links import bridge
from tests.support.posteriors import small

close = torch.testing.assert_close


def posterior(kind: str, prior: float = 2.0, structure: str = "ggn_block") -> tuple:
    case = small(kind)
    return case, nnj.laplace(case.model, case.loss, case.batches, structure, prior=prior)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_probit_of_classes(kind):
    case, post = posterior(kind)
    variance = post.predict_variance(case.x).reshape(case.model(case.x).shape)
    expected = (case.model(case.x).detach() / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
    close(post.predict_proba(case.x), expected)
    close(post.predict_proba(case.x, batch_size=3), expected)


def test_probit_of_two_classes_is_close_to_the_integral():
    """E[sigmoid(f)] by quadrature: MacKay's approximation is good to 0.02."""
    case, post = posterior("binary", prior=0.3)
    mean, covariance = post.predict(case.x)
    z = torch.linspace(-8, 8, 4001).double()
    weight = (-z.square() / 2).exp()
    f = mean + covariance[:, :, 0].sqrt() * z
    integral = (f.sigmoid() * weight).sum(1, keepdim=True) / weight.sum()
    assert (post.predict_proba(case.x) - integral).abs().max() < 0.02
    drawn = post.predict_proba(
        case.x, "mc", samples=20_000, generator=torch.Generator().manual_seed(0)
    )
    assert (drawn - integral).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_monte_carlo_converges_to_the_gaussian_integral(kind):
    """Against draws from the dense covariance by another factorisation of it."""
    case, post = posterior(kind)
    mean, covariance = post.predict(case.x)
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(covariance.shape[1]))
    z = torch.randn(
        (20_000, *mean.shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    f = mean.flatten(1) + (root @ z.flatten(2)[..., None])[..., 0]
    truth = f.reshape(z.shape).softmax(2).mean(0)
    found = [
        post.predict_proba(case.x, "mc", samples=n, generator=torch.Generator().manual_seed(0))
        for n in (200, 5000)
    ]
    few, many = ((p - truth).abs().max() for p in found)
    assert many < 0.03 and few < 0.2
    close(found[1].sum(1), torch.ones_like(found[1].sum(1)))


def test_all_links_agree_where_the_posterior_is_narrow():
    """As the prior's precision grows, every link tends to the softmax of the mean."""
    case, post = posterior("classes", prior=1e8)
    plain = case.model(case.x).detach().softmax(1)
    for link in ("probit", "mc"):
        close(post.predict_proba(case.x, link), plain, atol=1e-3, rtol=0)


def test_the_bridge_is_that_of_its_paper():
    """Alpha and its mean as the paper writes them, of outputs with a sum of zero."""
    torch.manual_seed(0)
    n, classes = 4, 5
    a = torch.randn(n, classes, classes).double()
    covariance = a @ a.mT + 0.1 * torch.eye(classes)
    mean = torch.randn(n, classes).double()
    one = torch.ones(classes).double()
    total = torch.einsum("i,nij,j->n", one, covariance, one)
    row = covariance @ one
    mean_0 = mean - row * (mean.sum(1) / total)[:, None]
    covariance_0 = covariance - row[:, :, None] * row[:, None] / total[:, None, None]
    variance = covariance_0.diagonal(dim1=1, dim2=2)
    inner = 1 - 2 / classes + mean_0.exp() / classes**2 * (-mean_0).exp().sum(1, keepdim=True)
    alpha = inner / variance
    close(bridge(mean[:, None], covariance[:, None])[:, 0], alpha / alpha.sum(1, keepdim=True))


def test_the_bridge_of_large_and_of_sure_outputs_is_finite():
    mean = torch.tensor([[[300.0, -300.0, 0.0]], [[1.0, 2.0, 3.0]]])
    zero = torch.zeros(2, 1, 3, 3)
    found = bridge(mean, zero + torch.eye(3))
    assert torch.isfinite(found).all()
    close(found.sum(-1), torch.ones(2, 1))
    assert torch.isfinite(bridge(mean, zero)).all()


def test_the_bridge_of_tokens_takes_the_classes_of_one_place():
    case, post = posterior("tokens")
    mean, covariance = post.predict(case.x)
    n, classes, places = mean.shape
    blocks = covariance.reshape(n, classes, places, classes, places)
    found = post.predict_proba(case.x, "bridge")
    for place in range(places):
        here = bridge(mean[:, None, :, place], blocks[:, None, :, place, :, place])
        close(found[:, :, place], here[:, 0])


@pytest.mark.parametrize(
    "kind, link, sentence",
    [
        ("regression", "probit", "gaussian has no probabilities"),
        ("binary", "bridge", "whatever the variance"),
        ("classes", "softmax", "link='softmax'"),
    ],
)
def test_refusals(kind, link, sentence):
    case, post = posterior(kind)
    with pytest.raises(nnj.NNJError, match=sentence):
        post.predict_proba(case.x, link)


def test_a_function_whose_likelihood_the_user_names():
    def classes(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    case = small("classes")
    fit = nnj.fit(case.model, classes, case.batches, "kfac", reduction="sum")
    with pytest.raises(nnj.NNJError, match="as written has no probabilities"):
        nnj.laplace(fit).predict_proba(case.x)
    named = nnj.laplace(fit, likelihood="categorical")
    usual = nnj.laplace(case.model, case.loss, case.batches, "kfac")
    close(named.predict_proba(case.x), usual.predict_proba(case.x))
    close(named.log_marginal_likelihood(), usual.log_marginal_likelihood())
    with pytest.raises(nnj.NNJError, match="likelihood='softmax'"):
        nnj.laplace(fit, likelihood="softmax")

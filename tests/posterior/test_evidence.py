"""The marginal likelihood against dense formulas and others' numbers; where it is stationary."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import nnj
from tests.support.posteriors import KINDS, STRUCTURES, small, theta

close = torch.testing.assert_close


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_marginal_likelihood(kind, structure):
    case, prior, noise = small(kind), 0.6, 1.0
    post = nnj.laplace(case.model, case.loss, case.batches, structure, prior=prior)
    output, w = case.model(case.x).detach(), theta(case.model)
    if post.likelihood == "gaussian":
        noise = 0.4
        likelihood = torch.distributions.Normal(output, math.sqrt(noise)).log_prob(case.y).sum()
    elif post.likelihood == "bernoulli":
        likelihood = torch.distributions.Bernoulli(logits=output).log_prob(case.y).sum()
    else:
        logits = output.movedim(1, -1)
        likelihood = torch.distributions.Categorical(logits=logits).log_prob(case.y).sum()
    scale = 1 / (2 * noise) if post.likelihood == "gaussian" else 1.0
    raw = nnj.fit(case.model, case.loss, case.batches, structure).matrix(structure).dense() * scale
    eye = torch.eye(len(raw), dtype=torch.float64)
    determinants = torch.linalg.slogdet(raw + prior * eye)[1] - len(raw) * math.log(prior)
    expected = likelihood - (prior * w @ w + determinants) / 2
    close(post.log_marginal_likelihood(noise=noise), expected)
    close(post.log_marginal_likelihood(prior={"": prior}, noise=noise), expected)


def slopes(post: nnj.Laplace) -> list[float]:
    """d log p(D) / d log delta of each precision, and of the noise, by central differences."""
    step, found = 1e-4, []
    prior = post.prior
    names = list(prior) if isinstance(prior, dict) else [None]
    for name in names:
        values = []
        for sign in (1, -1):
            factor = math.exp(sign * step)
            other = prior * factor if name is None else {**prior, name: prior[name] * factor}
            values.append(float(post.log_marginal_likelihood(other)))
        found.append((values[0] - values[1]) / (2 * step))
    if post.likelihood == "gaussian":
        up, down = (
            float(post.log_marginal_likelihood(noise=post.noise * math.exp(s)))
            for s in (step, -step)
        )
        found.append((up - down) / (2 * step))
    return found


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["classes", "binary", "regression", "several outputs"])
def test_where_it_is_stationary(kind, structure, per_module):
    case = small(kind)
    post = nnj.laplace(case.model, case.loss, case.batches, structure, prior=0.01, noise=1.0)
    before = float(post.log_marginal_likelihood())
    reached = post.tune_evidence(per_module=per_module)
    assert reached > before
    assert reached == pytest.approx(float(post.log_marginal_likelihood()))
    assert isinstance(post.prior, dict) == per_module
    assert max(map(abs, slopes(post))) < 1e-3
    if not per_module:  # no better one on a grid
        grid = [10.0 ** (k / 4) for k in range(-12, 17)]
        assert max(float(post.log_marginal_likelihood(p)) for p in grid) <= reached + 1e-9


def test_an_empirical_fisher_is_tuned_by_its_own_degree():
    case = small("regression")
    post = nnj.laplace(case.model, case.loss, case.batches, "kfac", fisher="empirical")
    post.tune_evidence()
    assert max(map(abs, slopes(post))) < 1e-3


def test_of_a_linear_model_it_is_the_evidence_of_bayesian_regression():
    """log N(y; 0, noise I + X X^T / delta), without any approximation, at the posterior's mean."""
    torch.manual_seed(0)
    x, delta, noise = torch.randn(12, 3).double(), 0.8, 0.3
    y = x @ torch.randn(3, 1).double() + 0.5 * torch.randn(12, 1).double()
    model = nn.Linear(3, 1, bias=False).double()
    precision = x.mT @ x / noise + delta * torch.eye(3).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(precision, x.mT @ y / noise).mT)
    post = nnj.laplace(model, nn.MSELoss(), [(x, y)], "ggn", prior=delta, noise=noise)
    covariance = noise * torch.eye(12).double() + x @ x.mT / delta
    exact = torch.distributions.MultivariateNormal(torch.zeros(12).double(), covariance)
    close(post.log_marginal_likelihood(), exact.log_prob(y[:, 0]))
    at = torch.randn(4, 3).double()
    close(post.predict(at).covariance[:, 0, 0], (at @ precision.inverse() * at).sum(1))


def test_parameters_that_the_evidence_would_do_without():
    case = small("classes")
    with torch.no_grad():
        for p in case.model.parameters():
            p.zero_()
    post = nnj.laplace(case.model, case.loss, case.batches, "ggn_diag")
    with pytest.warns(UserWarning, match="grows with the precision of the prior without end"):
        post.tune_evidence()
    assert post.prior == 1e12


def test_a_model_without_error_has_no_noise_to_tune():
    case = small("regression")
    data = [(case.x, case.model(case.x).detach())]
    post = nnj.laplace(case.model, case.loss, data, "kfac")
    with pytest.raises(nnj.NNJError, match="no error on its data"):
        post.tune_evidence()


def test_a_prior_of_held_out_data():
    """The best of a grid, by the probit link or the predictive density written out."""
    for kind in ("classes", "binary", "regression", "tokens"):
        case = small(kind)
        post = nnj.laplace(case.model, case.loss, case.batches, "ggn_block")
        held_out = [(case.x[:5].flip(0), case.y[:5]), (case.x[5:], case.y[5:])]
        grid = [0.01, 0.1, 1.0, 10.0, {"": 100.0}]
        found = post.tune_heldout(held_out, grid)
        expected = {}
        for prior, key in zip(grid, found, strict=True):
            other = nnj.laplace(case.model, case.loss, case.batches, "ggn_block", prior=prior)
            x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
            mean, covariance = other.predict(x)
            variance = covariance.diagonal(dim1=1, dim2=2).reshape(mean.shape)
            if kind == "regression":
                normal = torch.distributions.Normal(mean, (variance + 1).sqrt())
                value = -normal.log_prob(y).mean()
            else:
                p = other.predict_proba(x)
                if kind == "binary":
                    value = nn.functional.binary_cross_entropy(p, y)
                else:
                    value = nn.functional.nll_loss(p.log(), y)
            expected[key] = float(value)
        assert found == pytest.approx(expected, rel=1e-9)
        best = min(expected, key=expected.__getitem__)
        assert post.prior == (dict(best) if isinstance(best, tuple) else best)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_targets_that_would_be_broadcast(kind):
    case = small(kind)
    post = nnj.laplace(case.model, case.loss, case.batches, "ggn_diag")
    with pytest.raises(nnj.NNJError, match=r"have shape \(14, 1\) and the targets \(14,\)"):
        post.tune_heldout([(case.x, case.y[:, 0])])


def test_ignored_targets_have_no_part():
    case = small("tokens")
    y = case.y.clone()
    y[:, 0] = -100
    post = nnj.laplace(case.model, case.loss, [(case.x, y)], "ggn_diag")
    found = post.tune_heldout([(case.x, y)], [1.0])[1.0]
    p = post.predict_proba(case.x)
    assert found == pytest.approx(float(nn.functional.nll_loss(p.log(), y)), rel=1e-9)
    assert post._evidence.terms == 7 * 3


def test_laplace_torch_has_the_same_marginal_likelihood():
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    from torch.utils.data import DataLoader, TensorDataset

    for kind, likelihood in (("classes", "classification"), ("several outputs", "regression")):
        case = small(kind)
        theirs = laplace.Laplace(
            case.model,
            likelihood,
            subset_of_weights="all",
            hessian_structure="full",
            backend=laplace.curvature.CurvlinopsGGN,
            prior_precision=0.7,
            sigma_noise=0.6 if likelihood == "regression" else 1.0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.fit(DataLoader(TensorDataset(case.x, case.y), 4))
        noise = 0.36 if likelihood == "regression" else 1.0
        post = nnj.laplace(case.model, case.loss, case.batches, "ggn", prior=0.7, noise=noise)
        value = float(theirs.log_marginal_likelihood().detach())
        assert float(post.log_marginal_likelihood()) == pytest.approx(value, rel=1e-5)

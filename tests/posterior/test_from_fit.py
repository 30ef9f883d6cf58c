"""What nnj.laplace takes, and what of a fit it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.posteriors import small

close = torch.testing.assert_close


def test_a_fit_that_has_one_curvature_needs_no_name():
    case = small("classes")
    several = nnj.fit(case.model, case.loss, case.batches, "kfac", "batch_grad")
    assert "BlockDiagonal" in repr(nnj.laplace(several))
    both = nnj.fit(case.model, case.loss, case.batches, "kfac", "ggn_diag")
    with pytest.raises(nnj.NNJError, match="say which is the curvature"):
        nnj.laplace(both)
    assert "Diagonal(" in repr(nnj.laplace(both, "ggn_diag"))


def test_a_fit_from_a_file(tmp_path):
    case = small("regression")
    fit = nnj.fit(case.model, case.loss, case.batches, "kfac")
    fit.save(tmp_path / "fit.pt")
    loaded = nnj.Fit.load(tmp_path / "fit.pt")
    assert (loaded.likelihood, loaded.terms) == ("gaussian", 14) and loaded.origin is None
    with pytest.raises(nnj.NNJError, match="knows no model"):
        nnj.laplace(loaded)
    post = nnj.laplace(loaded, model=case.model, noise=0.2)
    close(post.predict(case.x), nnj.laplace(fit, noise=0.2).predict(case.x))
    with pytest.raises(nnj.NNJError, match="of another model"):
        nnj.laplace(loaded, model=nn.Linear(2, 2))


def test_fits_of_parts():
    case = small("several outputs")
    parts = [nnj.fit(case.model, case.loss, [batch], "kfac") for batch in case.batches]
    merged = nnj.laplace(nnj.Fit.merge(parts), noise=0.5)
    whole = nnj.laplace(case.model, case.loss, case.batches, "kfac", noise=0.5)
    close(merged.log_marginal_likelihood(), whole.log_marginal_likelihood())
    close(merged.predict(case.x), whole.predict(case.x))


def test_a_quantity_of_a_stranger():
    from nnj.matrices import Diagonal

    class Twice(nnj.Quantity):
        name = "twice"
        degree = 1

        def parameter(self, factor, total_columns):
            return 2 * factor.square_sum()

        def matrix(self, result, shapes):
            return Diagonal(shapes, result.flatten())

    case = small("classes")
    post = nnj.laplace(case.model, case.loss, case.batches, Twice())
    usual = nnj.laplace(case.model, case.loss, case.batches, "ggn_diag")
    close(post.matrix().diagonal(), 2 * usual.matrix().diagonal())


def test_a_loss_as_it_is_written():
    """A Gaussian of given variances, as a function: its value and its curvature, summed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 1).double()

    def precise(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        var = output.new_full(output.shape, 0.3)
        return nn.functional.gaussian_nll_loss(output, target, var, full=True, reduction="sum")

    fit = nnj.fit(model, precise, [(x, y)], "kfac", reduction="sum")
    post = nnj.laplace(fit, prior=0.5)
    assert post.likelihood == "as written" and fit.terms == 9
    named = nnj.laplace(model, nn.MSELoss(), [(x, y)], "kfac", prior=0.5, noise=0.3)
    close(post.log_marginal_likelihood(), named.log_marginal_likelihood())
    close(post.predict(x), named.predict(x))
    with pytest.raises(nnj.NNJError, match="nobody knows the predictive distribution"):
        post.tune_heldout([(x, y)])


REFUSED = {
    "another thing": (lambda c, f: nnj.laplace(3), "takes a nnj.Fit or a model"),
    "too few": (lambda c, f: nnj.laplace(c.model, c.loss), "got 1 arguments behind the model"),
    "options of a fit": (lambda c, f: nnj.laplace(f, tol=0.1), "Say them to nnj.fit"),
    "a quantity that is no matrix": (
        lambda c, f: nnj.laplace(c.model, c.loss, c.batches, "batch_grad"),
        "batch_grad",
    ),
    "one that was not fitted": (lambda c, f: nnj.laplace(f, "ekfac"), "'ekfac' was not fitted"),
    "of no degree": (
        lambda c, f: nnj.laplace(c.model, c.loss, c.batches, "kfac", fisher="forward"),
        "does not grow with the loss",
    ),
    "a name that is none": (lambda c, f: nnj.laplace(f, 3), "expected a name"),
    "noise": (lambda c, f: nnj.laplace(f, noise=0), "above 0"),
    "a prior": (lambda c, f: nnj.laplace(f, prior="1"), "a number that is not negative"),
    "a mean of another length": (
        lambda c, f: nnj.laplace(f, prior_mean=torch.zeros(3)),
        r"prior_mean has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("ask, sentence", REFUSED.values(), ids=REFUSED)
def test_refusals(ask, sentence):
    case = small("classes")
    fit = nnj.fit(case.model, case.loss, case.batches, "kfac")
    with pytest.raises(nnj.NNJError, match=sentence):
        ask(case, fit)

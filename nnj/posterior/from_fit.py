"""nnj.laplace: a Laplace posterior of a fit, or of a model, a loss and a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from nnj.collecting.fit import fit as fit_data
from nnj.collecting.fit_result import Fit, Origin
from nnj.collecting.quantity import Quantity
from nnj.errors import NNJError
from nnj.matrices.layout import Damping
from nnj.matrices.matrix import Matrix
from nnj.posterior.evidence import Evidence
from nnj.posterior.inputs import Forwarding
from nnj.posterior.laplace import Laplace
from nnj.posterior.likelihood import likelihood_of
from nnj.posterior.weights import flat, parameters_of


def laplace(
    fitted: Fit | nn.Module,
    *given: Any,
    prior: Damping = 1.0,
    noise: float = 1.0,
    prior_mean: float | Tensor = 0.0,
    likelihood: str | None = None,
    model: nn.Module | None = None,
    forward: Forwarding | None = None,
    target: str | Callable[[Any], Any] | None = None,
    **options: Any,
) -> Laplace:
    """A Gaussian posterior over the parameters at which a model was fitted.

    >>> post = nnj.laplace(model, torch.nn.CrossEntropyLoss(), loader, "kfac", prior=1.0)
    >>> post.tune_evidence()
    >>> probabilities = post.predict_proba(x)

    or of a fit that was made before, `nnj.laplace(fit, prior=1.0)`.

    The loss names the likelihood, and its reduction is ignored: cross entropy is categorical,
    `BCEWithLogitsLoss` Bernoulli, `MSELoss` Gaussian with the variance `noise` (its curvature is
    then divided by twice that). Any other loss is the negative log likelihood as it is written,
    summed over the data (`GaussianNLLLoss` of given variances; where the model gives them, too, it
    is not convex, and refused as by `nnj.collect`).

    Args:
        fitted: a `nnj.Fit`, or a model. A model is followed by a loss and a loader, as `nnj.fit`
            takes them.
        given: at last the quantity whose matrix is M: "ggn_diag", "kfac", "ekfac", "ggn_block",
            "ggn", or another that is a matrix. May be left out where a fit has one such.
        prior: delta, the precision of the prior: a number, or {name of module: number}, where a
            name speaks for all that is below it.
        noise: the variance of the targets under a Gaussian likelihood, and only there.
        prior_mean: a number, or (P,).
        likelihood: "categorical", "bernoulli", "gaussian" or "as written", where the loss does not
            say it, as a function does not.
        model: of a fit that was read from a file.
        forward, target: as of `nnj.fit`, for batches of its data and of predictions alike; by
            default those with which a fit was made.
        options: of `nnj.fit`, such as `modules=[model.head]` for a posterior of the last layer
            alone, with all other parameters as they are.

    Errors: `NNJError` for a fit without a model, of parameters that were changed since, of a
    quantity that is no curvature of the loss, and whatever `nnj.fit` refuses."""
    if isinstance(fitted, nn.Module):
        data = given[:2]
        if len(given) != 3:
            raise NNJError(
                f"nnj.laplace(model, loss, loader, quantity) got {len(given)} arguments behind the "
                "model. Or give a nnj.Fit alone"
            )
        given, options = given[2:], {"forward": forward, "target": target, **options}
        fitted = fit_data(fitted, *data, *given, **options)
    elif not isinstance(fitted, Fit):
        raise NNJError(f"nnj.laplace takes a nnj.Fit or a model, not {type(fitted).__name__}")
    elif options:
        raise NNJError(
            f"{', '.join(options)}: options of a fit, and this one is made. Say them to nnj.fit"
        )
    origin = _origin(fitted, model)
    model, forward, target = origin.model, forward or origin.forward, target or origin.target
    quantity = _quantity_of(fitted, given)
    curvature = _curvature_of_sum(fitted, quantity)
    kind = likelihood_of(fitted.likelihood if likelihood is None else likelihood)
    parameters = parameters_of(model, curvature.layout.shapes)
    at = flat(parameters)
    if isinstance(prior_mean, Tensor) and prior_mean.shape not in ((), at.shape):
        raise NNJError(
            f"prior_mean has shape {tuple(prior_mean.shape)}, expected a number, or {(len(at),)}"
        )
    evidence = Evidence(
        curvature,
        int(fitted._quantity(quantity).degree or 0),
        at - prior_mean,
        kind,
        fitted.loss_value * fitted.total,
        fitted.terms,
    )
    return Laplace(model, parameters, evidence, prior, noise, forward, target)


def _origin(fit: Fit, model: nn.Module | None) -> Origin:
    """The model that was fitted. Errors: `NNJError` for none, or one that was trained on."""
    origin = fit.origin
    if origin is None or model not in (None, origin.model):
        if model is None:
            raise NNJError("a fit from a file knows no model. Say nnj.laplace(fit, model=model)")
        return Origin(model, None, None, [])
    if any(p._version != version for p, version in origin.versions):
        raise NNJError(
            "the parameters of the model were changed since the fit, whose curvature is that of "
            "the former ones. Fit again"
        )
    return origin


def _quantity_of(fit: Fit, given: Sequence[Any]) -> str:
    """The name of the quantity of which M is made."""
    if len(given) > 1 or not all(isinstance(q, (str, Quantity)) for q in given):
        raise NNJError(f"nnj.laplace(fit, quantity) got {given!r} behind the fit, expected a name")
    if given:
        return given[0] if isinstance(given[0], str) else str(given[0].name)
    usual = ("ggn_diag", "kfac", "ekfac", "ggn_block", "ggn")
    there = [name for name in usual if name in fit]
    if len(there) != 1 and len(fit) != 1:
        raise NNJError(
            f"the fit has {', '.join(fit)}: say which is the curvature, nnj.laplace(fit, name)"
        )
    return there[0] if there else next(iter(fit))


def _curvature_of_sum(fit: Fit, name: str) -> Matrix:
    """The matrix of a quantity of the summed loss. Errors: `NNJError` if it is none of the loss."""
    quantity = fit._quantity(name)
    if not quantity.degree:
        raise NNJError(
            f"{name} does not grow with the loss, so it is no curvature of a likelihood. Fit "
            "another quantity, or kfac with another fisher="
        )
    matrix = fit.matrix(name)
    return matrix if fit.total == 1 else matrix * float(fit.total**quantity.degree)

"""p(y | f): which likelihood a loss is the negative logarithm of.

The sum of squared errors is that of a Gaussian but for its variance: log N(y; f, s) is
-(y - f)^2 / (2 s) - log(2 pi s) / 2 for each entry, so its curvature is 1 / (2 s) times that of
`torch.nn.MSELoss`. A likelihood of another kind is what the loss says, summed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from nnj.errors import NNJError

IGNORED = -100  # torch's default of a class that has no part


class Likelihood:
    """exp(-loss), as the loss is written, of which no prediction is known."""

    name = "as written"
    has_noise = False

    def scale(self, noise: float) -> float:
        """What makes the negative log likelihood of the summed loss, but for a constant."""
        return 1.0

    def log_likelihood(self, summed: float, terms: float, noise: float) -> float:
        """Of a data set.

        Args:
            summed: the summed loss.
            terms: how many entries it is summed over.
        """
        return -summed

    def held_out(self, mean: Tensor, variance: Tensor, y: Tensor, noise: float) -> Tensor:
        """-log of the predictive density of each target, from Gaussian outputs: to be averaged.

        Args:
            mean, variance: of the outputs, (N, *outputs).
        """
        raise NNJError(
            "nobody knows the predictive distribution of this loss. Say likelihood='categorical', "
            "'bernoulli' or 'gaussian', or choose the prior by tune_evidence"
        )


class Categorical(Likelihood):
    """softmax(f) along axis 1 of the outputs."""

    name = "categorical"

    @override
    def held_out(self, mean: Tensor, variance: Tensor, y: Tensor, noise: float) -> Tensor:
        logits = damped_logits(mean, variance)
        if y.is_floating_point():
            return F.cross_entropy(logits, y, reduction="none").flatten()
        found = F.cross_entropy(logits, y.long(), reduction="none", ignore_index=IGNORED)
        return found[y != IGNORED]


class Bernoulli(Likelihood):
    """sigmoid(f), entry by entry."""

    name = "bernoulli"

    @override
    def held_out(self, mean: Tensor, variance: Tensor, y: Tensor, noise: float) -> Tensor:
        _check_targets(mean, y)
        logits = damped_logits(mean, variance)
        return F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="none").flatten()


class Gaussian(Likelihood):
    """N(f, noise), entry by entry."""

    name = "gaussian"
    has_noise = True

    @override
    def scale(self, noise: float) -> float:
        return 1 / (2 * noise)

    @override
    def log_likelihood(self, summed: float, terms: float, noise: float) -> float:
        return -summed / (2 * noise) - terms / 2 * math.log(2 * math.pi * noise)

    @override
    def held_out(self, mean: Tensor, variance: Tensor, y: Tensor, noise: float) -> Tensor:
        _check_targets(mean, y)
        total = variance + noise
        return ((y - mean).square() / total + (2 * math.pi * total).log()).flatten() / 2


LIKELIHOODS: dict[str, Likelihood] = {
    kind.name: kind for kind in (Categorical(), Bernoulli(), Gaussian(), Likelihood())
}


def likelihood_of(name: str) -> Likelihood:
    """By its name; "" is a loss as it is written. Errors: `NNJError` for one that there is not."""
    name = name or Likelihood.name
    if name not in LIKELIHOODS:
        raise NNJError(f"likelihood={name!r}, expected one of {', '.join(map(repr, LIKELIHOODS))}")
    return LIKELIHOODS[name]


def _check_targets(mean: Tensor, y: Tensor) -> None:
    """Errors: `NNJError` for targets that torch would broadcast."""
    if mean.shape != y.shape:
        raise NNJError(
            f"the outputs have shape {tuple(mean.shape)} and the targets {tuple(y.shape)}. Give "
            "both the same, as nnj.fit wants them"
        )


def damped_logits(mean: Tensor, variance: Tensor) -> Tensor:
    """f / sqrt(1 + pi/8 var f): the probit approximation of the expected sigmoid (MacKay 1992, The
    evidence framework applied to classification networks), for each class of a softmax alike.
    """
    return mean / torch.sqrt(1 + math.pi / 8 * variance)

"""E[softmax(f)] and E[sigmoid(f)] of Gaussian outputs f: what a classifier predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.matrices.spectrum import eigen
from nnj.posterior.likelihood import damped_logits


def probit(mean: Tensor, variance: Tensor, binary: bool) -> Tensor:
    """By `damped_logits`: the variances alone.

    Args:
        mean, variance: (N, *outputs), with the classes of a softmax in axis 1.
        binary: whether each entry is a sigmoid's.
    """
    logits = damped_logits(mean, variance)
    return logits.sigmoid() if binary else logits.softmax(1)


def monte_carlo_binary(
    mean: Tensor, variance: Tensor, samples: int, generator: torch.Generator | None
) -> Tensor:
    """The mean over draws of each entry by itself."""
    z = _normal((samples, *mean.shape), mean, generator)
    return (mean + variance.sqrt() * z).sigmoid().mean(0)


def monte_carlo(
    mean: Tensor, covariance: Tensor, samples: int, generator: torch.Generator | None
) -> Tensor:
    """The mean over draws from N(f, covariance) of their softmax.

    Args:
        mean: (N, L, C), at each of L places.
        covariance: (N, L, C, C), of the classes at one place.
    """
    values, vectors = eigen(covariance)
    root = vectors * values.sqrt()[..., None, :]
    total = torch.zeros_like(mean)
    for _ in range(samples):  # one by one: C may be large
        z = _normal(mean.shape, mean, generator)
        total += (mean + (root @ z[..., None])[..., 0]).softmax(-1)
    return total / samples


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """The mean of the Dirichlet distribution that the Laplace bridge makes of N(f, covariance):
    Hobbhahn, Kristiadi and Hennig (2022), Fast predictive uncertainty for classification with
    Bayesian deep networks, equation 7, of outputs that are first conditioned on a sum of zero.

    Args:
        mean, covariance: as of `monte_carlo`.
    """
    classes = mean.shape[-1]
    row = covariance.sum(-1)
    total = row.sum(-1, keepdim=True)
    tiny = torch.finfo(mean.dtype).tiny
    # a covariance of zero leaves no sum to condition on, but the sum of the mean
    share = torch.where(total > 0, row / total.clamp(min=tiny), torch.full_like(row, 1 / classes))
    mean = mean - share * mean.sum(-1, keepdim=True)
    variance = covariance.diagonal(dim1=-2, dim2=-1) - share * row
    # alpha but for a factor, which the mean of a Dirichlet distribution does not see
    high = mean.max(-1, keepdim=True).values
    low = mean.min(-1, keepdim=True).values
    summed = (low - mean).exp().sum(-1, keepdim=True)
    # e^f sum e^-f / C^2, without a factor e^(high - low)
    ratio = (mean - high).exp() * summed / classes**2
    alpha = (1 - 2 / classes) * (low - high).exp() + ratio
    least = variance.amax(-1, keepdim=True) * torch.finfo(mean.dtype).eps
    alpha = alpha / torch.maximum(variance, least.clamp(min=tiny))
    return alpha / alpha.sum(-1, keepdim=True)


def places_first(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (N, C, *places) as (N, L, C), and of their covariance (N, C L, C L) what is between
    classes at one place, (N, L, C, C).
    """
    n, classes = mean.shape[:2]
    flat = mean.reshape(n, classes, -1)
    between = covariance.reshape(n, classes, flat.shape[2], classes, flat.shape[2])
    return flat.mT, between.diagonal(dim1=2, dim2=4).movedim(-1, 1)


def check_link(link: str, binary: bool) -> None:
    """Errors: `NNJError` for a link that there is not, or that says nothing of a sigmoid."""
    if link not in ("probit", "mc", "bridge"):
        raise NNJError(f"link={link!r}, expected 'probit', 'mc' or 'bridge'")
    if link == "bridge" and binary:
        raise NNJError(
            "link='bridge' of two classes is the sigmoid of the mean, whatever the variance. Use "
            "'probit' or 'mc'"
        )


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)

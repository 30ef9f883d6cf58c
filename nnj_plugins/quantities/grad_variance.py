"""The variance of the samples' gradients, and the scale of gradient noise that follows from it.

M2 of two groups of n_a and n_b rows with the means a and b is M2_a + M2_b
+ (a - b)^2 n_a n_b / (n_a + n_b)   (Chan, Golub and LeVeque 1983)
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

import nnj

# count: of rows; mean: of them, (*p); m2: the sum of squared distances from it, (*p)
Moments: TypeAlias = dict[str, Any]


class GradVariance(nnj.Quantity):
    """`p.grad_variance`, of the shape of p: `p.batch_grad.var(0, unbiased=False)` over all samples
    of the `with`, without the rows.

    Rows are those of `batch_grad`: with a mean reduction each holds the factor 1 / N, and a
    variance 1 / N^2. Samples that did not reach the parameter have rows of zeros. Of several
    backward passes it is the variance over the samples of all of them, not the sum.

    `context.noise_terms`, (2,), are tr = N^2 N / (N - 1) sum(grad_variance), the sum over all
    parameters at which is collected, and g2 = |sum of rows|^2 - tr / N: under a mean loss unbiased
    estimates of the trace of the covariance of one sample's gradient, and of the squared norm of
    the expected gradient (McCandlish et al. 2018, appendix A). Average both over steps, and divide
    then; NaN for a single sample. `context.noise_scale`, (), is tr / g2 of these samples alone, the
    "simple noise scale"; infinite where g2 <= 0.

    Within a pass it is the mean square less the squared mean, never below zero. The sums are taken
    in float64, so that it is as precise as float32 rows are; in float64, rows whose mean is 10^4
    times their deviation leave 8 digits.

    Errors: `NNJError` for two losses of the same samples in one backward pass, whose gradients add
    up before they are squared."""

    source = "gradient"
    degree = 2
    quadratic = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Moments:
        wide, n = factor.to(_widest(factor.device)), factor.n
        ones = torch.ones(1, n, dtype=wide.dtype, device=factor.device)
        mean = wide.rmatvec(ones) / max(n, 1)
        m2 = torch.zeros_like(mean)
        if n > 1:
            m2 = (wide.square_sum() - n * mean.square()).clamp(min=0)
        return {"count": n, "mean": mean.to(factor.dtype), "m2": m2.to(factor.dtype)}

    @override
    def merge(self, one: Moments, other: Moments) -> Moments:
        a, b = one["count"], other["count"]
        share = b / max(a + b, 1)
        step = other["mean"] - one["mean"]
        return {
            "count": a + b,
            "mean": one["mean"] + share * step,
            "m2": one["m2"] + other["m2"] + a * share * step.square(),
        }

    @override
    def finish(self, state: Moments, samples: int) -> Tensor:
        found: Tensor = self._of_all(state, samples)["m2"] / max(samples, 1)
        return found

    def _of_all(self, state: Moments, samples: int) -> Moments:
        """With rows of zeros for the samples that did not reach the parameter."""
        zeros = torch.zeros_like(state["mean"])
        return self.merge(state, {"count": samples - state["count"], "mean": zeros, "m2": zeros})

    @override
    def totals(self, states: Mapping[Any, Moments], samples: int) -> dict[str, tuple[Tensor, int]]:
        if not states:
            return {}
        n, every = samples, [self._of_all(state, samples) for state in states.values()]
        spread = _sum([state["m2"].sum() for state in every]) / max(n, 1)
        size = _sum([(n * state["mean"]).square().sum() for state in every])
        tr = n**2 * (n / (n - 1) if n > 1 else math.nan) * spread
        g2 = size - tr / max(n, 1)
        scale = torch.where(g2 <= 0, math.inf, tr / g2)
        return {"noise_terms": (torch.stack([tr, g2]), self.degree), "noise_scale": (scale, 0)}


def _widest(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sum(terms: list[Tensor]) -> Tensor:
    total: Tensor = functools.reduce(operator.add, (t.to(terms[0].device) for t in terms))
    return total


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("grad_variance", GradVariance)

"""The variance of the gradient over samples, and the noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

import nnj


class GradVariance(nnj.Quantity):
    """`p.grad_variance`, of the shape of p: `batch_grad.var(0, unbiased=False)` over all samples of
    the `with`, of which no row is formed; and two results on the context.

    `context.noise_terms` = (tr, g2), with N samples in all: tr = N^2 N / (N - 1) times the sum of
    all variances, and g2 = |sum of the rows|^2 - tr / N. Of a loss that is the mean over one batch
    they are without bias for the trace of the covariance of one sample's gradient, and for the
    squared norm of the true gradient (McCandlish et al. 2018, appendix A). Average them over steps,
    each apart, before you divide. `context.noise_scale` is tr / g2 of this `with` alone, inf where
    g2 is not above zero. With one sample they are nan.

    Degree 2 (noise_scale: 0). Variances are made of two moments: where the mean is larger than the
    deviation by a factor f, f**2 times the rounding of the dtype is lost.

    Errors: `NNJError` for two losses of the same samples in one backward pass."""

    source = "gradient"
    degree = 2
    quadratic = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Any:
        n = factor.n
        ones = torch.ones(factor.k, n, dtype=factor.dtype, device=factor.device)
        mean = factor.rmatvec(ones) / max(n, 1)
        about = (factor.square_sum() - n * mean.square()).clamp(min=0)
        return {"n": n, "mean": mean, "about": about}  # the sum of squares about the mean

    @override
    def merge(self, one: Any, other: Any) -> Any:
        """Of two sets of samples (Chan et al. 1983)."""
        n = one["n"] + other["n"]
        apart, part = other["mean"] - one["mean"], other["n"] / max(n, 1)
        return {
            "n": n,
            "mean": one["mean"] + part * apart,
            "about": one["about"] + other["about"] + one["n"] * part * apart.square(),
        }

    @override
    def finish(self, state: Any, samples: int) -> Tensor:
        variance: Tensor = self._all(state, samples)["about"] / max(samples, 1)
        return variance

    def _all(self, state: Any, samples: int) -> Any:
        """With the rows of zeros of samples that did not reach the place."""
        zero = torch.zeros_like(state["mean"])
        return self.merge(state, {"n": samples - state["n"], "mean": zero, "about": zero})

    @override
    def totals(self, states: Mapping[Any, Any], samples: int) -> dict[str, tuple[Tensor, int]]:
        if not states:
            return {}
        n, every = samples, [self._all(state, samples) for state in states.values()]
        variance = torch.stack([state["about"].sum() for state in every]).sum() / n
        mean = torch.stack([state["mean"].square().sum() for state in every]).sum()
        tr = variance * n**3 / (n - 1) if n > 1 else variance * math.nan
        g2 = n**2 * mean - tr / n
        scale = torch.where(g2 <= 0, math.inf, tr / g2)
        return {"noise_terms": (torch.stack([tr, g2]), 2), "noise_scale": (scale, 0)}


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("grad_variance", GradVariance)

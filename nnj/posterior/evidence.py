"""log p(D) by Laplace's method, and the precision of the prior and the noise at which it is
stationary.

With M the curvature of -log p(D | w) at the mean w0, and the prior N(mu, 1 / delta),

    log p(D) = log p(D | w0) - (w0 - mu)^T delta (w0 - mu) / 2 - log det (M + delta) / 2
               + log det delta / 2,

in which the powers of 2 pi cancel (MacKay 1992, A practical Bayesian framework for backpropagation
networks). Its derivatives are those of *effective parameters*: gamma = P - delta tr (M + delta)^-1
of a group of P parameters with one precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nnj.errors import NNJError
from nnj.matrices.layout import Damping, Layout
from nnj.matrices.matrix import Matrix
from nnj.posterior.likelihood import Likelihood

STEPS = 1000
STATIONARY = 1e-6  # of the derivative in log delta, for each effective parameter
LARGEST = 1e12  # of a precision: beyond it nothing is left of the parameters


@dataclass(frozen=True)
class Evidence:
    """All that log p(D) is made of.

    Args:
        curvature: of the summed loss.
        degree: how the curvature grows with the loss.
        offset: w0 - mu, (P,).
        summed, terms: the summed loss, and of how many entries.
    """

    curvature: Matrix
    degree: int
    offset: Tensor
    likelihood: Likelihood
    summed: float
    terms: float

    def matrix(self, noise: float) -> Matrix:
        """M, the curvature of -log p(D | w)."""
        c: float = self.likelihood.scale(noise) ** self.degree
        return self.curvature if c == 1 else self.curvature * c

    def log(self, prior: Damping, noise: float) -> Tensor:
        """log p(D), ().

        Errors: `NNJError` for a prior that is no distribution.
        """
        layout = self.curvature.layout
        delta = layout.damping(prior)
        if min(delta.values(), default=1.0) <= 0:
            raise NNJError(
                "a prior of precision 0 is no distribution, so there is no marginal likelihood. "
                "Give a precision above 0 to every parameter"
            )
        of_prior = sum(layout.sizes[name] * math.log(d) for name, d in delta.items())
        squares = self.squares()
        scatter = sum(d * squares[name] for name, d in delta.items())
        determinant = self.matrix(noise).logdet(prior)
        fit = self.likelihood.log_likelihood(self.summed, self.terms, noise)
        return fit - (scatter + determinant - of_prior) / 2

    def squares(self) -> dict[str, float]:
        """|w0 - mu|^2 of each parameter."""
        parts = self.curvature.layout.split(self.offset[:, None])
        return {name: float(t.double().square().sum()) for name, t in parts.items()}

    def traces(self, prior: Damping, noise: float) -> dict[str, float]:
        """tr (M + delta)^-1 in each parameter."""
        diagonal = self.matrix(noise).inverse(prior).diagonal()
        parts = self.curvature.layout.split(diagonal[:, None])
        return {name: float(t.double().sum()) for name, t in parts.items()}


class Tuned(NamedTuple):
    """Where the evidence is stationary."""

    prior: Damping
    noise: float
    log: float


@dataclass
class _At:
    """A point of the search: a precision for each group, and the noise."""

    deltas: dict[str, float]
    noise: float
    log: float


def tuned(evidence: Evidence, prior: Damping, noise: float) -> Tuned:
    """The precisions, one for each name in `prior` or one for all, and the noise where the
    likelihood has one, by MacKay's fixed point: delta = gamma / |w0 - mu|^2, noise = squared errors
    / (terms - gamma). Where that lowers the evidence, by the smaller step of
    expectation-maximisation, which never does.

    Warns where the evidence has no maximum, or it was not reached.
    """
    search = _Search(evidence, prior)
    at = search.at({name: max(delta, 1e-12) for name, delta in search.start.items()}, noise)
    for _ in range(STEPS):
        found = search.step(at)
        if found is None:
            break
        at = found
    else:
        warnings.warn(f"the evidence is not stationary after {STEPS} steps", stacklevel=3)
    if at.deltas and max(at.deltas.values()) >= LARGEST:
        warnings.warn(
            "the evidence grows with the precision of the prior without end: it would rather do "
            "without these parameters",
            stacklevel=3,
        )
    return Tuned(search.prior(at.deltas), at.noise, at.log)


class _Search:
    def __init__(self, evidence: Evidence, prior: Damping):
        self.evidence, layout = evidence, evidence.curvature.layout
        self.each = isinstance(prior, Mapping)
        delta = layout.damping(prior)
        self.group: dict[str, str] = _groups(layout, prior)
        self.start = {group: delta[name] for name, group in self.group.items()}
        self.sizes = self._summed({name: float(s) for name, s in layout.sizes.items()})
        self.squares = self._summed(evidence.squares())

    def prior(self, deltas: dict[str, float]) -> Damping:
        return dict(deltas) if self.each else next(iter(deltas.values()))

    def at(self, deltas: dict[str, float], noise: float) -> _At:
        return _At(deltas, noise, float(self.evidence.log(self.prior(deltas), noise)))

    def step(self, at: _At) -> _At | None:
        """The next point; None where the evidence is stationary, or no step raises it."""
        evidence = self.evidence
        traces = self._summed(evidence.traces(self.prior(at.deltas), at.noise))
        gamma = {g: max(self.sizes[g] - d * traces[g], 0.0) for g, d in at.deltas.items()}
        used = evidence.degree * sum(gamma.values())
        slopes = [
            (gamma[g] - d * self.squares[g], gamma[g]) for g, d in at.deltas.items() if d < LARGEST
        ]
        if evidence.likelihood.has_noise:
            slopes.append((evidence.summed / at.noise - evidence.terms + used, evidence.terms))
        if all(abs(slope) <= STATIONARY * (1 + size) for slope, size in slopes):
            return None
        bold = {g: _ratio(gamma[g], self.squares[g]) for g in gamma}
        careful = {g: _ratio(self.sizes[g], self.squares[g] + traces[g]) for g in gamma}
        for deltas, noise in zip((bold, careful), self._noises(at, used), strict=True):
            found = self.at(deltas, noise)
            if found.log > at.log:
                return found
        return None  # what could be gained is within rounding

    def _noises(self, at: _At, used: float) -> tuple[float, float]:
        """Of both steps. Errors: `NNJError` where the data leave nothing to measure it by."""
        evidence = self.evidence
        if not evidence.likelihood.has_noise:
            return at.noise, at.noise
        if evidence.summed <= 0:
            raise NNJError(
                "the model has no error on its data, so that the evidence grows without end as the "
                "noise vanishes. Set noise= by what you know of the measurement"
            )
        careful = (evidence.summed + at.noise * used) / evidence.terms
        left = evidence.terms - used  # below 0 with more effective parameters than data
        return evidence.summed / left if left > 0 else careful, careful

    def _summed(self, values: Mapping[str, float]) -> dict[str, float]:
        found = dict.fromkeys(self.group.values(), 0.0)
        for name, group in self.group.items():
            found[group] += values[name]
        return found


def _groups(layout: Layout, prior: Damping) -> dict[str, str]:
    """The key of a prior that speaks for each parameter; "" of a number."""
    if not isinstance(prior, Mapping):
        return dict.fromkeys(layout.shapes, "")
    found: dict[str, str] = {}
    for path in sorted(prior, key=len):  # as `Layout.damping` has it
        found.update(dict.fromkeys(layout.below(path), path))
    return {name: found[name] for name in layout.shapes}


def _ratio(a: float, b: float) -> float:
    """a / b as a precision that is above 0."""
    return min(max(a / b if b > 0 else LARGEST, 1e-12), LARGEST)


def check_precision(prior: Damping) -> None:
    """Errors: `NNJError` for a prior that is neither a precision nor precisions by name."""
    numbers = list(prior.values()) if isinstance(prior, Mapping) else [prior]
    for number in numbers:
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not plain or not 0 <= number < math.inf:
            raise NNJError(
                f"prior={prior!r}: expected the precision of the prior, a number that is not "
                "negative, or {name of module: number}"
            )


def check_noise(noise: float) -> None:
    """Errors: `NNJError` for what is no variance."""
    plain = isinstance(noise, (int, float)) and not isinstance(noise, bool)
    if not plain or not 0 < noise < math.inf:
        raise NNJError(f"noise={noise!r}: expected the variance of the targets, above 0")

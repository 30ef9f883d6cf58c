"""N(w0, (M + delta)^-1) over the parameters of a fit: its evidence, its draws, and what of it goes
into a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nnj.collecting.fit_result import versions_of
from nnj.errors import NNJError
from nnj.matrices.layout import Damping
from nnj.matrices.matrix import Matrix, packed
from nnj.posterior.evidence import Evidence, check_noise, check_precision, tuned
from nnj.recording.tensor_parallel import check_whole

FORMAT = 1  # of files


class WeightPosterior:
    """A Gaussian over P parameters.

    Args:
        parameters: by name, at w0.
        evidence: of which M, the likelihood and the loss are known.
        prior: delta: a number, or {name of module: number}.
        noise: the variance of the targets under a Gaussian likelihood.

    Attributes:
        mean: w0, (P,).
        names: of the parameters.
        likelihood: its name.
        prior, noise: may be set.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        evidence: Evidence,
        prior: Damping,
        noise: float,
    ):
        self._evidence, self._parameters = evidence, dict(parameters)
        self.mean = flat(parameters)
        self._versions = versions_of(parameters.values())
        self._inverse: Matrix | None = None  # of the prior and noise that are set
        self.prior, self.noise = prior, noise

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    @property
    def likelihood(self) -> str:
        return self._evidence.likelihood.name

    @property
    def prior(self) -> Damping:
        """delta, the precision of the prior."""
        return self._prior

    @prior.setter
    def prior(self, value: Damping) -> None:
        check_precision(value)
        self._evidence.curvature.layout.damping(value)  # which knows the names
        self._prior, self._inverse = value, None

    @property
    def noise(self) -> float:
        """The variance of the targets under a Gaussian likelihood."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        check_noise(value)
        if value != 1.0 and not self._evidence.likelihood.has_noise:
            raise NNJError(
                f"noise={value:g}: a likelihood that is {self.likelihood} has none. Leave it out"
            )
        self._noise, self._inverse = float(value), None

    def matrix(self) -> Matrix:
        """M, the curvature of -log p(D | w) at w0, over the parameters: see `nnj.matrices`."""
        return self._evidence.matrix(self.noise)

    def weight_covariance(self) -> Matrix:
        """(M + delta)^-1, over the parameters: see `nnj.matrices`.

        Errors: `NNJError` if M + delta is singular.
        """
        if self._inverse is None:
            self._inverse = self.matrix().inverse(self.prior)
        return self._inverse

    def log_marginal_likelihood(
        self, prior: Damping | None = None, noise: float | None = None
    ) -> Tensor:
        """log p(D) by Laplace's method, (): see `nnj.posterior.evidence`.

        Args:
            prior, noise: in the place of those that are set.

        Errors: `NNJError` for a prior of precision 0.
        """
        prior = self.prior if prior is None else prior
        noise = self.noise if noise is None else noise
        check_precision(prior)
        check_noise(noise)
        return self._evidence.log(prior, noise)

    def tune_evidence(self, *, per_module: bool = False) -> float:
        """Set the prior, and the noise of a Gaussian likelihood, to where the marginal likelihood
        is highest, and return that.

        It trusts Laplace's method, which a network that fits its data too well can mislead; see
        `tune_heldout`.

        Args:
            per_module: one precision for each module that has parameters, in the place of those
                that are set: a number becomes one number for all, a dict one for each of its names.

        Warns where there is no maximum, or it was not reached.
        """
        prior = self.prior
        if per_module:
            numbers = self._evidence.curvature.layout.damping(prior)
            prior = {name.rpartition(".")[0]: number for name, number in numbers.items()}
        found = tuned(self._evidence, prior, self.noise)
        self.prior, self._noise = found.prior, found.noise
        return found.log

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """n draws of the parameters, (n, P)."""
        return self.mean + self.matrix().sample(n, self.prior, generator)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which holds tensors and plain values alone: all but the model."""
        evidence = self._evidence
        kept = {
            "nnj.Laplace": FORMAT,
            "curvature": packed(evidence.curvature),
            "degree": evidence.degree,
            "offset": evidence.offset,
            "mean": self.mean,
            "likelihood": evidence.likelihood.name,
            "summed": evidence.summed,
            "terms": evidence.terms,
            "prior": dict(self.prior) if isinstance(self.prior, Mapping) else self.prior,
            "noise": self.noise,
        }
        torch.save(kept, path)

    def __repr__(self) -> str:
        noise = f", noise={self.noise:g}" if self._evidence.likelihood.has_noise else ""
        matrix = self._evidence.curvature
        return f"Laplace({self.likelihood}, {matrix!r}, prior={self.prior!r}{noise})"


def parameters_of(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, nn.Parameter]:
    """Those of a fit. Errors: `NNJError` for a model that has others."""
    named = dict(model.named_parameters())
    missing = [n for n, s in shapes.items() if n not in named or tuple(named[n].shape) != tuple(s)]
    if missing:
        raise NNJError(
            f"the fit is of another model: this one has no {', '.join(missing[:5])} of that shape"
        )
    found = {name: named[name] for name in shapes}
    check_whole("a posterior", found.values())
    half = [name for name, p in found.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise NNJError(
            f"{', '.join(half[:5])}: a posterior solves with its curvature, which half precision "
            "does not allow. Fit the model in single precision (model.float())"
        )
    return found


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    """Parameters as one vector (P,)."""
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])

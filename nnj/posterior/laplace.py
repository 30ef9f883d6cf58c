"""p(w | D) = N(w0, (M + delta)^-1): a Laplace posterior, M the curvature of a fit and delta the
precision of the prior.

Daxberger et al. (2021), Laplace redux: effortless Bayesian deep learning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnj.collecting.fit import in_eval_mode
from nnj.collecting.fit_result import versions_of
from nnj.errors import NNJError
from nnj.matrices.layout import Damping
from nnj.matrices.load import read_packed, unpacked
from nnj.matrices.matrix import Matrix
from nnj.posterior.evidence import Evidence, check_precision
from nnj.posterior.inputs import Forwarding, Reader
from nnj.posterior.likelihood import likelihood_of
from nnj.posterior.links import bridge, check_link, monte_carlo, monte_carlo_binary, places_first
from nnj.posterior.links import probit as probit_link
from nnj.posterior.weights import FORMAT, WeightPosterior, flat, parameters_of
from nnj.propagation.called import call, logits_of
from nnj.propagation.linearized import Linearized, linearize
from nnj.recording.extend import batch_axis_of

PRIORS = tuple(10.0 ** (k / 2) for k in range(-6, 9))


class Prediction(NamedTuple):
    """Gaussian outputs.

    Attributes:
        mean: (N, *outputs).
        covariance: (N, C, C) of the C outputs of each sample.
    """

    mean: Tensor
    covariance: Tensor


class Laplace(WeightPosterior):
    """N(w0, (M + delta)^-1) over the P parameters of a fit, in the order of `model.parameters()`;
    `nnj.laplace` makes it.

    Predictions are of the model linearised at w0, f(w) = f(w0) + J (w - w0), whose outputs are
    Gaussian; J is never formed. They are in eval mode, and leave the model as it was. Where they
    are asked of `x`, that is a tensor, a tuple of arguments or a dict of named ones (in chunks of
    `batch_size` samples), or a loader as that of `nnj.fit`, whose targets are left out
    (`progress=True` shows a bar).

    Attributes:
        model: w0 are its parameters; it may not be trained on.
        mean: w0, (P,).
        names: of the parameters.
        likelihood: its name.
        prior, noise: may be set, and are by `tune_evidence` and `tune_heldout`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        evidence: Evidence,
        prior: Damping,
        noise: float,
        forward: Forwarding | None = None,
        target: str | Callable[[Any], Any] | None = None,
    ):
        super().__init__(parameters, evidence, prior, noise)
        self.model = model
        device = next(model.parameters()).device
        self._reader = Reader(device, forward, target, batch_axis_of(model))

    # -- the prior ---------------------------------------------------------------------------------

    def tune_heldout(
        self, loader: Iterable[Any], priors: Sequence[Damping] = PRIORS, *, progress: bool = False
    ) -> dict[Any, float]:
        """Set the prior to that of the lowest negative log likelihood of held-out data, by the
        probit link (of a Gaussian likelihood the predictive density), and return that of each
        prior, averaged over targets.

        Args:
            loader: batches with targets, as that of `nnj.fit`.
            priors: to choose from: precisions, or dicts (which come back as tuples of their items).

        Errors: `NNJError` for a likelihood of which no prediction is known, and for no data.
        """
        priors = list(priors)
        for prior in priors:
            check_precision(prior)
        if not priors:
            raise NNJError("priors=[] leaves nothing to choose from")
        matrices = [self.matrix().inverse(prior) for prior in priors]
        kind, losses = self._evidence.likelihood, list[Tensor]()
        for x, y in self._reader.labelled(loader, progress):
            at = self._linearized(x)
            each = [
                kind.held_out(at.y, at.variance(m).reshape(at.y.shape), y, self.noise)
                for m in matrices
            ]
            losses.append(torch.stack(each, 1))
        if not losses or not sum(len(part) for part in losses):
            raise NNJError("the loader gave no targets to choose a prior by")
        means = torch.cat(losses).double().mean(0).tolist()
        best = min(range(len(priors)), key=means.__getitem__)
        self.prior = priors[best]
        keys = [tuple(p.items()) if isinstance(p, Mapping) else p for p in priors]
        return dict(zip(keys, means, strict=True))

    # -- predictions -------------------------------------------------------------------------------

    def predict(
        self, x: Any, *, batch_size: int | None = None, progress: bool = False
    ) -> Prediction:
        """The mean (N, *outputs) and the covariance (N, C, C) of the outputs; of targets with noise
        the covariance is higher by `noise` on the diagonal.
        """
        found = [
            (at.y, at.covariance(self.weight_covariance()))
            for at in self._chunks(x, batch_size, progress)
        ]
        means, covariances = zip(*found, strict=True)
        return Prediction(torch.cat(means), torch.cat(covariances))

    def predict_variance(
        self, x: Any, *, batch_size: int | None = None, progress: bool = False
    ) -> Tensor:
        """The variance of each output, (N, C): the diagonal of the covariance, of which no more is
        formed.
        """
        parts = [
            at.variance(self.weight_covariance()) for at in self._chunks(x, batch_size, progress)
        ]
        return torch.cat(parts)

    def predict_proba(
        self,
        x: Any,
        link: str = "probit",
        *,
        samples: int = 100,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The expected probabilities of a classifier, of the shape of its outputs (N, C): of
        classes in axis 1, or of a Bernoulli variable for each entry.

        Args:
            link: "probit" takes the variances alone; "mc" averages over draws of the outputs, and
                is exact as their number grows; "bridge" is a Dirichlet distribution's mean, of more
                than two classes. See `nnj.posterior.links`.
            samples, generator: of "mc".

        Errors: `NNJError` for a likelihood that is neither categorical nor Bernoulli.
        """
        if self.likelihood not in ("categorical", "bernoulli"):
            raise NNJError(
                f"a likelihood that is {self.likelihood} has no probabilities. Use predict, or say "
                "likelihood='categorical' or 'bernoulli' to nnj.laplace if it is one"
            )
        binary = self.likelihood == "bernoulli"
        check_link(link, binary)
        if samples < 1:
            raise NNJError(f"samples={samples}, expected at least one draw")
        parts = []
        for at in self._chunks(x, batch_size, progress):
            if not binary and at.y.dim() < 2:
                raise NNJError("outputs of (N,) have no axis of classes, which is axis 1")
            if link == "probit" or binary:
                variance = at.variance(self.weight_covariance()).reshape(at.y.shape)
                if link == "probit":
                    parts.append(probit_link(at.y, variance, binary))
                else:
                    parts.append(monte_carlo_binary(at.y, variance, samples, generator))
                continue
            moments = places_first(at.y, at.covariance(self.weight_covariance()))
            found = monte_carlo(*moments, samples, generator) if link == "mc" else bridge(*moments)
            parts.append(found.mT.reshape(at.y.shape))
        return torch.cat(parts)

    def covariance(self, x1: Any, x2: Any = None) -> Tensor:
        """The covariance of the outputs at two inputs, (N, C, N', C'), between all samples; by
        default at one.
        """
        (one,) = self._chunks(_single(x1), None, False)
        if x2 is None:
            return one.kernel(M=self.weight_covariance())
        (two,) = self._chunks(_single(x2), None, False)
        return one.kernel(two, M=self.weight_covariance())

    # -- draws -------------------------------------------------------------------------------------

    def sample_predict(
        self,
        x: Any,
        n: int = 1,
        *,
        linearized: bool = False,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The outputs under n draws of the parameters, (n, N, *outputs).

        Args:
            linearized: of the linearised model, whose outputs have the moments of `predict`; by
                default of the model itself, which far from w0 is another one.
        """
        draws = self.sample(n, generator)
        chunks = self._reader.chunks(x, batch_size, progress)
        with self._kept():
            if linearized:
                found = [self._on_line(self._linearized(part), draws) for part in chunks]
            else:
                found = [self._through(part, draws) for part in chunks]
        _check_any(found)
        return torch.cat(found, 1)

    def _on_line(self, at: Linearized, draws: Tensor) -> Tensor:
        return torch.stack([at.y + at.jvp(draw - self.mean) for draw in draws])

    def _through(self, x: Any, draws: Tensor) -> Tensor:
        whole, layout = _Called(self.model, self._reader.forward), self._evidence.curvature.layout
        outputs = []
        with torch.no_grad():
            for draw in draws:
                parts = layout.split(draw[:, None])
                given = {f"model.{name}": t[..., 0] for name, t in parts.items()}
                outputs.append(functional_call(whole, given, (x,)))
        return torch.stack(outputs)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        forward: Forwarding | None = None,
        target: str | Callable[[Any], Any] | None = None,
        map_location: Any = None,
    ) -> Laplace:
        """Read what `save` wrote; no code in the file is run.

        Args:
            model: with the parameters at which it was fitted.
            forward, target: as of `nnj.laplace`.

        Errors: `NNJError` for a file of another kind, and a model with other parameters.
        """
        is_one = lambda found: isinstance(found, dict) and found.get("nnj.Laplace") == FORMAT
        found = read_packed(path, map_location, is_one, "nnj.Laplace", "post.save")
        curvature: Matrix = unpacked(found["curvature"])
        parameters = parameters_of(model, curvature.layout.shapes)
        if not torch.equal(flat(parameters), found["mean"]):
            raise NNJError(
                "the model has other parameters than those at which the posterior was fitted. Load "
                "its state dict first"
            )
        kind = likelihood_of(found["likelihood"])
        facts = found["offset"], kind, found["summed"], found["terms"]
        evidence = Evidence(curvature, found["degree"], *facts)
        prior, noise = found["prior"], found["noise"]
        return cls(model, parameters, evidence, prior, noise, forward, target)

    # -- inside ------------------------------------------------------------------------------------

    def _chunks(self, x: Any, batch_size: int | None, progress: bool) -> Iterator[Linearized]:
        met = False
        for part in self._reader.chunks(x, batch_size, progress):
            met = True
            yield self._linearized(part)
        if not met:
            _check_any([])

    def _linearized(self, x: Any) -> Linearized:
        """The model at x, as a linear map of the parameters of the posterior."""
        with self._kept():
            own = {name.rpartition(".")[0] for name in self._parameters}
            modules = [self.model.get_submodule(path) for path in own]
            by = self._reader.forward
            # a tuple says nothing of where the samples are in it, and the output does
            given = (x,) if by is None and isinstance(x, Tensor) else x
            at = linearize(self.model, given, modules=modules, forward=by)
        if at.names != self.names:
            raise NNJError(
                "other parameters require grad than at the fit "
                f"({', '.join(sorted(set(at.names) ^ set(self.names)))}). Set them as they were"
            )
        return at

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """The model in eval mode, with the parameters of the fit.

        Errors: `NNJError` where they are others by now.
        """
        moved = any(p._version != version for p, version in self._versions)
        now = dict(self.model.named_parameters())
        moved = moved or any(now.get(name) is not p for name, p in self._parameters.items())
        if moved:
            parameters = parameters_of(self.model, self._evidence.curvature.layout.shapes)
            if not torch.equal(flat(parameters), self.mean):
                raise NNJError(
                    "the model has other parameters than those at which the posterior was fitted. "
                    "Fit again, or keep a copy of the model for training"
                )
            self._parameters, self._versions = parameters, versions_of(parameters.values())
        with in_eval_mode(self.model), torch.inference_mode(False):
            yield


class _Called(nn.Module):
    """What a user's forward, or the model, makes of a batch."""

    def __init__(self, model: nn.Module, forward: Forwarding | None):
        super().__init__()
        self.model, self.by = model, forward

    def forward(self, x: Any) -> Any:
        return self.by(self.model, x) if self.by else logits_of(call(self.model, x))


def _single(x: Any) -> Any:
    if not isinstance(x, (Tensor, tuple, Mapping)):
        raise NNJError(
            f"covariance is between inputs that are tensors, tuples or dicts, not "
            f"{type(x).__name__}"
        )
    return x


def _check_any(found: Sequence[Any]) -> None:
    if not found:
        raise NNJError("the loader gave no batches to predict")

"""laplace-torch on nnj's curvature: Laplace(model, likelihood, backend=NNJGGN).

laplace-torch wants of the negative log likelihood, summed over a batch: the diagonal of the GGN,
its Kronecker factors parameter by parameter, all of it, Jacobians (N, C, P) of the outputs, and
gradients (N, P) of samples."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from laplace.curvature import GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn
from typing_extensions import override

import nnj
from nnj.matrices import BlockDiagonal, Diagonal, Kronecker, Matrix

Inputs = Tensor | MutableMapping[str, Any]


class NNJGGN(GGNInterface):  # type: ignore[misc]
    """The GGN of a model as a backend of laplace-torch, for every one of its classes that takes a
    backend, ELLA and VaLLA included, but for two: `LowRankLaplace` wants a Hessian's, and
    `FunctionalLaplace` accepts three classes by name, and no other.

    >>> la = Laplace(model, "classification", "all", "kron", backend=NNJGGN)
    >>> la.fit(train_loader)

    Any model that `nnj.collect` takes, any part of which may be frozen, is exact: all structures on
    all weights, on the last layer, and on a subnetwork.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y: as of
            `CurvlinopsGGN`.
        stochastic: columns by Monte Carlo in the place of exact ones. The factor and the diagonal
            are then unbiased, and other ones in each call.
        num_samples: how many draws.
        block_limit: the largest P for which the whole GGN is formed.

    Errors: whatever `nnj.fit` refuses; `NNJError` for Kronecker factors that laplace-torch's
    `Kron`, which has one pair for each parameter, cannot hold."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        block_limit: int = 10_000,
    ):
        keys = {"dict_key_x": dict_key_x, "dict_key_y": dict_key_y}
        drawn = {"stochastic": stochastic, "num_samples": num_samples}
        super().__init__(model, likelihood, last_layer, subnetwork_indices, **keys, **drawn)
        self.block_limit = block_limit

    # -- curvature of a batch ----------------------------------------------------------------------

    @override
    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss (), and the diagonal (P,), or of the subnetwork."""
        name, options = "ggn_diag", {}
        if self.stochastic:
            name, options = "ggn_diag_mc", {"samples": self.num_samples}
        fit = self._fit(x, y, name, **options)
        return self._loss(fit), self.factor * self._within(fit.vector(name))

    @override
    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """The loss (), and Kronecker factors: S of each parameter (its output's axis) beside A, of
        which laplace-torch adds up both over batches. A bias has its exact block, where curvlinops
        takes S alone: the same on vectors, another one behind a convolution.

        Args:
            N: the number of samples of the data set.
        """
        options: dict[str, Any] = {"bias": "separate", "block_limit": self.block_limit}
        options["approx"] = kwargs.get("kfac_approx", "expand")
        if self.stochastic:
            options |= {"fisher": "mc", "samples": self.num_samples}
        fit = self._fit(x, y, "kfac", **options)
        matrix = fit.matrix("kfac")
        pairs = [kron_factors(matrix, name) for name in matrix.layout.shapes]
        # A is a mean over the samples of a batch: as a part of the mean over all of them it adds up
        share = fit.samples / N
        found = [[pair[0], *(share * side for side in pair[1:])] for pair in pairs]
        return self._loss(fit), self.factor * Kron(found)

    @override
    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss (), and the GGN (P, P), or of the subnetwork."""
        if self.stochastic or self.subnetwork_indices is not None:
            found: tuple[Tensor, Tensor] = super().full(x, y)
            return found
        fit = self._fit(x, y, "ggn", block_limit=self.block_limit)
        return self._loss(fit), self.factor * fit["ggn"]

    # -- outputs and gradients ---------------------------------------------------------------------

    @override
    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """J of the outputs in the parameters, (N, C, P), and the outputs (N, C).

        Args:
            enable_backprop: whether both may be differentiated, in x say; they are then
                `torch.func`'s.
        """
        if enable_backprop:
            found: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop=True)
            return found
        at = nnj.linearize(self.model, x, modules=[self._model], forward=_as_it_is)
        return self._within(at.jacobian()), at.y

    @override
    def last_layer_jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """J of the outputs in the parameters of the last layer, (N, C, P), and the outputs."""
        if enable_backprop:
            found: tuple[Tensor, Tensor] = super().last_layer_jacobians(x, True)
            return found
        return self.jacobians(x)

    @override
    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss of each sample, (N, P), and the summed loss (); both without
        the factor of the likelihood.
        """
        fit = self._fit(x, y, "batch_grad")
        return self._within(fit.vector("batch_grad")), self._loss(fit) / self.factor

    # -- inside ------------------------------------------------------------------------------------

    def _fit(self, x: Inputs, y: Tensor, quantity: str, **options: Any) -> nnj.Fit:
        return nnj.fit(
            self.model,
            self.lossfunc,
            [(x, y)],
            quantity,
            modules=[self._model],
            forward=lambda model, batch: model(batch[0]),
            target=lambda batch: batch[1],
            **options,
        )

    def _loss(self, fit: nnj.Fit) -> Tensor:
        p = next(self.model.parameters())
        value: Tensor = p.new_tensor(self.factor * fit.loss_value)
        return value

    def _within(self, t: Tensor) -> Tensor:
        """The entries of the subnetwork, along the last axis."""
        return t if self.subnetwork_indices is None else t[..., self.subnetwork_indices]


def kron_factors(matrix: Matrix, name: str) -> list[Tensor]:
    """The curvature of one parameter as laplace-torch has it: [S, A] with S over axis 0 and A over
    all others, flattened; or [S] of a parameter with one axis.

    Errors: `NNJError` for curvature that has not this form.
    """
    shape, own = matrix.layout.shapes[name], matrix.restricted([name])
    if len(shape) <= 1:
        return [own.dense()]
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    parts = _rows(own)
    if parts is None:
        pair = None
    elif all(isinstance(part, Kronecker) for part in parts):
        pair = _one_pair(parts)
    else:
        pair = _of_a_block(parts, rows, columns)
    if pair is None or [len(side) for side in pair] != [rows, columns]:
        raise nnj.NNJError(
            f"{name}: its curvature has no pair of factors of {rows} and {columns}, which is all "
            "that laplace-torch's Kron can hold (grouped and transposed convolutions, layers that "
            "attend to several inputs, bare parameters). Use nnj.laplace with 'kfac', which holds "
            "each as it is, or the structure 'diag'"
        )
    return pair


def _rows(own: Matrix) -> list[Matrix] | None:
    """The blocks of a matrix over one parameter, of which each is over some rows, in order."""
    if not isinstance(own, BlockDiagonal):
        return [own]
    if len(own.parts) == 1 and not any(s.view for s in own.parts[0].seen.values()):
        return _rows(own.parts[0].matrix)
    found = [(seen.view, part.matrix) for part in own.parts for seen in part.seen.values()]
    if any(view is not None and not view.plain for view, _ in found):
        return None
    return [matrix for _, matrix in sorted(found, key=lambda at: at[0].start if at[0] else 0)]


def _one_pair(parts: Sequence[Any]) -> list[Tensor] | None:
    """Of rows that share A: their S side by side."""
    rights = [right for part in parts for right in _squares(part.right)]
    slack = 100 * torch.finfo(rights[0].dtype).eps * float(rights[0].abs().max())  # of rounding
    if any(bool(((right - rights[0]).abs() > slack).any()) for right in rights):
        return None
    return [torch.block_diag(*(s for part in parts for s in _squares(part.left))), rights[0]]


def _of_a_block(parts: Sequence[Matrix], rows: int, columns: int) -> list[Tensor] | None:
    """Of a parameter that nothing reaches, or that has one row or one column."""
    if all(isinstance(part, Diagonal) and not part.d.any() for part in parts):
        zero = torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
        return [zero.expand(size, size).clone() for size in (rows, columns)]
    if len(parts) > 1 or 1 not in (rows, columns):
        return None
    one = torch.ones(1, 1, dtype=parts[0].dtype, device=parts[0].device)
    return [one, parts[0].dense()] if rows == 1 else [parts[0].dense(), one]


def _squares(side: Tensor) -> list[Tensor]:
    """A factor of each group, entry by entry."""
    return [torch.diag(part) if part.dim() == 1 else part for part in side]


def _as_it_is(model: nn.Module, x: Any) -> Any:
    return model(x)

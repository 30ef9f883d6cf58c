"""What every quantity of the gradient and of the Hessian should be, by brute force: from the dense
derivatives of some backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.oracle import Dense, close

Compared = Callable[[Any, Tensor], str]

# by name: whether it is quadratic in the gradient
AT_PARAMETERS = {
    "batch_grad": False,
    "batch_ggn_diag": False,
    "ggn_diag_empirical": True,
    "batch_grad_sq_norm": True,
    "batch_grad_dot": True,
    "grad_variance": True,
}
ON_THE_CONTEXT = {
    "batch_grad_sq_norm": "batch_grad_sq_norm",
    "batch_grad_dot": "batch_grad_dot",
    "noise_terms": "grad_variance",
    "noise_scale": "grad_variance",
    "ggn": "ggn",
}
ALL = (*AT_PARAMETERS, "ggn")
QUADRATIC = [name for name, quadratic in AT_PARAMETERS.items() if quadratic]


class Expected:
    """The truth of all quantities.

    Args:
        passes: the dense derivatives of each backward pass, of samples of their own.
        names: the parameters that require grad, in order.
    """

    def __init__(self, passes: Sequence[Dense], names: Sequence[str]):
        self.passes, self.names = list(passes), list(names)

    def at(self, quantity: str, name: str) -> Tensor:
        """A quantity at a parameter."""
        if quantity == "batch_ggn_diag":
            return torch.cat([batch_diag(dense, name) for dense in self.passes])
        rows = self.rows(name)
        flat = by_rows(rows)
        made: dict[str, Callable[[], Tensor]] = {
            "batch_grad": lambda: rows,
            "ggn_diag_empirical": lambda: rows.square().sum(0),
            "batch_grad_sq_norm": lambda: flat.square().sum(1),
            "batch_grad_dot": lambda: flat @ flat.mT,
            "grad_variance": lambda: rows.var(0, unbiased=False),
        }
        return made[quantity]()

    def rows(self, name: str) -> Tensor:
        return torch.cat([dense.batch_grad(name) for dense in self.passes])

    def on_the_context(self, key: str) -> Tensor:
        """What stands on the context."""
        if key == "ggn":
            found: Tensor = sum(dense.block(self.names) for dense in self.passes)
            return found
        g = torch.cat([by_rows(self.rows(name)) for name in self.names], 1)
        if key == "batch_grad_sq_norm":
            return g.square().sum(1)
        if key == "batch_grad_dot":
            return g @ g.mT
        n = len(g)
        covariance = n**2 * g.T.cov() if n > 1 else torch.full_like(g.T @ g, torch.nan)
        tr = covariance.trace() if covariance.dim() else covariance
        g2 = g.sum(0).square().sum() - tr / n
        if key == "noise_terms":
            return torch.stack([tr, g2])
        return tr / g2 if not bool(g2 <= 0) else torch.tensor(torch.inf).to(g2)


def by_rows(t: Tensor) -> Tensor:
    """(N, ...) with one axis behind the first."""
    return t.reshape(len(t), t[0].numel() if len(t) else 1)


def plain_numbers(t: Any) -> Any:
    """NaN and infinity as numbers that no result is, so that they are equal to themselves."""
    return t.nan_to_num(nan=-1e3, posinf=-2e3) if isinstance(t, Tensor) else t


def batch_diag(dense: Dense, name: str) -> Tensor:
    """diag(J_n^T H J_n) of each sample, (N, *shape), of an H that connects no two samples."""
    j = dense.columns(name)
    rows = (dense.hessian @ j) * j
    total = rows.new_zeros(dense.n, rows.shape[1]).index_add_(0, dense.samples, rows)
    return total.reshape(dense.n, *dense.jacobian[name].shape[1:])


def wrong_quantities(
    model: nn.Module,
    context: Any,
    expected: Expected,
    quantities: Sequence[str],
    reached: Callable[[str], bool],
    compared: Compared = close,
) -> Iterator[str]:
    """What is wrong in the attributes of a model and of a context, one line each."""
    for name, p in model.named_parameters():
        for quantity in quantities if p.requires_grad else ():
            if quantity not in AT_PARAMETERS:
                continue
            found = getattr(p, quantity, "not there")
            if not reached(name):
                if found is not None:
                    yield f"{quantity} of {name}, which was not reached, is {found!r}"
            elif fault := compared(found, expected.at(quantity, name)):
                yield f"{quantity} of {name} {fault}"
    yield from wrong_totals(context, expected, quantities, compared)


def wrong_totals(
    context: Any, expected: Expected, quantities: Sequence[str], compared: Compared
) -> Iterator[str]:
    """What is wrong on a context, one line each."""
    for key, quantity in ON_THE_CONTEXT.items():
        if quantity in quantities:
            found, true = getattr(context, key), expected.on_the_context(key)
            if key == "noise_scale":  # of small differences: by the terms, which are compared
                tr, g2 = context.noise_terms
                true = tr / g2 if not bool(g2 <= 0) else torch.full_like(g2, torch.inf)
            if fault := compared(plain_numbers(found), plain_numbers(true)):
                yield f"context.{key} {fault}"

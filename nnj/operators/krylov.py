"""What a symmetric matrix says through its products alone: solutions and traces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnj.errors import NNJError

Product = Callable[[Tensor], Tensor]  # (P, k) -> (P, k)


def conjugate_gradients(
    product: Product, b: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, int]:
    """x with |A x - b| <= tolerance |b| for each column of b, (P, k), of a positive definite A, and
    how many products that took (Hestenes and Stiefel 1952).

    Errors: `NNJError` for a direction in which A is not positive, or too many iterations.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, size = r.clone(), r.square().sum(0)
    goal = tolerance**2 * size
    for i in range(iterations):
        left = size > goal
        if not bool(left.any()):
            return x, i
        image = product(p)
        along = (p * image).sum(0)
        if bool((along[left] <= 0).any()):
            raise NNJError(
                "a direction has no positive curvature, so that conjugate gradients cannot solve. "
                "Give a larger damping"
            )
        step = torch.where(left, size / torch.where(left, along, 1.0), 0.0)
        x += step * p
        r -= step * image
        new = r.square().sum(0)
        p = r + torch.where(left, new / torch.where(left, size, 1.0), 0.0) * p
        size = torch.where(left, new, size)
    worst = float((size / goal.clamp(min=torch.finfo(b.dtype).tiny)).max().sqrt() * tolerance)
    raise NNJError(
        f"conjugate gradients have not converged after {iterations} products: the residual is "
        f"{worst:.2g} of the right-hand side, and tolerance={tolerance:g}. Give more iterations, a "
        "larger damping or a larger tolerance"
    )


def hutch_plus_plus(
    product: Product, like: Tensor, size: int, samples: int, generator: torch.Generator | None
) -> Tensor:
    """An unbiased estimate of the trace of `size` x `size` from `samples` products (Meyer et al.
    2021): exact on what a third of them span, random signs on the rest.
    """
    thirds = samples // 3
    device = like.device if generator is None else generator.device

    def signs(k: int) -> Tensor:
        bits = torch.randint(0, 2, (size, k), generator=generator, device=device)
        return (2 * bits - 1).to(like.device, like.dtype)

    q = torch.linalg.qr(product(signs(thirds))).Q if thirds else like.new_zeros(size, 0)
    g = signs(samples - 2 * thirds)
    g = g - q @ (q.mT @ g)
    inside = (q * product(q)).sum() if thirds else like.new_zeros(())
    return inside + (g * product(g)).sum() / g.shape[1]

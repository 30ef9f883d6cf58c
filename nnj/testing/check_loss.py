"""check_loss: the rule of a loss against its dense Hessian, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from nnj.loss_hessian.base import LossHessian
from nnj.registry.layer_rules import checked
from nnj.registry.loss_rules import FunctionLoss, hessian_of_loss, name_of, reference_of_loss
from nnj.testing.compare import double, same


def check_loss(
    loss: Callable[..., Tensor],
    output: Tensor,
    *args: Any,
    reference: Callable[..., Tensor] | None = None,
) -> None:
    """Check the rule for `loss` at `output`, args being its other arguments, against the dense
    Hessian, in float64.

    Mean, sum, none and the loss's own reduction, under the scale 1 and a random positive one: the
    factor, in one piece, in slices and in columns that are picked, with their square sums; where
    `to_outputs` puts it; diagonal, product, combinations of columns; samples, which must be columns
    under the signs that the generator gives. Blocks must be all there is: the Hessian between rows,
    or places, must be zero. The loss is copied, so its reduction stays.

    Args:
        loss: a loss module, or a function as `nnj.extend` takes it (its reduction is its own).
        output: log probabilities must be such in float64.
        reference: `reference(loss, output, *args)` is what is differentiated twice, by default what
            the rule has registered (for NLLLoss the loss of `output.log_softmax(1)`), or the loss:
            for one that autograd cannot differentiate twice, or the rule of which takes in more
            than the loss. At `output` it must have the value of the loss.

    Errors: AssertionError naming the loss, its reduction and the product; `NNJError` for a loss
    that `nnj.collect` refuses, such as one that is not convex in `output`."""
    loss = loss if isinstance(loss, nn.Module) else FunctionLoss(loss)
    output, args = double(output), tuple(map(double, args))
    run = reference or reference_of_loss(loss)
    reductions = (
        dict.fromkeys(["mean", "sum", "none", loss.reduction])
        if hasattr(loss, "reduction")
        else [None]
    )
    for reduction in reductions:
        module: Any = copy.deepcopy(loss).double()
        if reduction is not None:
            module.reduction = reduction
        who = f"{name_of(loss)}{f'(reduction={reduction!r})' if reduction else ''}"
        value = module.forward(output, *args).detach()
        same(
            f"{who}: the value of the reference",
            run(module, output, *args).detach().nan_to_num(),
            value.nan_to_num(),
        )
        for scale in (torch.ones_like(value), torch.rand_like(value) + 0.5):
            scalar = lambda y: (run(module, y, *args) * scale).sum()  # noqa: B023
            dense = jacrev(jacrev(scalar))(output)
            h = hessian_of_loss(module, scale, output, *args)
            check_hessian(who, h, dense.detach().reshape(output.numel(), -1), output)


def check_hessian(who: str, h: LossHessian, dense: Tensor, output: Tensor) -> None:
    """Check all that a Hessian gives at `output` against the dense one, (D, D).

    Errors: AssertionError naming the loss and the product.
    """
    shape = (h.rows, h.places, h.block)
    assert h.rows * h.places * h.block == output.numel(), (
        f"{who}: {shape} blocks for an output of {tuple(output.shape)}"
    )
    s = checked("columns", h.columns(0, h.rank), (h.rank, *shape), who)
    assert s.dtype == output.dtype, f"{who}: columns are {s.dtype}, expected {output.dtype}"
    for a, b in ((0, 1), (h.rank // 2, h.rank), (0, h.rank // 2)):
        same(f"{who}: columns({a}, {b})", h.columns(a, b), s[a:b])
    # each block by itself
    mine = torch.eye(h.rows * h.places, dtype=s.dtype).reshape(-1, 1, h.rows, h.places, 1)
    (apart,) = h.to_outputs((mine * s).flatten(0, 1))
    checked("to_outputs", apart, (mine.shape[0] * h.rank, *output.shape), who)
    apart = apart.reshape(len(apart), -1)
    same(f"{who}: S S^T", apart.T @ apart, dense)
    same(
        f"{who}: norms", checked("norms", h.norms(), (h.rank, *shape[:2]), who), s.square().sum(-1)
    )
    row, place, j = (torch.randint(size, (7,)) for size in (h.rows, h.places, h.rank))
    same(
        f"{who}: columns_at",
        checked("columns_at", h.columns_at(row, place, j), (7, h.block), who),
        s[j, row, place],
    )
    (diagonal,) = h.to_outputs(checked("diagonal", h.diagonal(), shape, who)[None])
    same(f"{who}: diagonal", diagonal.flatten(), dense.diagonal())
    v = torch.randn(3, *shape, dtype=s.dtype)
    found = h.to_outputs(checked("product", h.product(v), v.shape, who))[0].reshape(3, -1)
    same(f"{who}: product", found, h.to_outputs(v)[0].reshape(3, -1) @ dense)
    c = torch.randn(3, h.rank, *shape[:2], dtype=s.dtype)
    same(
        f"{who}: combine",
        checked("combine", h.combine(c), v.shape, who),
        torch.einsum("kjrd,jrdb->krdb", c, s),
    )
    _check_draws(h, dense, who)


def _check_draws(h: LossHessian, dense: Tensor, who: str) -> None:
    """Random combinations of the columns of a factor T, with T T^T = H."""
    shape = (h.rows, h.places)
    units = torch.eye(h.mixed, dtype=h.dtype, device=h.device)[:, :, None, None]
    t = h.mix(units.expand(-1, -1, *shape))
    t = checked("mix", t, (h.mixed, *shape, h.block), who)
    blocks = torch.einsum("jrdb,jrdc->rdbc", t, t)
    v = torch.randn(3, *shape, h.block, dtype=h.dtype, device=h.device)
    found = h.to_outputs(torch.einsum("rdbc,krdc->krdb", blocks, v))[0].reshape(3, -1)
    same(f"{who}: mix", found, h.to_outputs(v)[0].reshape(3, -1) @ dense)
    signs = h.signs(5, torch.Generator().manual_seed(0))
    assert signs.shape == (5, h.mixed, *shape) and bool((signs.abs() == 1).all()), (
        f"{who}: signs are not +1 or -1 for each column"
    )
    drawn = h.sample(5, torch.Generator().manual_seed(0))
    drawn = checked("sample", drawn, (5, *shape, h.block), who)
    same(f"{who}: sample", drawn, torch.einsum("kjrd,jrdb->krdb", signs.to(t.dtype), t))

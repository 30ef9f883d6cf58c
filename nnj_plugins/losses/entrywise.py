"""Losses of each entry, whose Hessian is a diagonal, and margins, which are piecewise linear or
quadratic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nnj

Rule = Callable[..., nnj.LossHessian]


def entrywise(second: Callable[..., Tensor]) -> Rule:
    """The rule of a loss sum_i l(y_i, ...), from its second derivative l'' = second(m, y, *args),
    in float32 at least.
    """

    @functools.wraps(second)
    def rule(m: Any, scale: Tensor, y: Tensor, *args: Any) -> nnj.LossHessian:
        if args[0].shape != y.shape:
            raise NotImplementedError("its arguments are broadcast")
        dtype = torch.promote_types(y.dtype, torch.float32)
        h = second(
            m, y.to(dtype), *[t.detach().to(dtype) if isinstance(t, Tensor) else t for t in args]
        )
        if h.shape != y.shape:
            raise NotImplementedError("its arguments are broadcast")
        h = scale.to(dtype) * h / (max(y.numel(), 1) if m.reduction == "mean" else 1)
        return nnj.DiagonalHessian(h, name=type(m).__name__)

    return rule


@entrywise
def mse(m: nn.MSELoss, y: Tensor, target: Tensor) -> Tensor:
    """(y - t)²: 2."""
    return torch.full_like(y, 2.0)


@entrywise
def bce_with_logits(m: nn.BCEWithLogitsLoss, z: Tensor, target: Tensor) -> Tensor:
    """w ((1 - t) z + (1 + (v - 1) t) log(1 + e^-z)), v the weight of positives: w (1 + (v - 1) t)
    s(z) s(-z).
    """
    h = z.sigmoid() * (-z).sigmoid()
    if m.pos_weight is not None:
        h = h * (1 + (m.pos_weight.detach().to(h.dtype) - 1) * target)
    return h if m.weight is None else h * m.weight.detach().to(h.dtype)


def bce(m: nn.BCELoss, scale: Tensor, p: Tensor, target: Tensor) -> nnj.LossHessian:
    """-w (t log p + (1 - t) log(1 - p)): w (t / p² + (1 - t) / (1 - p)²), in the probability and
    not in its logit.

    The GGN behind a sigmoid is therefore another one than that of BCEWithLogitsLoss. It is had in
    float64: 1 / p² leaves float32 at p = 1e-20, while its root times the sigmoid's derivative is
    about 1.

    Errors: `NNJError` where a probability is rounded to 0 or 1, and the target is not.
    """
    own = torch.promote_types(p.dtype, torch.float32)
    least = torch.where(target == 0, 1.0, p.to(own)).minimum(
        torch.where(target == 1, 1.0, 1 - p.to(own))
    )
    if not bool((least * torch.finfo(own).max > 1).all()):
        raise nnj.NNJError(
            "BCELoss: a probability is rounded to 0 or 1 where its target is not, so that its "
            "curvature is infinite. Give the logits to BCEWithLogitsLoss, which does not round them"
        )
    wide = own if p.device.type == "mps" else torch.float64  # which has no float64
    h = _bce(m, scale.to(wide), p.to(wide), target)
    return nnj.DiagonalHessian(h.diagonal().reshape(p.shape), name=type(m).__name__, dtype=own)


@entrywise
def _bce(m: nn.BCELoss, p: Tensor, target: Tensor) -> Tensor:
    h = torch.where(target == 0, 0.0, target / p.square()) + torch.where(
        target == 1, 0.0, (1 - target) / (1 - p).square()
    )
    return h if m.weight is None else h * m.weight.detach().to(h.dtype)


@entrywise
def smooth_l1(m: nn.SmoothL1Loss, y: Tensor, target: Tensor) -> Tensor:
    """(y - t)² / (2 beta) within beta, else linear: 1 / beta, else 0."""
    return ((y - target).abs() < m.beta).to(y.dtype) / (m.beta or 1)


@entrywise
def huber(m: nn.HuberLoss, y: Tensor, target: Tensor) -> Tensor:
    """(y - t)² / 2 within delta, else linear: 1, else 0."""
    return ((y - target).abs() < m.delta).to(y.dtype)


@entrywise
def poisson_nll(m: nn.PoissonNLLLoss, y: Tensor, target: Tensor) -> Tensor:
    """e^y - t y: e^y; or y - t log(y + eps): t / (y + eps)²."""
    return y.exp() if m.log_input else target / (y + m.eps).square()


@entrywise
def gaussian_nll(m: nn.GaussianNLLLoss, y: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
    """(log v + (y - t)² / v) / 2 with v given: 1 / v."""
    v = torch.as_tensor(var, dtype=y.dtype, device=y.device)
    v = v[..., None] if v.shape != y.shape and v.shape == y.shape[:-1] else v
    return (1 / v.clamp(min=m.eps)).expand(y.shape)


@entrywise
def soft_margin(m: nn.SoftMarginLoss, y: Tensor, target: Tensor) -> Tensor:
    """log(1 + e^(-t y)): t² s(t y) s(-t y)."""
    return target.square() * (target * y).sigmoid() * (-target * y).sigmoid()


def multi_label_soft_margin(
    m: nn.MultiLabelSoftMarginLoss, scale: Tensor, y: Tensor, target: Tensor
) -> nnj.LossHessian:
    """The mean over the last axis of the binary cross entropy of logits, w s(y) s(-y) / C."""
    z = y.to(torch.promote_types(y.dtype, torch.float32))
    h = z.sigmoid() * (-z).sigmoid() / max(y.shape[-1], 1)
    if m.weight is not None:
        h = h * m.weight.detach().to(h.dtype)
    rows = max(y.shape[:-1].numel(), 1) if m.reduction == "mean" else 1
    if h.shape != y.shape or target.shape != y.shape:
        raise NotImplementedError("its arguments are broadcast")
    return nnj.DiagonalHessian(scale.to(h.dtype)[..., None] * h / rows, name=type(m).__name__)


def piecewise_linear(m: nn.Module, scale: Tensor, y: Tensor, *args: Any) -> nnj.LossHessian:
    """Zero: |y - t| and hinges have no curvature away from their kinks, where torch's gradient is
    that of one side.
    """
    return nnj.DiagonalHessian(
        torch.zeros_like(y, dtype=torch.promote_types(y.dtype, torch.float32)),
        name=type(m).__name__,
    )


def multi_margin(
    m: nn.MultiMarginLoss, scale: Tensor, y: Tensor, target: Tensor
) -> nnj.LossHessian:
    """w_t / C sum_c max(0, margin - y_t + y_c)^p over c != t: for p = 1 zero, for p = 2 each active
    c gives 2 w_t / C (e_c - e_t)(e_c - e_t)^T."""
    z = (y if y.dim() > 1 else y[None]).to(torch.promote_types(y.dtype, torch.float32))
    t = target.reshape(-1)
    if m.p == 1 or z.shape[1] < 2:
        return piecewise_linear(m, scale, y)
    active = m.margin - z.gather(1, t[:, None]) + z > 0
    a = 2 * scale.to(z.dtype) / z.shape[1] / (max(len(z), 1) if m.reduction == "mean" else 1)
    a = a * (1.0 if m.weight is None else m.weight.detach().to(z.dtype)[t])
    # which refuses what is negative
    a = nnj.DiagonalHessian(a.expand(len(z)), name=type(m).__name__).h[:, 0]
    return _Pairs(a * active, t, y.shape)


class _Pairs(nnj.LossHessian):
    """sum_c a_c (e_c - e_t)(e_c - e_t)^T with a of (N, C): a column for each class c but t."""

    def __init__(self, a: Tensor, t: Tensor, shape: torch.Size):
        super().__init__([shape], a, a.shape[1], a.shape[1] - 1, len(a))
        self.a, self.t = a, t

    def columns(self, start: int, stop: int) -> Tensor:
        j = torch.arange(start, min(stop, self.rank), device=self.device)[:, None].expand(
            -1, self.rows
        )
        c = j + (j >= self.t)
        own = self.a.gather(1, c.mT).mT.sqrt()[:, :, None, None]
        s = own.new_zeros(*j.shape, 1, self.block)
        s.scatter_(-1, c[:, :, None, None], own)
        return s.scatter_(-1, self.t[:, None, None].expand(*j.shape, 1, 1), -own)


# autograd knows no second derivative of torch's margins, so these are what the rules are compared
# with.


def by_pairs(m: nn.MultiMarginLoss, y: Tensor, target: Tensor) -> Tensor:
    """w_t / C sum_c max(0, margin - y_t + y_c)^p over c != t."""
    z, t = torch.atleast_2d(y), target.reshape(-1, 1)
    pairs = (m.margin - z.gather(1, t) + z).clamp(min=0) ** m.p
    rows = pairs.scatter(1, t, 0.0).sum(1) / z.shape[1]
    return _reduced(
        m, (rows if m.weight is None else rows * m.weight[t[:, 0]]).reshape(target.shape)
    )


def by_label_pairs(m: nn.MultiLabelMarginLoss, y: Tensor, target: Tensor) -> Tensor:
    """1 / C sum_{t, c} max(0, 1 - y_t + y_c) over the targets t, which end at the first -1, and the
    classes c that are none.
    """
    z, t = torch.atleast_2d(y), torch.atleast_2d(target)
    listed = (t >= 0).cumprod(1)
    other = 1 - torch.zeros_like(t).scatter_reduce(1, t.clamp(min=0), listed, "amax")
    pairs = (1 - z.gather(1, t.clamp(min=0))[:, :, None] + z[:, None]).clamp(min=0)
    return _reduced(
        m,
        ((pairs * listed[:, :, None] * other[:, None]).sum((1, 2)) / z.shape[1]).reshape(
            y.shape[:-1]
        ),
    )


def _reduced(m: Any, rows: Tensor) -> Tensor:
    return rows.mean() if m.reduction == "mean" else rows.sum() if m.reduction == "sum" else rows


@nnj.hookimpl
def nnj_register_losses(register: nnj.RegisterLoss) -> None:
    register(nn.MSELoss, mse)
    register(nn.BCEWithLogitsLoss, bce_with_logits)
    register(nn.BCELoss, bce)
    register(nn.SmoothL1Loss, smooth_l1)
    register(nn.HuberLoss, huber)
    register(nn.PoissonNLLLoss, poisson_nll)
    register(nn.GaussianNLLLoss, gaussian_nll)
    register(nn.SoftMarginLoss, soft_margin)
    register(nn.MultiLabelSoftMarginLoss, multi_label_soft_margin)
    register(nn.MultiMarginLoss, multi_margin, reference=by_pairs)
    register(nn.MultiLabelMarginLoss, piecewise_linear, reference=by_label_pairs)
    for cls in (nn.L1Loss, nn.HingeEmbeddingLoss):
        register(cls, piecewise_linear)

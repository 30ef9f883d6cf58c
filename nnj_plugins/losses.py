"""H = d^2 (scale * loss) / d output^2: a (diag(p) - p p^T) for cross entropy, a diagonal for losses of each entry."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnj


def cross_entropy(m: nn.CrossEntropyLoss, scale: Tensor, z: Tensor, target: Tensor) -> nnj.Curvature:
    """-sum_c t_c log softmax(z)_c has the Hessian (sum_c t_c) (diag(p) - p p^T).

    With class weights w and label smoothing e, a class y gives t_c = (1 - e) w_y [c = y] + e w_c / C, or zero if it is
    ignored, and the mean divides by the sum of w_y. Probabilities r give t_c = w_c ((1 - e) r_c + e / C), and the mean
    divides by the number of rows and places. If all targets are ignored, torch's mean is nan, but its gradient is zero,
    and so is the curvature.
    """
    axis, dtype = 0 if z.dim() == 1 else 1, _wide(z)
    classes, e = z.shape[axis], m.label_smoothing
    w = torch.ones(classes, dtype=dtype, device=z.device) if m.weight is None else m.weight.detach().to(dtype)
    if target.shape == z.shape:
        t = target.detach().to(dtype) * (1 - e) + e / classes
        mass = torch.tensordot(t, w, ([axis], [0]))
        total: Tensor | int = max(z.numel() // max(classes, 1), 1)
    else:
        kept = target != m.ignore_index
        own = torch.where(kept, w[torch.where(kept, target, 0).long()], 0.0)
        mass = (1 - e) * own + e / classes * w.sum() * kept
        total = torch.where(kept.any(), own.sum(), 1.0)
    return nnj.SoftmaxCurvature(z, scale.to(dtype) * mass / (total if m.reduction == "mean" else 1), type(m).__name__)


def mse(m: nn.MSELoss, scale: Tensor, y: Tensor, target: Tensor) -> nnj.Curvature:
    """(y - target)² has the second derivative 2 at each entry."""
    h = torch.full_like(y, 2.0, dtype=_wide(y))
    return nnj.DiagonalCurvature(_entries(m, scale, y, target, h), name=type(m).__name__)


def bce_with_logits(m: nn.BCEWithLogitsLoss, scale: Tensor, z: Tensor, target: Tensor) -> nnj.Curvature:
    """w ((1 - t) z + (1 + (v - 1) t) log(1 + e^-z)) has w (1 + (v - 1) t) s(z) s(-z), with v the weight of positives."""
    z = z.to(_wide(z))
    h = z.sigmoid() * (-z).sigmoid()
    if m.pos_weight is not None:
        h = h * (1 + (m.pos_weight.detach().to(h.dtype) - 1) * target.detach().to(h.dtype))
    if m.weight is not None:
        h = h * m.weight.detach()
    return nnj.DiagonalCurvature(_entries(m, scale, z, target, h), name=type(m).__name__)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _entries(m: Any, scale: Tensor, y: Tensor, target: Tensor, h: Tensor) -> Tensor:
    """h under the scale and the reduction of a loss that works on each entry."""
    if target.shape != y.shape or h.shape != y.shape:
        raise NotImplementedError("its arguments are broadcast")
    return scale.to(h.dtype) * h / (max(y.numel(), 1) if m.reduction == "mean" else 1)


def any_loss(m: nn.Module, scale: Tensor, y: Tensor, *args: Any) -> nnj.Curvature:
    """Whatever m.forward computes from the output, differentiated twice."""
    return nnj.twice(lambda y: (m.forward(y, *args) * scale).sum(), (y,), type(m).__name__)


@nnj.hookimpl
def nnj_register_losses(register):
    register(nn.CrossEntropyLoss, cross_entropy)
    register(nn.MSELoss, mse)
    register(nn.BCEWithLogitsLoss, bce_with_logits)
    register(nn.Module, any_loss)

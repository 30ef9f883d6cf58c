"""Losses of classes: H = d^2 (scale * loss) / d output^2 is a (diag(p) - p p^T) for each row and
place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnj


def cross_entropy(
    m: nn.CrossEntropyLoss, scale: Tensor, z: Tensor, target: Tensor
) -> nnj.LossHessian:
    """-sum_c t_c log softmax(z)_c has the Hessian (sum_c t_c) (diag(p) - p p^T).

    With class weights w and label smoothing e, a class y gives t_c = (1 - e) w_y [c = y] + e
    w_c / C, or zero if it is ignored, and the mean divides by the sum of w_y. Probabilities r give
    t_c = w_c ((1 - e) r_c + e / C), and the mean divides by the number of rows and places. If all
    targets are ignored, torch's mean is nan, but its gradient is zero, and so is the curvature."""
    axis, dtype = 0 if z.dim() == 1 else 1, _wide(z)
    classes, e = z.shape[axis], m.label_smoothing
    if target.shape == z.shape:
        t = target.detach().to(dtype) * (1 - e) + e / classes
        mass = torch.tensordot(t, _weights(m, z, classes), ([axis], [0]))
        total: Tensor | int = max(z.numel() // max(classes, 1), 1)
    else:
        kept, own, total = _own_weights(m, dtype, target)
        mass = own
        if e:
            mass = (1 - e) * own + e / classes * _weights(m, z, classes).sum() * kept
    return nnj.SoftmaxHessian(
        z, scale.to(dtype) * mass / (total if m.reduction == "mean" else 1), type(m).__name__
    )


def nll(m: nn.NLLLoss, scale: Tensor, z: Tensor, target: Tensor) -> nnj.LossHessian:
    """-z_y at z = log p is the cross entropy of z, since softmax(log p) = p: its curvature is that
    of cross entropy.

    As a function of any z it is linear, and its own Hessian is zero. But what makes z log
    probabilities, log_softmax, belongs to the convex loss: with J = 1 - 1 p^T, the Jacobian of
    log_softmax, J^T (diag(p) - p p^T) J is the same matrix.

    Errors: `NNJError` if exp(z) does not sum to one over the classes.
    """
    axis = 0 if z.dim() == 1 else 1
    if axis not in nnj.SoftmaxHessian.axes(z):
        raise _linear(m, f"over the classes (axis {axis})")
    _, own, total = _own_weights(m, _wide(z), target)
    return nnj.SoftmaxHessian(
        z, scale.to(own.dtype) * own / (total if m.reduction == "mean" else 1), type(m).__name__
    )


def kl_div(m: nn.KLDivLoss, scale: Tensor, z: Tensor, target: Tensor) -> nnj.LossHessian:
    """sum_c t_c (log t_c - z_c) at z = log p: (sum_c t_c) (diag(p) - p p^T), for the reason given
    for `nll`.

    The classes are the axis (not that of the batch) over which exp(z) sums to one.

    Errors: `NNJError` if there is no such axis, or more than one.
    """
    axes = nnj.SoftmaxHessian.axes(z)
    if not axes:
        raise _linear(m, "over any axis but the first")
    if len(axes) > 1:
        raise nnj.NNJError(
            f"{type(m).__name__}: exp of its input sums to one over each of the axes {axes}, so "
            "nnj cannot tell which of them are the classes. Give it one row for each distribution, "
            "(rows, classes)"
        )
    dtype = _wide(z)
    t = target.detach().to(dtype)
    whole = torch.broadcast_shapes(z.shape, t.shape)
    total = {"mean": whole.numel(), "batchmean": z.shape[0]}.get(m.reduction, 1)
    mass = (
        (scale.to(dtype) * (t.exp() if m.log_target else t))
        .expand(whole)
        .sum_to_size(z.shape)
        .sum(axes[0])
    )
    return nnj.SoftmaxHessian(z, mass / max(total, 1), type(m).__name__, axes[0])


def of_logits(m: nn.NLLLoss | nn.KLDivLoss, z: Tensor, target: Tensor) -> Tensor:
    """The loss of log_softmax(z), of which the rules say the Hessian in z: at log probabilities the
    loss itself.
    """
    axes = nnj.SoftmaxHessian.axes(z)
    axis = axes[0] if isinstance(m, nn.KLDivLoss) and axes else min(1, z.dim() - 1)
    return m.forward(z.log_softmax(axis), target)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _weights(m: Any, z: Tensor, classes: int) -> Tensor:
    return (
        torch.ones(classes, dtype=_wide(z), device=z.device)
        if m.weight is None
        else m.weight.detach().to(_wide(z))
    )


def _own_weights(m: Any, dtype: torch.dtype, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of targets that are classes: which are not ignored, w_y (zero if ignored), and the sum that
    the mean divides by.
    """
    kept = target != m.ignore_index
    if m.weight is None:
        own = kept.to(dtype)
        return kept, own, own.sum().clamp(min=1)
    w = m.weight.detach().to(dtype)
    own = torch.where(kept, w[torch.where(kept, target, 0).long()], 0.0)
    return kept, own, torch.where(kept.any(), own.sum(), 1.0)


def _linear(m: nn.Module, where: str) -> nnj.NNJError:
    return nnj.NNJError(
        f"{type(m).__name__}: exp of its input does not sum to one {where}, so these are no log "
        "probabilities, and in anything else it is linear and has no curvature. Give it the output "
        "of log_softmax, or give logits to CrossEntropyLoss"
    )


def ctc(m: nn.CTCLoss, scale: Tensor, z: Tensor, *args: Any) -> nnj.LossHessian:
    """-log sum over alignments exp(sum of z): concave in z. Errors: `NNJError`, always."""
    raise nnj.NNJError(
        "CTCLoss: minus the logarithm of a sum over alignments is concave in the log "
        "probabilities, so it has no GGN. Use a loss that is convex in the output, such as the "
        "cross entropy of one alignment"
    )


def any_loss(m: nn.Module, scale: Tensor, y: Tensor, *args: Any) -> nnj.LossHessian:
    """Whatever m.forward computes from the output, differentiated twice."""
    return nnj.autodiff_hessian(
        lambda y: (m.forward(y, *args) * scale).sum(), (y,), type(m).__name__
    )


@nnj.hookimpl
def nnj_register_losses(register: nnj.RegisterLoss) -> None:
    register(nn.CrossEntropyLoss, cross_entropy)
    register(nn.NLLLoss, nll, reference=of_logits)
    register(nn.NLLLoss2d, nll, reference=of_logits)
    register(nn.KLDivLoss, kl_div, reference=of_logits)
    register(nn.CTCLoss, ctc)
    register(nn.Module, any_loss)

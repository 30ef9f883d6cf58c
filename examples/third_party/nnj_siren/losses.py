"""log cosh: a square near zero, an absolute value far from it. What nnj needs of a loss is its
Hessian in the output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj


class LogCosh(nn.Module):
    """sum, mean or all of log cosh(y - t)."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        size = (y - target).abs()
        value = size + F.softplus(-2 * size) - math.log(2)  # cosh itself would overflow
        return (
            value.mean()
            if self.reduction == "mean"
            else value.sum()
            if self.reduction == "sum"
            else value
        )


def log_cosh(m: LogCosh, scale: Tensor, y: Tensor, target: Tensor) -> nnj.LossHessian:
    """The second derivative is 1 / cosh^2, and zero between entries; `scale` is what multiplies the
    loss.
    """
    if target.shape != y.shape:
        # nnj then differentiates the loss twice
        raise NotImplementedError("its target is broadcast")
    size = (y - target).abs()
    root = 2 * torch.exp(-size) / (1 + torch.exp(-2 * size))
    return nnj.DiagonalHessian(scale * root.square() / (y.numel() if m.reduction == "mean" else 1))


@nnj.hookimpl
def nnj_register_losses(register):
    register(LogCosh, log_cosh)

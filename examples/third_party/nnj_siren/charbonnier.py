"""l(y, t) = sum of sqrt((y - t)² + eps²): the Charbonnier loss of image regression (Charbonnier et al. 1994)."""
from torch import Tensor, nn

import nnj


class Charbonnier(nn.Module):
    """|y - t|, made smooth within `eps`; `reduction` is "mean", "sum" or "none", as in torch."""

    def __init__(self, eps: float = 1e-3, reduction: str = "mean"):
        super().__init__()
        self.eps, self.reduction = eps, reduction

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        loss = ((y - target).square() + self.eps**2).sqrt()
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


def charbonnier(m: Charbonnier, scale: Tensor, y: Tensor, target: Tensor) -> nnj.Curvature:
    """l'' = eps² / ((y - t)² + eps²)^(3/2), a diagonal Hessian; `scale` is what multiplies the loss in the scalar."""
    if target.shape != y.shape:
        raise NotImplementedError("the target is broadcast")  # nnj then differentiates the loss twice
    h = m.eps**2 / ((y - target).square() + m.eps**2).pow(1.5)
    return nnj.DiagonalCurvature(scale * h / (y.numel() if m.reduction == "mean" else 1), name="Charbonnier")


@nnj.hookimpl
def nnj_register_losses(register):
    register(Charbonnier, charbonnier)

"""y = sin(w x): the activation of SIREN (Sitzmann et al. 2020), with a trainable frequency w for
each feature.
"""

import torch
from torch import Tensor, nn

import nnj


class Sine(nn.Module):
    """(N, *, features) -> (N, *, features)."""

    def __init__(self, features: int, frequency: float = 30.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((features,), frequency))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.weight * x)


def sine(m: Sine, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = w cos(w x) dx;  dy = x cos(w x) dw."""
    w = m.weight.detach()
    c = torch.cos(w * x)
    return {
        "input": nnj.Diagonal(w * c),
        "weight": nnj.ScaleShift(w.shape, x.shape[1:], x, m=lambda: x * c),
    }


@nnj.hookimpl
def nnj_register_layers(register):
    register(Sine, sine, uses="x")

"""y = sin(w x): the activation of SIREN (Sitzmann et al. 2020), with a trainable frequency w for each feature."""
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
    """dy = w cos(w x) dx;  dy = x cos(w x) dw: each as (N, out, in), with the axes of one sample flattened."""
    w = m.weight.detach()
    c = torch.cos(w * x)
    return {"input": nnj.Dense((w * c).flatten(1).diag_embed(), x.shape[1:], y.shape[1:]),
            "weight": nnj.Dense((x * c).diag_embed().flatten(1, -2), w.shape, y.shape[1:])}


@nnj.hookimpl
def nnj_register_layers(register):
    register(Sine, sine, uses="x")

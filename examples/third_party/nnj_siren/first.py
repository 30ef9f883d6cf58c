"""Where to begin with a layer: its Jacobian, entry by entry. layers.py has the same layer, fast."""

import torch
from torch import Tensor

import nnj
from nnj_siren.layers import Sine


class FirstSine(Sine):
    """`Sine` with a dense Jacobian: (N, outputs, inputs) numbers in memory."""


def first_sine(m: FirstSine, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy_i / dx_j = w_i cos(w_i x_i) [i = j];  dy_i / dw_f = x_i cos(w_i x_i) [i is of feature
    f].
    """
    w, row = m.weight.detach(), x.shape[1:]
    c = torch.cos(w * x)
    # (outputs, features)
    of_feature = torch.eye(len(w), dtype=x.dtype, device=x.device).repeat(row[:-1].numel(), 1)
    return {
        "input": nnj.Dense(torch.diag_embed((w * c).flatten(1)), row, row),
        "weight": nnj.Dense((x * c).flatten(1)[:, :, None] * of_feature, w.shape, row),
    }


@nnj.hookimpl
def nnj_register_layers(register):
    register(FirstSine, first_sine, uses="x")

"""y = W[x]: rows of a table, chosen by whole numbers."""
from __future__ import annotations

from torch import Tensor, nn

import nnj


def embedding(m: nn.Embedding, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dW[x], and 0 where x is padding."""
    if m.max_norm is not None or m.scale_grad_by_freq or m.sparse:
        raise NotImplementedError("max_norm, scale_grad_by_freq or sparse")
    keep = None if m.padding_idx is None else x != m.padding_idx
    return {"weight": nnj.Select(x, m.weight.shape, y, keep=keep)}


@nnj.hookimpl
def nnj_register_layers(register):
    register(nn.Embedding, embedding, uses="x")

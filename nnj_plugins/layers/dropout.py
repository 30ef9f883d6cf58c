"""y = x, unless it is training: then the mask is known to the call alone, and so to autograd's
node.
"""

from __future__ import annotations

from torch import Tensor, nn

import nnj


def dropout(m: nn.Dropout, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx."""
    if m.training and m.p > 0:
        raise NotImplementedError("the mask of this call is known to autograd's node alone")
    return {"input": nnj.Identity(x.shape[1:], y.shape[1:], y)}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    for cls in (
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ):
        register(cls, dropout, uses="")

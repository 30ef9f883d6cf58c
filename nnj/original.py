"""The layers of the original nnj by their names: torch's own, which take `add_hooks` and have the
products as methods, and those that it has beyond torch.nn.

    >>> model = nnj.Sequential(nnj.Linear(2, 8), nnj.Tanh(), nnj.Linear(8, 1), add_hooks=True)
    >>> model.jTmjp(x, None, None, wrt="weight", to_diag=True)

Each is what it is called in torch, with the same parameters and state dict; no hook is added by
`add_hooks`, which the original needs and nnj does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnj.products.methods import AbstractJacobian


class _TakesHooks:
    """Drops `add_hooks`."""

    def __init__(self, *args: Any, add_hooks: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)


# The methods stand behind torch's class: what that has is kept, such as its `forward`.


class Linear(_TakesHooks, nn.Linear, AbstractJacobian):
    """torch.nn.Linear."""


class Conv2d(_TakesHooks, nn.Conv2d, AbstractJacobian):
    """torch.nn.Conv2d."""


class Sequential(_TakesHooks, nn.Sequential, AbstractJacobian):
    """torch.nn.Sequential."""


class Tanh(_TakesHooks, nn.Tanh, AbstractJacobian):
    """torch.nn.Tanh."""


class ReLU(_TakesHooks, nn.ReLU, AbstractJacobian):
    """torch.nn.ReLU."""


class Sigmoid(_TakesHooks, nn.Sigmoid, AbstractJacobian):
    """torch.nn.Sigmoid."""


class Softplus(_TakesHooks, nn.Softplus, AbstractJacobian):
    """torch.nn.Softplus."""


class Flatten(_TakesHooks, nn.Flatten, AbstractJacobian):
    """torch.nn.Flatten."""


class MaxPool2d(_TakesHooks, nn.MaxPool2d, AbstractJacobian):
    """torch.nn.MaxPool2d."""


class Upsample(_TakesHooks, nn.Upsample, AbstractJacobian):
    """torch.nn.Upsample."""


class Sinusoidal(_TakesHooks, nn.Module, AbstractJacobian):
    """y = sin(x), entry by entry."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class _TruncExp(torch.autograd.Function):
    """exp, with a slope of its own in both directions of differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return u * TruncExp.slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return v * TruncExp.slope(*ctx.saved_tensors)


class TruncExp(_TakesHooks, nn.Module, AbstractJacobian):
    """y = exp(x), of which the derivative is *said to be* exp(min(max(x, -15), 15)), here and in
    autograd.

    Beyond these bounds that is not the derivative of y: it neither explodes nor vanishes.
    """

    LIMIT = 15.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TruncExp.apply(x)  # type: ignore[no-untyped-call]
        return y

    @classmethod
    def slope(cls, x: Tensor) -> Tensor:
        """What is taken for the derivative."""
        return x.clamp(-cls.LIMIT, cls.LIMIT).exp()


class L2Norm(_TakesHooks, nn.Module, AbstractJacobian):
    """y = x / (|x| + eps), with the norm over all entries of a sample."""

    def __init__(self, eps: float = 1e-6, add_hooks: bool = True):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x.flatten(1), dim=1)
        y: Tensor = x / (norm + self.eps).reshape(-1, *[1] * (x.dim() - 1))
        return y

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class Reshape(_TakesHooks, nn.Module, AbstractJacobian):
    """The entries of each sample in the shape `dims`, one of which may be -1."""

    def __init__(self, *dims: int, add_hooks: bool = True):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class SkipConnection(_TakesHooks, nn.Sequential, AbstractJacobian):
    """y = (x, F(x)) along axis 1, F being the layers one after the other.

    It needs no rule: its layers have theirs, and between layers autograd's own nodes do.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return torch.cat([x, y], 1)

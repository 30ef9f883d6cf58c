"""Losses of torch.nn.functional, given to nnj.extend as functions: the rule of the module that
computes the same.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import nnj

MODULES: dict[Any, type[nn.Module]] = {
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.ctc_loss: nn.CTCLoss,
    F.gaussian_nll_loss: nn.GaussianNLLLoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.l1_loss: nn.L1Loss,
    F.mse_loss: nn.MSELoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.nll_loss: nn.NLLLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}


def _as_module(
    m: nnj.FunctionLoss, y: Tensor, *args: Any, **kwargs: Any
) -> tuple[nn.Module, list[Any]]:
    """F.cross_entropy(y, target, weight), or a partial of it, as CrossEntropyLoss(weight) and
    (y, target).
    """
    function: Any = m.function
    while isinstance(function, functools.partial) and not function.args:
        function, kwargs = function.func, {**function.keywords, **kwargs}
    cls = next((cls for known, cls in MODULES.items() if known is function), None)
    if cls is None:
        raise NotImplementedError("it is no loss of torch.nn.functional")
    bound = inspect.signature(function).bind(y, *args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    options = {name: given.pop(name) for name in inspect.signature(cls).parameters if name in given}
    tensors = [
        given.pop(name)
        for name in list(given)[: len(inspect.signature(cls.forward).parameters) - 1]
    ]
    if any(value is not None for value in given.values()):
        raise NotImplementedError("the module has no such option")
    return cls(**options), tensors


def functional(
    m: nnj.FunctionLoss, scale: Tensor, y: Tensor, *args: Any, **kwargs: Any
) -> nnj.LossHessian:
    """F.cross_entropy(y, target, weight) has the curvature of
    CrossEntropyLoss(weight)(y, target).
    """
    module, tensors = _as_module(m, y, *args, **kwargs)
    return nnj.hessian_of_loss(module, scale, *tensors)


def reference(m: nnj.FunctionLoss, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the module is compared with; another function is its own reference."""
    try:
        module, tensors = _as_module(m, y, *args, **kwargs)
    except NotImplementedError:
        return m.forward(y, *args, **kwargs)
    return nnj.reference_of_loss(module)(module, *tensors)


@nnj.hookimpl
def nnj_register_losses(register: nnj.RegisterLoss) -> None:
    register(nnj.FunctionLoss, functional, reference=reference)

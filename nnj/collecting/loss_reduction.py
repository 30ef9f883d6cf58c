"""How a loss puts a batch together: made a plain sum over samples, with what its mean would divide
by.

A data set comes in batches. Its loss as one batch is sum_b L_b, or sum_b L_b / sum_b W_b, with L_b
the sum over a batch and W_b its share of what the mean divides by: the number of terms, or the sum
of the weights of their classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nnj.errors import NNJError
from nnj.recording.extend import extend, is_extended, retract
from nnj.recording.loss_hook import LossHook
from nnj.registry.loss_rules import FunctionLoss

# torch's mean of these is the sum over the number of terms that reduction="none" gives.
_COUNTED = (
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss,
)
# and that of these over the sum of the classes' weights
_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)


def name_of(loss: Any) -> str:
    """The name of a loss in an error; a function that `extend` has made a module goes by its
    own.
    """
    loss = loss.function if isinstance(loss, FunctionLoss) else loss
    return (
        type(loss).__name__
        if isinstance(loss, nn.Module)
        else getattr(loss, "__name__", repr(loss))
    )


def is_torchs(loss: Any) -> bool:
    """Whether a loss is one of torch's own whose reduction nnj knows; also in a subclass that does
    not override forward.
    """
    own = (*_COUNTED, *_WEIGHTED)
    return (
        isinstance(loss, own)
        and "forward" not in vars(loss)
        and any(type(loss).forward is cls.forward for cls in own)
    )


class SummedLoss:
    """One of torch's losses, as a copy that sums. `weight` is 1; `total` is what the mean of the
    batch divides by.
    """

    def __init__(self, loss: Any, device: torch.device) -> None:
        # of KLDivLoss
        self.name, self.batchmean = type(loss).__name__, loss.reduction == "batchmean"
        self.module, self.terms = self._copy(loss, "sum", device), self._copy(loss, "none", device)
        extend(self.module)

    def _copy(self, loss: Any, reduction: str, device: torch.device) -> Any:
        copied: Any = copy.deepcopy(loss)
        copied.reduction = reduction
        return retract(copied).to(device)

    def weight(self, output: Any, target: Any, n: int) -> int:
        return 1

    def total(self, output: Any, target: Any, n: int) -> float:
        if isinstance(self.module, _WEIGHTED) and not target.is_floating_point():
            return weight_of_classes(self.module, target)
        if self.batchmean:
            return len(output)
        with torch.no_grad():
            result: float = self.terms(output.detach(), target).numel()
            return result


def weight_of_classes(loss: nn.CrossEntropyLoss | nn.NLLLoss, target: Tensor) -> float:
    """sum_i w[y_i] over the targets that are not ignored."""
    kept = target[target != loss.ignore_index].long()
    return kept.numel() if loss.weight is None else loss.weight.detach().double()[kept].sum().item()


class GivenLoss:
    """Any other loss, of which the user says whether it is a sum or a mean over the samples of a
    batch; that is looked into.
    """

    def __init__(self, loss: Any, reduction: str, axis: int):
        self.name = name_of(loss)
        self.module, self.reduction, self.axis = loss, reduction, axis

    def weight(self, output: Any, target: Any, n: int) -> int:
        """What makes a sum of it. Errors: `NNJError` if half the batch and the other half say that
        it is another reduction.
        """
        if n > 1 and all(
            self._has(t, n) for t in tree_leaves((output, target)) if isinstance(t, Tensor)
        ):
            half = n // 2
            with torch.no_grad():
                whole, one, two = (
                    self.module.forward(*self._part(output, target, *part)).detach().double()
                    for part in ((0, n), (0, half), (half, n))
                )
            if self.reduction == "mean":
                whole, one, two = n * whole, half * one, (n - half) * two
            like = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
            if bool(
                (whole - one - two).abs()
                > torch.finfo(like.dtype).eps ** 0.5 * (one.abs() + two.abs())
            ):
                raise NNJError(
                    f"{self.name} is not the {self.reduction} over the samples of a batch, as "
                    f"reduction={self.reduction!r} says: the halves of a batch of {n} make "
                    f"{float(one + two):.6g}, the whole {float(whole):.6g}. Write it as a sum over "
                    "samples, with reduction='sum'"
                )
        return n if self.reduction == "mean" else 1

    def total(self, output: Any, target: Any, n: int) -> float:
        return n

    def _has(self, t: Tensor, n: int) -> bool:
        return t.dim() > 0 and t.shape[min(self.axis, t.dim() - 1)] == n

    def _part(self, output: Any, target: Any, start: int, stop: int) -> Any:
        def cut(t: Any) -> Any:
            return (
                t.narrow(min(self.axis, t.dim() - 1), start, stop - start)
                if isinstance(t, Tensor)
                else t
            )

        return tree_map(cut, (output, target))


@contextmanager
def reduced(
    loss: Any, reduction: str | None, device: torch.device, axis: int = 0
) -> Iterator[SummedLoss | GivenLoss]:
    """The loss as a sum over samples, extended; the given one is afterwards what it was.

    Errors: `NNJError` if nobody can know how it puts a batch together.
    """
    if reduction not in (None, "sum", "mean"):
        raise NNJError(f"reduction={reduction!r}, expected 'sum' or 'mean'")
    if is_torchs(loss):
        if reduction is not None:
            raise NNJError(
                f"reduction={reduction!r} is for losses that nnj does not know; "
                f"{type(loss).__name__} is known, and scale= says whether the data set is summed "
                "or averaged. Leave it out"
            )
        yield SummedLoss(loss, device)
        return
    if not isinstance(loss, nn.Module) and (not callable(loss) or isinstance(loss, type)):
        raise NNJError(
            f"loss_func is {loss!r}, expected a loss module or a function of (output, target)"
        )
    if reduction is None:
        raise NNJError(
            f"nnj does not guess how {name_of(loss)} puts the samples of a batch together. Say "
            "reduction='sum' or reduction='mean', over the samples of the batch"
        )
    ours = not isinstance(loss, nn.Module) or not any(
        isinstance(h, LossHook) for h in loss._forward_hooks.values()
    )
    was = ours and is_extended(loss)
    module = extend(loss, loss=True) if ours else loss
    try:
        yield GivenLoss(module, reduction, axis)
    finally:
        if ours:
            retract(module)
        if was:
            extend(module)

"""How a loss puts a batch together: made a plain sum over samples, with what its mean would divide
by.

A data set comes in batches. Its loss as one batch is sum_b L_b, or sum_b L_b / sum_b W_b, with L_b
the sum over a batch and W_b its share of what the mean divides by: the number of terms, or the sum
of the weights of their classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nnj.errors import NNJError
from nnj.recording.extend import extend, is_extended, retract
from nnj.recording.loss_hook import LossHook
from nnj.recording.loss_state import unmoved
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
# of these each entry of the output has an entry of the target
_ENTRYWISE = tuple(cls for cls in _COUNTED if not cls.__name__.startswith("Multi"))
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


# whose negative log likelihood a loss is, as far as its class says so
_LIKELIHOODS = {
    nn.CrossEntropyLoss: "categorical",
    nn.BCEWithLogitsLoss: "bernoulli",
    nn.MSELoss: "gaussian",
}


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
    batch divides by; `likelihood` names the one of which it is the negative logarithm, or "".
    """

    def __init__(self, loss: Any, device: torch.device) -> None:
        kinds = (name for cls, name in _LIKELIHOODS.items() if isinstance(loss, cls))
        self.likelihood = next(kinds, "")
        # of KLDivLoss
        self.name, self.batchmean = type(loss).__name__, loss.reduction == "batchmean"
        self.module, self.terms = self._copy(loss, "sum", device), self._copy(loss, "none", device)
        extend(self.module)

    def _copy(self, loss: Any, reduction: str, device: torch.device) -> Any:
        copied: Any = copy.deepcopy(loss)
        copied.reduction = reduction
        return retract(copied).to(device)

    def factor(self, n: int) -> int:
        """What makes a sum of the loss of n samples."""
        return 1

    def weight(self, output: Any, target: Any, n: int) -> int:
        """1. Errors: `NNJError` for an output of several parts, and for a target that torch would
        broadcast, since then a sample meets the targets of others.
        """
        if not isinstance(output, Tensor):
            raise NNJError(
                f"{self.name} takes a tensor, and the model gives {type(output).__name__}. Say "
                "which part it is: forward=lambda model, batch: model(batch[0])['logits'], or such"
            )
        if isinstance(self.module, _ENTRYWISE) and output.shape != target.shape:
            raise NNJError(
                f"{self.name}: the output has shape {tuple(output.shape)} and the target "
                f"{tuple(target.shape)}, which torch would broadcast, so that batches do not add "
                "up to the data set. Give both the same shape, such as model(x).squeeze(1)"
            )
        return 1

    def total(self, output: Any, target: Any, n: int) -> Tensor | float:
        if isinstance(self.module, _WEIGHTED) and not target.is_floating_point():
            return weight_of_classes(self.module, target)
        if self.batchmean:
            return len(output)
        if isinstance(self.module, _ENTRYWISE):  # of which `weight` has compared the shapes
            return int(output.numel())
        with torch.no_grad():
            result: float = self.terms(output.detach(), target).numel()
            return result


def weight_of_classes(loss: nn.CrossEntropyLoss | nn.NLLLoss, target: Tensor) -> Tensor:
    """sum_i w[y_i] over the targets that are not ignored, (), on their device."""
    kept = target != loss.ignore_index
    if loss.weight is None:
        return kept.sum()
    w = loss.weight.detach()
    w = w if w.device.type == "mps" else w.double()
    return (w[torch.where(kept, target, 0).long()] * kept).sum()


class _Batch(NamedTuple):
    """What a loss is given for n samples."""

    output: Any
    target: Any
    n: int


class GivenLoss:
    """Any other loss, of which the user says whether it is a sum or a mean over the samples of a
    batch; that is looked into.
    """

    likelihood = ""

    def __init__(self, loss: Any, reduction: str, axis: int):
        self.name = name_of(loss)
        self.module, self.reduction, self.axis = loss, reduction, axis
        self._before: _Batch | None = None

    def factor(self, n: int) -> int:
        """What makes a sum of the loss of n samples."""
        return n if self.reduction == "mean" else 1

    def weight(self, output: Any, target: Any, n: int) -> int:
        """What makes a sum of it.

        Errors: `NNJError` if two halves of the batch, or this batch and the one before, say that it
        is another reduction, or if the batch alone has no finite value.
        """
        detached = lambda t: t.detach() if isinstance(t, Tensor) else t
        here = _Batch(tree_map(detached, output), tree_map(detached, target), n)
        if self._may_be_cut(here):
            before, self._before = self._before, here
            whole = self._value(here)
            if not bool(torch.isfinite(whole)):
                raise NNJError(
                    f"{self.name} gives {float(whole)} for a batch of {n}: all its targets may be "
                    "ignored, over which there is no mean. Write it as a sum over samples, with "
                    "reduction='sum', or leave such batches out"
                )
            if n > 1:
                half = n // 2
                self._check(
                    whole,
                    [self._part(here, 0, half), self._part(here, half, n)],
                    f"the halves of a batch of {n}",
                    here,
                )
            joined = None if before is None else self._joined(before, here)
            if before is not None and joined is not None:
                self._check(
                    self._value(joined),
                    [before, here],
                    f"batches of {before.n} and {n}, one behind the other,",
                    joined,
                )
        return self.factor(n)

    def _may_be_cut(self, batch: _Batch) -> bool:
        """Whether all tensors have the samples along one axis, and it is known which."""
        known = tree_leaves((batch.output, batch.target))
        return (
            batch.n > 0
            and any(isinstance(t, Tensor) for t in tree_leaves(batch.output))
            and all(self._has(t, batch.n) for t in known if isinstance(t, Tensor))
        )

    def _check(self, whole: Tensor, parts: list[_Batch], what: str, batch: _Batch) -> None:
        """Errors: `NNJError` unless parts make up the whole."""
        one, two = (self._value(part) for part in parts)
        if self.reduction == "mean":
            whole, one, two = batch.n * whole, parts[0].n * one, parts[1].n * two
        like = next(t for t in tree_leaves(batch.output) if isinstance(t, Tensor))
        if not bool(
            (whole - one - two).abs()
            <= torch.finfo(like.dtype).eps ** 0.5 * (one.abs() + two.abs())
        ):
            raise NNJError(
                f"{self.name} is not the {self.reduction} over the samples of a batch, as "
                f"reduction={self.reduction!r} says: {what} make {float(one + two):.6g}, the whole "
                f"{float(whole):.6g}. Write it as a sum over samples, with reduction='sum'"
            )

    def _value(self, batch: _Batch) -> Tensor:
        """The loss of a batch, which leaves no trace on it."""
        like = next(t for t in tree_leaves(batch.output) if isinstance(t, Tensor))
        with torch.no_grad(), unmoved(self.module, like.device):
            value: Tensor = self.module.forward(batch.output, batch.target)
        return value.detach().double()

    def _joined(self, one: _Batch, two: _Batch) -> _Batch | None:
        """Two batches one behind the other; None if they have not the same shapes beside."""

        def join(a: Any, b: Any) -> Any:
            return torch.cat([a, b], min(self.axis, a.dim() - 1)) if isinstance(a, Tensor) else a

        try:
            output = tree_map(join, one.output, two.output)
            return _Batch(output, tree_map(join, one.target, two.target), one.n + two.n)
        except (RuntimeError, ValueError, TypeError):
            return None

    def total(self, output: Any, target: Any, n: int) -> float:
        return n

    def _has(self, t: Tensor, n: int) -> bool:
        # a model with its samples in axis 1 may give them in axis 0, and that may be as long
        axis = min(self.axis, t.dim() - 1)
        return t.dim() > 0 and t.shape[axis] == n and (axis == 0 or t.shape[0] != n)

    def _part(self, batch: _Batch, start: int, stop: int) -> _Batch:
        def cut(t: Any) -> Any:
            return (
                t.narrow(min(self.axis, t.dim() - 1), start, stop - start)
                if isinstance(t, Tensor)
                else t
            )

        return _Batch(tree_map(cut, batch.output), tree_map(cut, batch.target), stop - start)


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

"""What a batch of a data set is: what goes into the model, the target, and how many samples."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nnj.errors import NNJError


def moved(batch: Any, device: torch.device) -> Any:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)


def read(batch: Any, forward: Any, target: str | Callable[[Any], Any] | None) -> tuple[Any, Any]:
    """What goes into the model, and the target."""
    if callable(target):
        wanted, inputs = target(batch), batch
        if forward is None:
            raise NNJError(
                "target= is a function, so nnj does not know what of a batch is for the model. Say "
                "forward=, too"
            )
        return inputs, wanted
    if isinstance(batch, dict):
        key = "labels" if target is None else target
        if key not in batch:
            raise NNJError(
                f"a batch has the keys {', '.join(map(repr, batch))}, and not {key!r} for the "
                "target. Say which it is with target=, a key or a function of the batch"
            )
        return {k: v for k, v in batch.items() if k != key}, batch[key]
    if target is not None:
        raise NNJError(
            f"target={target!r} is a key, but a batch is {type(batch).__name__}. Give a function "
            "of the batch"
        )
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        what = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(batch).__name__
        )
        alone = "; or, if the data are one batch, give [(x, y)]" * isinstance(batch, Tensor)
        raise NNJError(
            f"a batch is {what}, expected (x, ..., y) or a dict. Say forward=lambda model, batch: "
            f"output and target=lambda batch: target{alone}"
        )
    return batch[:-1], batch[-1]


def length(inputs: Any, axis: int) -> int:
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() > 0), None)
    if first is None:
        raise NNJError(
            "a batch has no tensor with a batch axis for the model: expected (x, ..., y) or a dict "
            "of tensors"
        )
    return first.shape[min(axis, first.dim() - 1)]


def scalar(value: Any, loss: str) -> Tensor:
    """The value of a loss. Errors: `NNJError` for what is no scalar that has a gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad:
        return value
    what = type(value).__name__
    if isinstance(value, Tensor):
        what = (
            f"a tensor of shape {tuple(value.shape)}"
            if value.dim() > 0
            else "a scalar that does not"
        )
    raise NNJError(
        f"{loss} gave {what}, expected a scalar that depends on the parameters of the model"
    )


def with_bar(loader: Iterable[Any], progress: bool, what: str) -> Iterable[Any]:
    """A loader that shows a bar while it is read, if tqdm is installed."""
    if not progress:
        return loader
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        warnings.warn(
            "progress=True shows a bar by tqdm, which is not installed: pip install tqdm",
            stacklevel=3,
        )
        return loader
    result: Iterable[Any] = tqdm(loader, desc=what, unit="batch")
    return result

"""nnj.fit: quantities of a whole data set in one call, equal to those of one backward pass over all
of it as one batch.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from nnj.collecting.collect import _open, collect
from nnj.collecting.fit_result import Fit
from nnj.collecting.loss_reduction import GivenLoss, SummedLoss, reduced
from nnj.errors import NNJError
from nnj.recording.extend import batch_axis_of, check_hookable, temporarily_extended


def fit(
    model: nn.Module,
    loss_func: Any,
    loader: Iterable[Any],
    *quantities: str,
    scale: str = "sum",
    reduction: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    target: str | Callable[[Any], Any] | None = None,
    progress: bool = False,
    modules: Iterable[nn.Module] | None = None,
    **options: Any,
) -> Fit:
    """Quantities of a data set, exactly those of one backward pass over all of it as one batch, in
    eval mode.

    Args:
        model: any model, extended or not. Afterwards it is as it was: `p.grad`, the mode of each
            part, its hooks, also after an error or an interrupt; only what an earlier `collect`
            left under the names of the quantities is gone.
        loss_func: one of torch's losses, whose own reduction is of no account; or any other module
            or function of (output, target), and then `reduction` says what it makes of the samples
            of a batch.
        loader: batches (x, ..., y): loss_func(model(x, ...), y). Or dicts:
            loss_func(model(**others), batch["labels"]). Tensors are moved to the device of the
            model's first parameter.
        quantities: names, as `nnj.collect` takes them.
        scale: "sum": of the loss summed over the data set, as by reduction="sum". "mean": of its
            mean, as by reduction="mean":
            divided by what the mean of the whole data set divides by (the number of its rows or
            entries, or the sum of the weights of their classes). Of other losses than torch's: by
            the number of samples.
        reduction: "sum" or "mean" over the samples of a batch, for a loss that is none of torch's.
        forward: `forward(model, batch)` gives the output, where the rule above does not.
        target: the key of the target in a batch that is a dict, or `target(batch)`.
        progress: show a bar, if tqdm is installed.
        modules, options: as in `nnj.collect`, such as tol=.

    Parameters that no sample reached have zeros; those that do not require grad are left out.
    Per-sample quantities are concatenated in the order of the loader.

    Errors: `NNJError` for an empty loader, a batch that the rule does not read, a loss whose
    reduction nobody knows, and whatever `nnj.collect` refuses."""
    if scale not in ("sum", "mean"):
        raise NNJError(f"scale={scale!r}, expected 'sum' or 'mean'")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise NNJError(
            f"loader is a data set of single samples ({type(loader).__name__}), expected batches. "
            "Give torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if _open.get(threading.get_ident()):
        raise NNJError(
            "nnj.fit inside an nnj.collect would add its passes to that one. Call it outside of "
            "the `with`"
        )
    check_hookable(model)
    sums = _Sums(model, collect(*quantities, modules=modules, **options), scale)
    device, axis = next(model.parameters()).device, batch_axis_of(model)
    with (
        temporarily_extended(model),
        in_eval_mode(model),
        reduced(loss_func, reduction, device, axis) as loss,
    ):
        with torch.inference_mode(False), torch.enable_grad():
            for given in _bar(loader, progress):
                batch = _moved(given, device)
                inputs, wanted = _read(batch, forward, target)
                n = _length(inputs, axis)
                if n > 0:
                    output = (
                        forward(model, batch)
                        if forward
                        else model(**inputs)
                        if isinstance(inputs, dict)
                        else model(*inputs)
                    )
                    sums.add(loss, output, wanted, n)
    if sums.samples == 0:
        raise NNJError(
            "the loader gave no samples, and a data set has at least one. (An iterator can be read "
            "only once)"
        )
    return sums.result(loss.name)


class _Sums:
    """What has been collected in the batches so far: sums, and lists of what has one row for each
    sample.
    """

    def __init__(self, model: nn.Module, collected: collect, scale: str):
        self.model, self.collected, self.scale = model, collected, scale
        tops = [model] if collected.modules is None else collected.modules
        inside = {id(p) for top in tops for p in top.parameters() if p.requires_grad}
        self.params = {name: p for name, p in model.named_parameters() if id(p) in inside}
        if not self.params:
            raise NNJError(
                "no parameter of the model (or of modules=) requires grad: there is nothing to "
                "collect at"
            )
        for name, quantity in collected.quantities.items():
            if scale == "mean" and quantity.degree is None:
                raise NNJError(
                    f"{name}: {type(quantity).__name__} does not say how it grows with the loss "
                    "(its attribute degree), so that nnj.fit cannot divide it. Use scale='sum'"
                )
        self.samples, self.total = 0, 0.0
        self.trace = self.dropped = 0.0  # under tol=
        self.values: dict[str, dict[int, Any]] = {name: {} for name in collected.quantities}
        self.counts: list[int] = []  # samples in each batch

    def add(self, loss: SummedLoss | GivenLoss, output: Any, target: Any, n: int) -> None:
        """One batch: a backward pass that leaves no gradients."""
        total = loss.total(output, target, n) if self.scale == "mean" else 0.0
        weight = loss.weight(output, target, n)
        value = loss.module(output, target)
        if not isinstance(value, Tensor) or value.dim() > 0 or not value.requires_grad:
            what = type(value).__name__
            if isinstance(value, Tensor):
                what = (
                    f"a tensor of shape {tuple(value.shape)}"
                    if value.dim() > 0
                    else "a scalar that does not"
                )
            raise NNJError(
                f"{loss.name} gave {what}, expected a scalar that depends on the parameters of the "
                "model"
            )
        c = self.collected
        try:
            with c:
                torch.autograd.grad(weight * value, list(self.params.values()), allow_unused=True)
            for name, known in c.results.items():
                self._take(name, {id(holder): v for holder, v in known.items() if v is not None})
        finally:
            for name, known in c.results.items():
                for holder in known:
                    vars(holder).pop(name, None)
        if (
            isinstance(loss, GivenLoss)
            and c.samples != n
            and (loss.reduction == "mean" or self.scale == "mean")
        ):
            raise NNJError(
                f"a batch has {n} samples by its first tensor and {c.samples} by the rows of the "
                f"loss, so that a mean over samples is not known. Write {loss.name} as a sum, with "
                "reduction='sum' and scale='sum'"
            )
        self.samples += c.samples
        self.trace, self.dropped = self.trace + c.trace, self.dropped + c.deficit * c.trace
        self.total += total
        self.counts.append(c.samples)

    def _take(self, name: str, found: dict[int, Tensor]) -> None:
        mine = self.values[name]
        for key, value in found.items():
            if self.collected.quantities[name].per_sample:
                rows = mine.setdefault(key, [])
                # None: a batch that did not reach it
                rows += [None] * (len(self.counts) - len(rows)) + [value]
            else:
                mine[key] = mine[key] + value if key in mine else value

    def result(self, loss: str) -> Fit:
        """Errors: `NNJError` for a mean over a weight of zero."""
        if self.scale == "mean" and not self.total > 0:
            raise NNJError(
                f"the mean of {loss} over this data set divides by {self.total:g}: all targets are "
                "ignored, or of weight zero"
            )
        values: dict[str, dict[str, Tensor]] = {}
        quantities = self.collected.quantities
        for name, quantity in quantities.items():
            factor = self.total ** -(quantity.degree or 0) if self.scale == "mean" else 1.0
            rows = quantity.per_sample
            found = {key: self._joined(v) if rows else v for key, v in self.values[name].items()}
            holders: Any = (
                self.model.named_modules() if quantity.of_modules else self.params.items()
            )
            values[name] = {}
            for path, holder in holders:
                value = found.get(id(holder))
                if value is None and not quantity.of_modules and self._fills(found, rows):
                    value = holder.detach().new_zeros(
                        *((self.samples,) if rows else ()), *holder.shape
                    )
                if value is not None:
                    values[name][path] = (value * factor if self.scale == "mean" else value).to(
                        _dtype(holder, value)
                    )
        return Fit(
            values,
            samples=self.samples,
            scale=self.scale,
            total=self.total if self.scale == "mean" else 1.0,
            loss=loss,
            per_sample=tuple(n for n, q in quantities.items() if q.per_sample),
            of_modules=tuple(n for n, q in quantities.items() if q.of_modules),
            deficit=self.dropped / self.trace if self.trace else 0.0,
        )

    def _joined(self, rows: list[Tensor | None]) -> Tensor:
        like = next(t for t in rows if t is not None)
        rows = rows + [None] * (len(self.counts) - len(rows))
        return torch.cat(
            [
                like.new_zeros(n, *like.shape[1:]) if t is None else t
                for t, n in zip(rows, self.counts, strict=True)
            ]
        )

    def _fills(self, found: dict[int, Tensor], rows: bool) -> bool:
        """Whether the quantity has the shapes of parameters, so that its zero is known."""
        return all(
            tuple(found[id(p)].shape[rows:]) == tuple(p.shape)
            for p in self.params.values()
            if id(p) in found
        )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every part has its own flag again."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _dtype(holder: Any, value: Tensor) -> torch.dtype:
    """As `collect` gives it: the dtype of the parameter, or of the first of a module."""
    p = next(holder.parameters(recurse=False), None) if isinstance(holder, nn.Module) else holder
    return value.dtype if p is None else p.dtype


def _moved(batch: Any, device: torch.device) -> Any:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)


def _read(batch: Any, forward: Any, target: str | Callable[[Any], Any] | None) -> tuple[Any, Any]:
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
        raise NNJError(
            f"a batch is {what}, expected (x, ..., y) or a dict. Say forward=lambda model, batch: "
            "output and target=lambda batch: target"
        )
    return batch[:-1], batch[-1]


def _length(inputs: Any, axis: int) -> int:
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() > 0), None)
    if first is None:
        raise NNJError(
            "a batch has no tensor with a batch axis for the model: expected (x, ..., y) or a dict "
            "of tensors"
        )
    return first.shape[min(axis, first.dim() - 1)]


def _bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
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
    return tqdm(loader, desc="nnj.fit", unit="batch")

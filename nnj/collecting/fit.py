"""nnj.fit: quantities of a whole data set in one call, equal to those of one backward pass over all
of it as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from nnj.collecting.batches import length, moved, read, scalar, with_bar
from nnj.collecting.fit_over_ranks import Read, group_of_shards, in_step, shared, unwrapped
from nnj.collecting.fit_result import Fit, Origin, versions_of
from nnj.collecting.joint_matrix import Names
from nnj.collecting.loss_reduction import GivenLoss, SummedLoss, reduced
from nnj.collecting.pass_program import Passed, PassProgram, names_of_results, why_never
from nnj.collecting.passes import Collection, is_collecting
from nnj.collecting.quantity import WHOLE, Holder, Quantity, Whole, is_simple
from nnj.collecting.request import Request
from nnj.compiling.cases import Cases
from nnj.distributed.ranks import Ranks
from nnj.errors import NNJError
from nnj.propagation.called import call, logits_of
from nnj.recording.extend import (
    batch_axis_of,
    check_hookable,
    is_own_hook,
    temporarily_extended,
)
from nnj.recording.replicas import check_replicas
from nnj.recording.sharded import Sharding, sharded_models
from nnj.recording.wrappers import check_not_flat


def fit(
    model: nn.Module,
    loss_func: Any,
    loader: Iterable[Any],
    *quantities: str | Quantity,
    scale: str = "sum",
    reduction: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    target: str | Callable[[Any], Any] | None = None,
    progress: bool = False,
    modules: Iterable[nn.Module] | None = None,
    compile: bool | str = False,
    group: Any = None,
    **options: Any,
) -> Fit:
    """Quantities of a data set, exactly those of one backward pass over all of it as one batch, in
    eval mode.

    >>> fit = nnj.fit(model, torch.nn.CrossEntropyLoss(), loader, "ggn_diag")
    >>> fit["ggn_diag"]["0.weight"], fit.vector("ggn_diag")

    Args:
        model: any model, extended or not. Afterwards it is as it was: `p.grad`, the mode of each
            part, its hooks and attributes, also after an error or an interrupt.
        loss_func: one of torch's losses, whose own reduction is ignored; or any other module or
            function of (output, target), and then `reduction` says what it makes of the samples of
            a batch.
        loader: batches (x, ..., y): loss_func(model(x, ...), y). Or dicts:
            loss_func(model(**others), batch["labels"]). Tensors are moved to the device of the
            model's first parameter. Backward passes that the loader itself runs are not collected.
        quantities: names, as `nnj.collect` takes them.
        scale: "sum": of the loss summed over the data set, as by reduction="sum". "mean": of its
            mean, as by reduction="mean": divided by what the mean of the whole data set divides by
            (the number of its rows or entries, or the sum of the weights of their classes). Of
            other losses than torch's: by the number of samples.
        reduction: "sum" or "mean" over the samples of a batch, for a loss that is none of torch's.
            Where it can be, this is checked on the halves of each batch, and on each batch together
            with the one before.
        forward: `forward(model, batch)` gives the output, where the rule above does not.
        target: the key of the target in a batch that is a dict, or `target(batch)`.
        progress: show a bar, if tqdm is installed.
        modules, options: as in `nnj.collect`, such as tol=.
        compile: replay the pass of a batch as a graph, as `nnj.compile` does, from the fourth batch
            of a shape on: True, or the name of a backend. It pays where there are many batches of
            few shapes.
        group: a process group whose ranks each give a part of the data set: results are those of
            all of it, on all ranks. None: that of DistributedDataParallel, if the model is under
            it; False: this rank's data alone.

    Returns:
        A `nnj.Fit`. Parameters that no sample reached have zeros; those that do not require grad
        are left out. Rows of per-sample quantities are in the order of the loader, and all of them
        are kept in memory.

    Several processes
        Each rank reads its own loader, of any number of batches, none included. Before it, ranks
        compare their parameters and buffers, which are those of one model; what is sent after it
        are sums alone. A model under DistributedDataParallel is called without it. Rows of
        per-sample quantities are those of this rank. A `DistributedSampler` pads its shards with
        samples that then count twice, which is refused: give `torch.utils.data.Subset(data,
        range(rank, len(data), world_size))`. So are two ranks that read the same samples. An error
        of one rank is raised on all, with its rank. Files of separate jobs, without any group:
        `nnj.Fit.merge`.
        A model that `fully_shard` shards is called on all ranks in each pass: all have one batch at
        least, and one that has no more is given its last one again, which counts nothing.

    What is refused, what a sample is and what it costs: see `nnj.collect`. A data set of negative
    log likelihoods, for a Laplace posterior, wants scale="sum".

    Errors: `NNJError` for an empty loader, a batch that the rule does not read, a loss whose
    reduction nobody knows or is not as said, a target that torch would broadcast, a mean over a
    weight of zero, a call inside an open `nnj.collect`, parts of a model under
    DistributedDataParallel, shards that are padded, ranks with other parameters or buffers, and
    whatever `nnj.collect` refuses."""
    if scale not in ("sum", "mean"):
        raise NNJError(f"scale={scale!r}, expected 'sum' or 'mean'")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise NNJError(
            f"loader is a data set of single samples ({type(loader).__name__}), expected batches. "
            "Give torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if is_collecting():
        raise NNJError(
            "nnj.fit inside an nnj.collect would add its passes to that one. Call it outside of "
            "the `with`"
        )
    check_hookable(model)
    check_not_flat(model.modules())
    model, group = unwrapped(model, group)
    sharding = Sharding([model]) if sharded_models([model]) else None
    if sharding is not None:
        group = group_of_shards(sharding, group)
    ranks = None if group is None else Ranks(group, "nnj.fit")
    request = Request.by_name(quantities, modules=modules, group=group or False, **options)
    run = _Run(model, request, scale, ranks, sharding)
    if ranks is not None:
        check_replicas(ranks, model, sharding is not None)
    backend = None
    if compile:
        backend = compile if isinstance(compile, str) else "inductor"
    device, axis = next(model.parameters()).device, batch_axis_of(model)
    with (
        temporarily_extended(model),
        in_eval_mode(model),
        reduced(loss_func, reduction, device, axis) as loss,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        evaluate = _Evaluate(model, loss, forward, target, axis)
        first = run.first(loader)
        if first is not None:
            with first.shared(loss, loader):
                _read(first, evaluate, with_bar(loader, progress, "nnj.fit"), device, backend)
        with run.knowing(first), run.shared(loss, loader):
            _read(run, evaluate, with_bar(loader, progress, "nnj.fit"), device, backend)
    found = run.result(loss)
    found.spread = None if sharding is None else sharding.group
    found.origin = Origin(model, forward, target, versions_of(run.params.values()))
    return found


def _read(
    run: _Run, evaluate: _Evaluate, loader: Iterable[Any], device: torch.device, backend: str | None
) -> None:
    """Collect over all batches."""
    if run.sharding is not None:
        _read_together(run, evaluate, loader, device)
        return
    cases = None if backend is None else _cases(run, evaluate, backend)
    for given in loader:
        batch = moved(given, device)
        inputs, wanted = read(batch, evaluate.forward, evaluate.target)
        n = length(inputs, evaluate.axis)
        run.see(inputs, wanted, n, evaluate.axis)
        if n > 0 and cases is not None:
            run.add_replayed(evaluate.loss, cases(batch), wanted, n)
        elif n > 0:
            run.add(evaluate.loss, evaluate.output(batch), wanted, n)


def _read_together(
    run: _Run, evaluate: _Evaluate, loader: Iterable[Any], device: torch.device
) -> None:
    """Collect over all batches of a model that calls on all ranks in each pass."""
    assert run.ranks is not None

    def batches() -> Iterator[Any]:
        for given in loader:
            batch = moved(given, device)
            inputs, wanted = read(batch, evaluate.forward, evaluate.target)
            n = length(inputs, evaluate.axis)
            if n > 0:
                run.see(inputs, wanted, n, evaluate.axis)
                yield batch, wanted, n

    for (batch, wanted, n), counts in in_step(batches(), run.ranks):
        with run.counting(counts):
            run.add(evaluate.loss, evaluate.output(batch), wanted, n)


class _Evaluate:
    """The scalar of a batch of which the sum over batches is that of the data set."""

    def __init__(self, model: nn.Module, loss: SummedLoss | GivenLoss, *how: Any):
        self.model, self.loss = model, loss
        self.forward, self.target, self.axis = how

    def output(self, batch: Any) -> Any:
        """Of the model."""
        if self.forward:
            return self.forward(self.model, batch)
        return logits_of(call(self.model, read(batch, None, self.target)[0]))

    def __call__(self, batch: Any) -> tuple[Tensor, Any]:
        """The scalar, and the output of the model."""
        inputs, wanted = read(batch, self.forward, self.target)
        output, n = self.output(batch), length(inputs, self.axis)
        value = scalar(self.loss.module(output, wanted), self.loss.name)
        return self.loss.factor(n) * value, output


def _cases(run: _Run, evaluate: _Evaluate, backend: str) -> Cases[Passed]:
    program = PassProgram(evaluate, [run.model, evaluate.loss.module], run.request, gradients=False)
    return Cases(
        program,
        backend,
        verify=run.request.verify,
        ignored=names_of_results(run.request),
        is_own=is_own_hook,
        never=why_never(run.request),
    )


class _Run:
    """One collection over all batches, and what the mean over them divides by.

    It is open during the backward passes of the batches alone, so what the loader does is not in
    it.
    """

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        scale: str,
        ranks: Ranks | None = None,
        sharding: Sharding | None = None,
    ):
        self.model, self.request, self.scale, self.ranks = model, request, scale, ranks
        self.sharding, self.collection = sharding, Collection(request)
        self.collection.over_shards.mean = False
        tops = [model] if request.modules is None else request.modules
        inside = {p for top in tops for p in top.parameters() if p.requires_grad}
        self.params = {name: p for name, p in model.named_parameters() if p in inside}
        if not self.params:
            raise NNJError(
                "no parameter of the model (or of modules=) requires grad: there is nothing to "
                "collect at"
            )
        for name, quantity in request.quantities.items():
            if scale == "mean" and quantity.degree is None:
                raise NNJError(
                    f"{name}: {type(quantity).__name__} does not say how it grows with the loss "
                    "(its attribute degree), so that nnj.fit cannot divide it. Use scale='sum'"
                )
        self.done = Read()

    def add(self, loss: SummedLoss | GivenLoss, output: Any, target: Any, n: int) -> None:
        """One batch of n samples: a backward pass that leaves no gradients."""
        weight = loss.weight(output, target, n)
        value = scalar(loss.module(output, target), loss.name)
        before = self.collection.accumulator.samples
        leaves: Iterable[Tensor] = self.params.values()
        if self.sharding is not None:  # of which others are in the graph
            leaves = [p for p in self.sharding.sharded if p.requires_grad]
        with self.collection:
            torch.autograd.grad(weight * value, list(leaves), allow_unused=True)
        if not self.collection.over_shards.counts:
            return
        rows = self.collection.accumulator.samples - before
        total = loss.total(output, target, n)
        self._ended(loss, rows, n, total, (weight * value).detach())

    def see(self, inputs: Any, target: Any, n: int, axis: int) -> None:
        """A batch, which other ranks are not to have, too."""
        if self.ranks is not None:
            self.done.seen.add(inputs, target, n, axis)

    @contextmanager
    def counting(self, counts: bool) -> Iterator[None]:
        """While passes count, or only those of other ranks do."""
        self.collection.over_shards.counts = counts
        try:
            yield
        finally:
            self.collection.over_shards.counts = True

    def add_replayed(
        self, loss: SummedLoss | GivenLoss, passed: Passed, target: Any, n: int
    ) -> None:
        """The same, of a pass that was run already."""
        loss.weight(passed.more, target, n)  # which refuses what does not add up
        total = loss.total(passed.more, target, n)
        before = self.collection.accumulator.samples
        self.collection.add_pass(passed.contributions)
        rows = self.collection.accumulator.samples - before
        self._ended(loss, rows, n, total, passed.value)

    def _ended(
        self, loss: SummedLoss | GivenLoss, rows: int, n: int, total: Tensor | float, value: Tensor
    ) -> None:
        if (
            isinstance(loss, GivenLoss)
            and rows != n
            and (loss.reduction == "mean" or self.scale == "mean")
        ):
            raise NNJError(
                f"a batch has {n} samples by its first tensor and {rows} by the rows of the loss, "
                f"so that a mean over samples is not known. Write {loss.name} as a sum, with "
                "reduction='sum' and scale='sum'"
            )
        self.done.total += total
        wide = value.dtype if value.device.type == "mps" else torch.float64
        self.done.value = self.done.value + value.to(wide)
        self.done.samples += n

    def shared(self, loss: SummedLoss | GivenLoss, loader: Any) -> AbstractContextManager[None]:
        """What is read inside is afterwards that of all ranks."""
        facts = loss.name, loss.likelihood, self.scale
        of_data = facts, loader
        accumulator = self.collection.accumulator
        model = self.model if self.sharding is None else None
        return shared(self.done, accumulator, self.request, model, self.ranks, of_data)

    def first(self, loader: Iterable[Any]) -> _Run | None:
        """The run of what some quantities must know before; None if there is nothing.

        Errors: `NNJError` for a loader that can be read only once.
        """
        request = self.request.first()
        if request is None:
            return None
        if isinstance(loader, Iterator):
            raise NNJError(
                f"{', '.join(request.quantities)}: the data are read twice, and an iterator can be "
                "read only once. Give a list of batches or a DataLoader, or what is needed before "
                "(basis= an earlier kfac)"
            )
        found = _Run(self.model, request, "sum", self.ranks, self.sharding)
        found.collection.over_shards.spread = False  # all ranks must know it
        return found

    @contextmanager
    def knowing(self, first: _Run | None) -> Iterator[None]:
        """While quantities know what was collected before."""
        names = list[str]()
        try:
            if first is not None:
                names = list(first.request.quantities)
                for name in names:
                    found = first.collection.accumulator.values(name)
                    known = {holder: value for holder, value in found if value is not None}
                    self.request.quantities[name].given(known)
            yield
        finally:
            for name in names:
                self.request.quantities[name].given(None)

    def result(self, loss: SummedLoss | GivenLoss) -> Fit:
        """All batches together. Errors: `NNJError` for no samples, a mean over a weight of zero."""
        accumulator, quantities = self.collection.accumulator, self.request.quantities
        samples = accumulator.every_sample or accumulator.samples
        if samples == 0:
            raise NNJError(
                "the loader gave no samples, and a data set has at least one. (An iterator can be "
                "read only once)"
            )
        total = self.done.total = float(self.done.total)
        if self.scale == "mean" and not total > 0:
            raise NNJError(
                f"the mean of {loss.name} over this data set divides by {total:g}: all "
                "targets are ignored, or of weight zero"
            )
        made = {name: self._values(name) for name in quantities}
        context: dict[str, Tensor] = {}
        for name in quantities:
            context |= accumulator.totals(name, self._of_loss)
        return Fit(
            {name: found for name, found in made.items() if quantities[name].place is not Whole},
            quantities,
            Names.of(self.model, self.params.values()),
            {name: self._states(name) for name, q in quantities.items() if not is_simple(q)},
            context,
            samples=samples,
            rows=accumulator.samples,
            runs=[self.done.run] if self.done.run else [],
            scale=self.scale,
            total=total if self.scale == "mean" else 1.0,
            loss=loss.name,
            loss_value=float(self.done.value) * self._of_loss,
            terms=total,
            likelihood=loss.likelihood,
            trace=accumulator.exact.trace,
            deficit=accumulator.exact.deficit,
        )

    @property
    def _of_loss(self) -> float:
        """What the loss of the data set is of the sum over batches."""
        return float(1 / self.done.total) if self.scale == "mean" else 1.0

    def _places(self, name: str) -> Mapping[str, Holder]:
        """Where results of a quantity may stand, by name and in order."""
        place = self.request.quantities[name].place
        if place is nn.Module:
            return dict(self.model.named_modules())
        return {"": WHOLE} if place is Whole else self.params

    def _values(self, name: str) -> dict[str, Any]:
        """The results of a quantity by the names of their places, in their order."""
        accumulator, quantity = self.collection.accumulator, self.request.quantities[name]
        factor = self._of_loss ** (quantity.degree or 0)
        found = {}
        for path, holder in self._places(name).items():
            if isinstance(holder, Tensor):
                found[path] = accumulator.value_or_zeros(name, holder, factor)
            else:
                found[path] = accumulator.value(name, holder, factor)
        return {path: value for path, value in found.items() if value is not None}

    def _states(self, name: str) -> dict[str, Any]:
        """Those of a quantity by the names of their places."""
        accumulator, places = self.collection.accumulator, self._places(name).items()
        found = {path: accumulator.state(name, holder) for path, holder in places}
        return {path: state for path, state in found.items() if state is not None}


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

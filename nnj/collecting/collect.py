"""nnj.collect: quantities of the backward passes inside a `with`, as attributes of parameters and
modules.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn
from typing_extensions import Self, override

from nnj.collecting.accumulate import Accumulator, Contribution, Holder, dtype_of
from nnj.collecting.passes import Collection
from nnj.collecting.request import Request

# By thread and quantity: the modules that have its attribute, or whose parameters may have it. (Not
# the parameters: torch.utils.swap_tensors refuses what somebody refers to weakly.)
_published: dict[tuple[int, str], weakref.WeakSet[nn.Module]] = {}


class collect(Collection):  # noqa: N801
    """Collect quantities during the backward passes inside the `with`.

    >>> with nnj.collect("ggn_diag", "ggn_block"):
    ...     for x, y in loader:
    ...         loss_func(model(x), y).backward()

    Args:
        quantities: names: "ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad", and those of
            installed plugins.
        modules: collect at the parameters of these modules alone; columns go no further back than
            they must.
        memory: bytes that the columns may take; if there are more of them, they go through the
            model in several chunks. On a CPU under glibc the process keeps as many freed bytes for
            the next chunk (1 GiB at most), which saves up to a fifth of the time. NNJ_MALLOPT=0 in
            the environment switches that off, and what MALLOC_TRIM_THRESHOLD_,
            MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES say there holds.
        tol: leave out columns that carry little: what is lost, over the batch, is at most `tol` of
            the trace of the Hessians in the outputs. ggn_diag and ggn_block are then lower bounds
            (their difference from the exact ones is positive semi-definite), for the price of
            `columns` columns. A model that is sure of most of its answers needs few.
        signed: take losses that are not convex in the output, and negative factors: H = H_+ - H_-,
            propagated one after the other. Only for quantities of the exact Hessian, such as
            ggn_diag and ggn_block, which may then be negative.
        verify: compare with autograd the first time that a graph has a structure (layers, shapes,
            connections): two gradients of random cotangents, once. What a rule, a layer, a function
            or a hook does that is not what it seems is refused then. A user's hook on gradients
            that only looks is called twice more in that pass. Linear hooks are found by it, in
            each pass of a structure that has them; without it they are not seen. Another number of
            hooks registered from the model's call on makes another structure; a hook on a tensor
            that only looked, and begins to change gradients, is not seen. NNJ_VERIFY=never, first
            or always in the environment says it for the whole process.
        options: keyword arguments of the quantities, such as samples= and generator= of
            ggn_diag_mc, block_limit= of ggn_block.

    Attributes:
        samples, passes: how many samples and backward passes there were so far.
        columns: how many exact columns the loss that had most of them sent back. Of a loss of
            tokens (or pixels) those of all tokens of a sample are counted, though they walk
            together until tokens mix.
        trace: under `tol`, that of the Hessians in the outputs, over all backward passes so far.
        deficit: what was left out under `tol`, as a part of that trace.

    Results
        They are attributes under the quantity's name: on each parameter that requires grad, of its
        shape, or on modules; None where no backward pass reached it, as in `.grad`. Passes add up,
        as `.grad` does; rows of per-sample quantities come one behind the other, in the order of
        the forward calls. They stay after the `with`; entering anew, in the same thread, removes
        them. `p.grad` is what it would be without nnj. `torch.autograd.grad` collects, too.

    Scaling
        Every quantity is that of exactly the scalar on which `.backward()` was called: the
        reduction of the loss, class weights, `0.5 * loss`, `loss / accumulation_steps` and the sum
        of several losses all count.

        - `CrossEntropyLoss()`: of the mean over the batch; summed over batches it is a sum of
          means.
        - `CrossEntropyLoss(reduction="sum")`: of the negative log likelihood. A Laplace posterior
          needs this one: its precision is ggn_diag plus the precision of the prior.
        - `0.5 * MSELoss(reduction="sum")`: of the negative log likelihood of a Gaussian with
          variance 1.
        - Terms that no extended loss made, such as weight decay, have no part in it.

    Several processes
        Under `torch.nn.parallel.DistributedDataParallel` (extend the model before it is wrapped, or
        after) the results of each process are those of its own loss, on its own part of the batch;
        nothing is reduced over processes, as `p.grad` is. Gradients are bit for bit those without
        nnj, in all of its modes. DDP averages gradients over W processes: the loss behind them is
        1 / W times the sum of all, so that its ggn_diag and ggn_block are 1 / W times the sums of
        those of the processes (`dist.all_reduce`), and its batch_grad is that of each, over W.

    What is refused
        By `NNJError`, which says what to do; `p.grad` is intact then: the error is raised at the
        end of the pass, when DDP has reduced the gradients, and training may go on.

        - What makes the samples of a batch influence one another: BatchNorm in training mode
          (use `model.eval()`), contrastive losses.
        - Losses that are not convex in the output (cosine, triplet, a Gaussian with a learned
          variance) and negative factors, both without `signed=True`; outputs that are not finite.
        - `NLLLoss` and `KLDivLoss` on what is no log probability. They are taken together with the
          log_softmax before them: their curvature is that of cross entropy.
        - `BCELoss` where a probability is rounded to 0 or 1 and its target is not: give the logits
          to `BCEWithLogitsLoss`.
        - A loss that enters the scalar nonlinearly (`loss.exp()`, `ce ** 2`), or reaches the model
          otherwise than through its arguments: make one function of the outputs of the whole.
        - A loss that was changed between its call and the backward pass, draws random numbers, or
          detaches a gradient inside.
        - A loss that a model computes itself (transformers, given `labels=`): take its logits, and
          a loss of your own.
        - Complex parameters, except for batch_grad: hold their real and imaginary parts in real
          ones. Complex tensors between real parameters and a real output are exact.
        - A hook on a tensor, a parameter or a layer that changes gradients and is not linear in
          them, draws random numbers, keeps a state, or mixes samples; a full backward hook that
          asks for the gradient of the output, backward hooks of modules that contain others, and
          hooks on nodes. Columns go through linear hooks on tensors, parameters and layers that
          a rule describes (factors, masks, implicit gradients): `batch_grad.sum(0)` is what arrives
          at `.grad`, as far as this loss is concerned, and curvature is that of the J that autograd
          computes with them. Products refuse these, too, since a hook has no forward.
        - `scale_grad_by_freq=True`, whose `.grad` is not a gradient.
        - Models, losses and steps under `torch.compile` or `torch.jit` (extend and use what was
          given to it), and `torch.utils.checkpoint` with `use_reentrant=True`.
        - Parameters that are sharded or distributed (FSDP, `fully_shard`, DTensor, tensor
          parallelism), DistributedDataParallel with `mixed_precision=`, and DataParallel on several
          devices: they train on as without nnj. `SyncBatchNorm` in training mode.
        - Models on the device "meta", and nested tensors.
        - Parameters that are others at the time of the backward pass than in the call, and would
          be left without a result: `torch.func.functional_call` with others for all or some of
          them, also inside a model. What is made of the parameters themselves (a mask times p) is
          taken, and so are parameters of an extended model in the place of others.
        - Parameters and buffers, of layers or read as they are, that have other data than in the
          call (`p.data = ...`); what is written into the data (`p.data.mul_(2)`) nobody can see,
          and `.grad` is as wrong.
        - `modules=` outside of every extended model. (Of one that the pass does not reach the
          result is None, as `.grad` is.)
        - An `autograd.Function` whose backward is not linear in the gradient.
        - A ggn_block beyond `block_limit`.

    What a sample is
        A row of the batch axis of the extended model's output, in the order of its input: axis 0,
        or what `nnj.extend(model, batch_axis=1)` says, of outputs (T, N, C) of sequence-first
        models; not a row of the loss. What the loss is given may be any view, permutation,
        selection or repetition of it (`logits.view(-1, V)`, `z[mask]`, `torch.cat([z, z[order]])`):
        names of autograd's nodes tell whose its entries are, or else a probe does (2 log2 N columns
        or tangents, twice), as inside of the model.

        - An output with no axis of N entries is read in every way in which samples do not influence
          one another: sums over samples are the same in each. Where several are left, and what the
          first layer was given does not tell, batch_grad is refused.
        - A model that is called on parts of a batch (of 6 and 2) has 8 samples, in the order of the
          calls. Two parts of as many may be the same samples or others: batch_grad is refused.
        - A loss that compares samples in pairs takes these together: sums are exact, each one's
          share of the gradient is its own. One that takes all of them together is refused.
        - Inputs and outputs of one axis each, which is not that of a batch, are one sample.
        - That a model permutes its samples, and never undoes it, nobody can see:
          `nnj.testing.check_model` runs them one by one, and finds it.

    What it costs
        - One column for each degree of freedom of the loss (C - 1 for cross entropy with C
          classes), or for each feature of the last layer if there are fewer. With many classes use
          `tol=1e-3`, ggn_diag_mc or `modules=[...]`.
        - Layers with a rule are fastest. Other layers of torch.nn, subclasses that override
          `forward`, parametrizations, pruning and hooks go through autograd, which is as exact.
          Parameters without a layer (attention's projections, recurrent cells, adapters, fx and
          exported models) are as fast as layers where they enter a matrix product, a convolution
          on one or two axes, or a sum along the last axis.
        - A layer's rule keeps the layer's input or output alive as long as autograd's graph, also
          under `torch.utils.checkpoint`, which then saves less memory.

    How exact it is
        As the forward pass, in its dtype; dropout in training is exact for the masks of the call.
        In autocast, and in half precision, sums are taken in float32 and results have the dtype of
        the parameter. Norms and softmaxes that cast to float32 whatever they are given are as
        precise as float32.

    Errors: `NNJError` for an unknown quantity or option; for what is refused, after the backward
    pass; on exit, if no extended loss took part in any backward pass."""

    def __init__(
        self,
        *quantities: str,
        modules: Iterable[nn.Module] | None = None,
        memory: int = 2**28,
        tol: float = 0.0,
        signed: bool = False,
        verify: bool = True,
        **options: Any,
    ):
        super().__init__(
            Request.by_name(
                quantities,
                modules=modules,
                memory=memory,
                tol=tol,
                signed=signed,
                verify=verify,
                **options,
            )
        )

    @classmethod
    def of(cls, request: Request) -> Self:
        """Collect what a request asks for."""
        found = cls.__new__(cls)
        Collection.__init__(found, request)
        return found

    @property
    def samples(self) -> int:
        return self.accumulator.samples

    @property
    def passes(self) -> int:
        return self.accumulator.passes

    @property
    def columns(self) -> int:
        return self.accumulator.exact.k

    @property
    def trace(self) -> float:
        return self.accumulator.exact.trace

    @property
    def deficit(self) -> float:
        return self.accumulator.exact.deficit

    @override
    def __enter__(self) -> Self:
        self.check_closed()
        self.accumulator = Accumulator(self.request.quantities)
        self._holders: dict[str, weakref.WeakSet[nn.Module]] = {}  # at which each was set
        for name in self.request.quantities:
            _withdraw(name)
        return super().__enter__()

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
            if kind is None and self._covered():
                self._publish()
        finally:
            self.accumulator.let_go()

    @override
    def pass_ended(self) -> None:
        self._publish()

    def _covered(self) -> bool:
        """Whether a collection within this one has taken away what this one has set."""
        thread = threading.get_ident()
        return any(_published.get((thread, name)) is not h for name, h in self._holders.items())

    def _publish(self) -> None:
        """Set the attributes."""
        thread = threading.get_ident()
        for name in self.request.quantities:
            holders = _published.setdefault((thread, name), weakref.WeakSet())
            self._holders[name] = holders
            holders |= self.accumulator.modules
            for holder, value in self.accumulator.values(name):
                vars(holder)[name] = value


class PassByPass:
    """Results of single passes as attributes: those of a pass take the place of those before."""

    def __init__(self, request: Request):
        self.request = request
        self._holders: dict[str, weakref.WeakSet[nn.Module]] = {}
        self._last: list[Holder] = []

    def publish(self, contributions: list[Contribution]) -> None:
        """Set the attributes to what one pass has added."""
        if not self._again(contributions):
            with collect.of(self.request) as alone:
                alone.add_pass(contributions)
            self._holders, self._last = alone._holders, _places(contributions)

    def _again(self, contributions: list[Contribution]) -> bool:
        """The same for the same places as the last time, if nothing else has been collected since:
        nothing is to be taken away, and nothing to be added up.
        """
        thread, holders = threading.get_ident(), self._holders
        if len(contributions) != 1 or not holders:
            return False
        if any(_published.get((thread, name)) is not holders[name] for name in holders):
            return False
        places = _places(contributions)
        same = len(places) == len(self._last) and all(map(operator.is_, places, self._last))
        for name in holders if same else ():
            for holder, value in contributions[0].values(name).items():
                vars(holder)[name] = value.to(dtype_of(holder) or value.dtype)
        return same


def _places(contributions: list[Contribution]) -> list[Holder]:
    """Where one contribution may have values, and where it has."""
    if len(contributions) != 1:
        return []
    (found,) = contributions
    return [*found.holders, *(holder for name in found.names() for holder in found.values(name))]


def _withdraw(name: str) -> None:
    """Remove the attributes that earlier collections of this thread have set."""
    tops = list(_published.pop((threading.get_ident(), name), ()))
    # also in parts that they got since, such as a parametrization that has taken a parameter
    for m in dict.fromkeys(part for top in tops for part in top.modules()):
        for holder in (m, *m._parameters.values()):
            if holder is not None:
                vars(holder).pop(name, None)

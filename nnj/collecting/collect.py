"""nnj.collect: quantities of the backward passes inside a `with`, as attributes of parameters and
modules.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, override

from nnj.collecting.accumulate import Accumulator, result
from nnj.collecting.contribution import Contribution
from nnj.collecting.joint_matrix import (
    checked_matrix,
    holder_at,
    matrix_of_places,
    model_and_names,
    models_of,
)
from nnj.collecting.over_ranks import OverRanks
from nnj.collecting.passes import Collection
from nnj.collecting.quantity import Holder, Quantity, Whole
from nnj.collecting.request import Request
from nnj.distributed.ranks import Ranks, there_are_groups
from nnj.errors import NNJError
from nnj.graph.traverse import marks_behind
from nnj.matrices.matrix import Matrix
from nnj.recording.placement import whole_of
from nnj.recording.records import LossCall
from nnj.recording.scope import modules_of
from nnj.recording.tensor_parallel import check_group
from nnj.recording.wrappers import data_group, first_group

# By thread and quantity: the modules that have its attribute, or whose parameters may have it. (Not
# the parameters: torch.utils.swap_tensors refuses what somebody refers to weakly.)
_published: dict[tuple[int, str], weakref.WeakSet[nn.Module]] = {}


class collect(Collection):  # noqa: N801
    """Collect quantities during the backward passes inside the `with`.

    >>> with nnj.collect("ggn_diag", "ggn_block"):
    ...     for x, y in loader:
    ...         loss_func(model(x), y).backward()

    Args:
        quantities: names of installed plugins, such as "ggn_diag", "ggn_block", "batch_grad",
            "kfac" (`nnj.collect("?")` names all), or a `nnj.Quantity` itself.
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
            `columns` columns. A model that is sure of most of its answers needs few. Where sums
            such as these two alone are collected, and most layers have rules, each sample walks as
            many as it needs: the cost follows the mean uncertainty, not that of the least sure.
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
        group: the process group over which data are split. None: that of
            DistributedDataParallel, where the model is called through it, or of `fully_shard`;
            False: none, so that results are those of this process.
        options: keyword arguments of the quantities, such as samples= and generator= of
            ggn_diag_mc, block_limit= of ggn_block. Each goes to all named ones that declare it.

    Attributes:
        samples, passes: how many samples and backward passes there were so far; over ranks the
            samples of all of them, once it is closed.
        columns: how many exact columns the loss that had most of them sent back: under `tol` those
            of the sample that has most. Of a loss of tokens (or pixels) those of all tokens of a
            sample are counted, though they walk together until tokens mix.
        trace: under `tol`, that of the Hessians in the outputs, over all backward passes so far.
        deficit: what was left out under `tol`, as a part of that trace.

    Results
        They are attributes under the quantity's name: on each parameter that requires grad, of its
        shape, or on modules; None where no backward pass reached it, as in `.grad`. Passes add up,
        as `.grad` does; rows of per-sample quantities come one behind the other, in the order of
        the forward calls. What belongs to all parameters together is an attribute of the context
        (`with nnj.collect("ggn") as context`, then `context.ggn`). They stay after the `with`;
        entering anew, in the same thread, removes those of parameters and modules. `p.grad` is what
        it would be without nnj. `torch.autograd.grad` collects, too.

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
        after), or with group=, results are those of one process that differentiates the mean over
        W ranks of their losses, which is the one whose gradient DDP puts into `.grad`. They are the
        same bits on all ranks, and `.grad` is bit for bit what it is without nnj, in all modes of
        DDP.

        - Nothing is sent during the passes (also under `no_sync`), and what is on the attributes
          before the `with` ends is not to be read. Then all ranks meet once, also one that has had
          no batch; sums go over the ranks in one reduction, and other states are merged by one
          rank each.
        - Rows of samples stay on their rank, in the order of its batches, and are those of its loss
          over W, so that all of them add up to `.grad`; `context.gather(name)` has the rows of all
          ranks. batch_grad_dot is of each rank's samples.
        - Monte Carlo draws are others on each rank, also with one seed.
        - What a rank refuses inside is raised on all ranks, with its number, at the end of the
          `with`; gradients go on until then. Any other exception leaves at once, and the others
          are told.
        - Refused are communication hooks, `join(divide_by_initial_world_size=False)`, ranks whose
          parameters differ, and, without group=, calls of which only some go through DDP, and
          parameters that it was told to ignore. `join` goes inside of the `with`.
        - `nnj.fit` weighs samples by the data set, and this one by the loss of each rank.

        Models that `fully_shard` shards
            Columns walk while two units at most are whole that FSDP had sharded, and sums are
            shared out as they are done: `p.ggn_diag` is a DTensor placed as p is, also under mixed
            precision policies and `set_gradient_divide_factor`; ggn_block and ggn are sharded by
            rows; kfac and other results of modules stand on the modules of one rank each, to which
            they go when the last column has come to a module, or in passes of several losses at
            their end. Rows of samples are of whole parameters. A refusal is raised on all ranks in
            the same pass.

        Tensor parallelism
            Of linear layers under `ColwiseParallel` and `RowwiseParallel`, between plain tensors,
            each rank walks with its part: `p.ggn_diag` is placed as p is, `p.batch_grad` one axis
            on, and norms are sums over the mesh. Blocks and Kronecker factors are whole on all
            ranks. Name with group= the ranks over which data are split, where they are, too:
            `group=mesh["dp"].get_group()`; not where `fully_shard` splits them, of whose mesh
            results are, placed over both dimensions.

        See nnj/distributed/README.md for what is sent, and how much.

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
        - Stages of `torch.distributed.pipelining` and engines of DeepSpeed, when the `with` ends;
          FullyShardedDataParallel (use `fully_shard`), models that `fully_shard` shards in parts or
          over several meshes, DTensors other than in linear layers between plain tensors,
          DistributedDataParallel with `mixed_precision=`, and DataParallel on several devices: they
          train on as without nnj. `SyncBatchNorm` in training mode.
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
        *quantities: str | Quantity,
        modules: Iterable[nn.Module] | None = None,
        memory: int = 2**28,
        tol: float = 0.0,
        signed: bool = False,
        verify: bool = True,
        group: Any = None,
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
                group=group,
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
        every = self.accumulator.every_sample
        return self.accumulator.samples if every is None else every

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
        self._totals: dict[str, Tensor] | None = None  # of the context, once it is closed
        self._kept: Exception | None = None  # the first refusal, until all ranks are told
        self._ranks: Ranks | None = None  # over which results are, once it is closed
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
            ranks = self._found_ranks()
            if ranks is None:
                super().__exit__(kind, error, traceback)
                if kind is None and self._kept is not None:
                    raise self._kept
            else:
                self._over_ranks(ranks, error)
            if kind is None and (ranks is not None or self._covered()):
                self._publish()
            if kind is None:
                self._totals = self._found_totals()
        finally:
            self.accumulator.let_go()

    @override
    def pass_ended(self) -> None:
        if not self._splits(self.accumulator.wrappers):  # else it is not all of it
            self._publish()

    # -- over ranks --------------------------------------------------------------------------------

    def _splits(self, wrappers: Iterable[nn.Module | None]) -> bool:
        """Whether calls through wrappers are a part of what is collected over ranks."""
        group = self.request.group
        if self.accumulator.every_sample is not None:
            return False
        return any(w is not None for w in wrappers) if group is None else group is not False

    @override
    def refuse_pass(self, error: Exception, calls: Sequence[LossCall]) -> bool:
        super().refuse_pass(error, calls)
        if self._kept is not None:
            return True
        marks = [m for c in calls for m in marks_behind(c.edges)]
        wrappers = {m.wrapper for m in marks}
        if self._splits(wrappers):
            self.accumulator.wrappers |= wrappers
        elif all(m.engine is None for m in marks):  # else other ranks wait for what comes behind
            return False
        self._kept = error
        return True

    def _found_ranks(self) -> Ranks | None:
        """Over which results are. What stands against it is raised for all of them."""
        accumulator, group = self.accumulator, self.request.group
        if group is False or accumulator.every_sample is not None:  # of sharded models: done
            return None
        if group is None and not there_are_groups():
            return None
        models = models_of(accumulator.modules)
        try:
            group = data_group(accumulator.wrappers, models, group)
        except NNJError as error:
            if group is None and not self._splits(accumulator.wrappers):
                raise
            self._kept = self._kept or error
            group = first_group(accumulator.wrappers) if group is None else group
        try:
            check_group(group, models)
        except NNJError as error:
            self._kept = self._kept or error
        return None if group is None else Ranks(group, "nnj.collect")

    def _over_ranks(self, ranks: Ranks, error: BaseException | None) -> None:
        """Close, and make the results those of all ranks.

        Errors: `NNJError`, on all ranks, for what any has refused.
        """
        self._close()
        if error is not None:
            ranks.leave(error)
            return
        self._ranks = ranks
        found = OverRanks(self.accumulator, self.request, ranks, mean=True)
        taken = models_of(self.accumulator.modules)
        notes = found.add_up(taken, models_of() if not taken else (), self._kept)
        if all(note.models is None for note in notes):
            raise self.nothing()
        self.accumulator.settle()

    def gather(self, quantity: str) -> dict[str, Tensor]:
        """A quantity that has the samples in axis 0, with the rows of all ranks, one rank after the
        other, by the names of parameters: (N, *p), N over all ranks. Of a rank that had no samples
        it has no rows. All ranks of the group call it, after the `with`, while the attributes
        stand; without a group it is what this process has.

        Errors: `NNJError` for a quantity that has no rows or was not collected, and for several
        models.
        """
        asked_for = self._asked(quantity)
        if not asked_for.per_sample or asked_for.place is not Tensor:
            raise NNJError(
                f"{quantity!r} has no rows of samples at parameters: over ranks it is whole "
                "already. Gather one that has, such as batch_grad"
            )
        model, names = model_and_names(self.accumulator.modules, self.request.modules)
        self._check_there(quantity)
        rows = {}
        for path in names.shapes:
            value = getattr(holder_at(model, path), quantity, None)
            if value is not None:
                rows[path] = whole_of(value)
        ranks, group = self._ranks, self.accumulator.group
        if group is not None:
            ranks = Ranks(group, "nnj.collect")
        if ranks is None:
            return rows
        ranks.meet()
        return ranks.rows(rows, next(model.parameters()).device)

    def matrix(self, quantity: str) -> Matrix:
        """A quantity as one matrix over all parameters of the model (or of modules=) that require
        grad, flattened in the order of `parameters()`: see `nnj.matrices`. Those that no pass
        reached are zero. It is made of the attributes, while they stand.

        Errors: `NNJError` for a quantity that is no matrix or was not collected, and for several
        models.
        """
        asked_for = self._asked(quantity)
        if self.accumulator.group is not None:
            raise NNJError(
                f"{quantity} of a model that fully_shard shards is spread over ranks (DTensors, "
                "and matrices of some modules), so that no rank has all of the matrix. Take its "
                "parts from the attributes"
            )
        model, names = model_and_names(self.accumulator.modules, self.request.modules)
        if asked_for.place is Whole:
            whole = self.__getattr__(quantity)
            return checked_matrix(quantity, asked_for.matrix(whole, names.shapes))
        self._check_there(quantity)
        values = {}
        for path in names.own if asked_for.place is nn.Module else names.shapes:
            value = getattr(holder_at(model, path), quantity, None)
            if value is not None:
                values[path] = value
        return checked_matrix(quantity, matrix_of_places(asked_for, values, names))

    def _asked(self, quantity: str) -> Quantity:
        """Errors: `NNJError` for one that is not collected."""
        found = self.request.quantities.get(quantity)
        if found is None:
            known = ", ".join(self.request.quantities)
            raise NNJError(f"{quantity!r} is not collected here. Collected: {known}")
        return found

    def _check_there(self, quantity: str) -> None:
        """Errors: `NNJError` if the attributes are those of another collect."""
        if _published.get((threading.get_ident(), quantity)) is not self._holders.get(quantity):
            raise NNJError(
                f"a later nnj.collect of {quantity} has taken the results of this one away. Ask "
                "for its matrix, or its rows, before"
            )

    def __getattr__(self, name: str) -> Any:
        """What belongs to all parameters together, such as `context.ggn`."""
        if name.startswith("_") or "accumulator" not in vars(self):
            raise AttributeError(name)
        totals = vars(self).get("_totals")
        totals = self._found_totals() if totals is None else totals
        if name in totals:
            return totals[name]
        has = f"It has {', '.join(totals)}" if totals else "It has none of such results"
        quantity = self.request.quantities.get(name)
        if quantity is not None and quantity.place is not Whole:
            one = "module" if quantity.place is nn.Module else "parameter"
            has = f"Results stand on each {one}, as {one}.{name}"
        raise AttributeError(
            f"nnj.collect of {', '.join(self.request.quantities)} has no {name!r}. {has}"
        )

    def _found_totals(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.request.quantities:
            found |= self.accumulator.totals(name)
        return found

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
            quantity = self.request.quantities[name]
            for holder, state in contributions[0].at(name).items():
                vars(holder)[name] = result(name, quantity, holder, state, contributions[0].n)
        return same


def _places(contributions: list[Contribution]) -> list[Holder]:
    """Where one contribution may have values, and where it has."""
    if len(contributions) != 1:
        return []
    (found,) = contributions
    return [*found.holders, *(holder for at in found.states.values() for holder in at)]


def _withdraw(name: str) -> None:
    """Remove the attributes that earlier collections of this thread have set."""
    tops = list(_published.pop((threading.get_ident(), name), ()))
    # also in parts that they got since, such as a parametrization that has taken a parameter
    for m in dict.fromkeys(part for top in tops for part in modules_of(top)):
        for holder in (m, *m._parameters.values()):
            if holder is not None:
                vars(holder).pop(name, None)

"""nnj.compile: a whole pass as one graph: forward, backward and all quantities, replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from nnj.collecting.batches import read, scalar
from nnj.collecting.collect import PassByPass
from nnj.collecting.contribution import Contribution
from nnj.collecting.loss_reduction import name_of
from nnj.collecting.pass_program import Passed, PassProgram, names_of_results, why_never
from nnj.collecting.passes import Collection, open_collections
from nnj.collecting.quantity import Holder, Quantity, Whole
from nnj.collecting.request import Request
from nnj.compiling.cases import Cases
from nnj.errors import NNJError
from nnj.propagation.called import call, logits_of
from nnj.recording.extend import check_hookable, extend, is_own_hook
from nnj.recording.sharded import is_unit
from nnj.recording.wrappers import check_not_flat


def compile(
    model: nn.Module,
    loss_func: Any,
    *quantities: str | Quantity,
    backend: str = "inductor",
    limit: int = 8,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    target: str | Callable[[Any], Any] | None = None,
    modules: Iterable[nn.Module] | None = None,
    memory: int = 2**28,
    tol: float = 0.0,
    signed: bool = False,
    verify: bool = True,
    **options: Any,
) -> Step:
    """One pass of a model and a loss as a function, which is traced once and then replayed.

    >>> step = nnj.compile(model, loss_func, "ggn_diag", "batch_grad")
    >>> loss, results = step(x, y)

    does what this does, in a fraction of the time where Python takes most of it:

    >>> with nnj.collect("ggn_diag", "batch_grad"):
    ...     loss = loss_func(model(x), y)
    ...     loss.backward()

    Args:
        model, loss_func: as `nnj.extend` takes them, which both are given to.
        quantities: names, as `nnj.collect` takes them.
        backend: "inductor" compiles the graph (on a CPU by a C++ compiler, such as gcc; where there
            is none, it is replayed as by "aot", with a warning). "aot" calls its operators one by
            one, without Python in between. "cudagraphs" records the work of a GPU.
        limit: how many cases are traced, and how often a case is traced anew; beyond it passes run
            eagerly.
        forward, target: as in `nnj.fit`; a batch is `(x, ..., y)`, or a dict.
        modules, memory, tol, signed, options: as in `nnj.collect`.
        verify: as in `nnj.collect`; also whether a graph is compared with an eager pass before it
            stands for it.

    Returns:
        A `Step`. `step(x, y)`, or `step(batch)`, gives the loss and the results of this pass:
        `results["ggn_diag"]["0.weight"]`, `results.context["noise_scale"]`. Gradients are added to
        `.grad`. Inside a `with nnj.collect(...)` results add up over passes, as those of backward
        passes do; outside of one the attributes are those of this pass alone.

    Cases
        A graph stands for one case: shapes, dtypes and devices of the batch and of all parameters
        and buffers; the mode of each module (training or not), its class, parts and hooks; autocast
        and the other settings of torch; and every plain Python value in the attributes of all
        modules and of the loss, of the classes that are not torch's, and of the objects in them,
        such as a configuration. Where any of it is another, that is another case.
        The first pass of a case is eager, the second is traced, the third is replayed and compared
        with an eager one, and those after it are replayed. Parameters and buffers are inputs of the
        graph: they may have other values, or be other tensors.
        What is asked of a tensor while tracing (is it finite, is the loss convex, which entries are
        not zero) is asked again in each replay, in one flag that is read once. Where the answer is
        another one, the pass is run eagerly, which raises the errors of `nnj.collect`; and if there
        is none, it is traced anew.

    What cannot be seen
        Globals, closures, files, the clock, and what Python's and numpy's generators draw: what
        `forward`, the model or the loss read from there is baked into the graph. Make it an
        attribute of a module, a tensor, or a part of the batch. Prints and other side effects of a
        forward pass happen while it is traced, and not in replays.

    What runs eagerly, after a warning that says why
        Models with hooks of the user, on modules or parameters; a forward pass that changes an
        attribute or writes into a buffer (BatchNorm in training); what turns a real tensor into a
        number of Python (`.item()`, `float(t)`, `.numpy()`); `tol=`, whose number of columns
        follows the data; inputs that require grad; what torch cannot trace. `step.reasons` lists
        the reasons.

    Random numbers
        Dropout in training and Monte Carlo columns are drawn anew in each replay. Under "aot", and
        with a `generator=` of yours under every backend, they are those that the eager pass draws;
        inductor has generators of its own. Ranks whose generators have one seed draw the same here,
        unlike in the eager pass: give `generator=` a seed of its own on each.

    Several processes
        A pass is one of this process, and so are the gradients. Inside `with nnj.collect(...,
        group=...)` results are those of all ranks when it ends; reduce `.grad` yourself. Models
        under DistributedDataParallel and `fully_shard`, which reduce it while autograd runs, are
        refused.

    Errors: those of `nnj.extend`, `nnj.collect` and the backward pass; `NNJError` for an unknown
    backend, for a model that reduces its gradients over ranks, and inside a `with nnj.collect` that
    asks for what was not compiled."""
    check_hookable(model)
    check_alone(model)
    extend(model)
    loss = extend(loss_func)
    request = Request.by_name(
        quantities,
        modules=modules,
        memory=memory,
        tol=tol,
        signed=signed,
        verify=verify,
        group=False,  # a pass of one process: a `with` around it adds up over ranks
        **options,
    )

    def evaluate(batch: Any) -> tuple[Tensor, list[Tensor]]:
        inputs, wanted = read(batch, forward, target)
        output = forward(model, batch) if forward else logits_of(call(model, inputs))
        return scalar(loss(output, wanted), name_of(loss)), []

    program = PassProgram(evaluate, [model, loss], request)
    cases = Cases(
        program,
        backend,
        limit,
        verify,
        names_of_results(request),
        is_own_hook,
        why_never(request),
    )
    return Step(model, request, cases)


def check_alone(model: nn.Module) -> None:
    """Errors: `NNJError` for a model whose gradients are those of several processes."""
    check_not_flat(model.modules())
    if any(is_unit(m) or isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise NNJError(
            "nnj.compile makes a graph of one process, in which DistributedDataParallel and "
            "fully_shard do not reduce gradients. Give it the model inside (ddp.module), in a "
            "`with nnj.collect(..., group=...)`, and reduce .grad yourself; or do without it"
        )


class Step:
    """A pass that was compiled. Call it with a batch.

    Attributes:
        reasons: why passes were run eagerly, each once.
        replays: how many passes were replayed.
    """

    def __init__(self, model: nn.Module, request: Request, cases: Cases[Passed]):
        self.model, self.request, self._cases = model, request, cases
        self._alone: dict[frozenset[str], PassByPass] = {}

    def __repr__(self) -> str:
        return f"Step({', '.join(self.request.quantities)}, {self.replays} replays)"

    @property
    def reasons(self) -> list[str]:
        return self._cases.reasons

    @property
    def replays(self) -> int:
        return self._cases.replays

    def __call__(self, *batch: Any) -> tuple[Tensor, Results]:
        """One pass of a batch: `step(x, y)`, `step((x, y))` or `step({...})`."""
        given = batch[0] if len(batch) == 1 else batch
        given = dict(given) if isinstance(given, Mapping) else given
        takers = self._takers()
        try:
            passed = self._cases(given)
        except NNJError as error:
            for collection in takers:
                collection.refuse_pass(error, [])
            raise
        self._deliver(passed.contributions, takers)
        return passed.value, Results(self.model, self.request, passed.contributions)

    def _takers(self) -> list[Collection]:
        """What is open and takes the results in. Errors: `NNJError` if it asks for more."""
        takers = open_collections()
        for collection in takers:
            for name in collection.request.quantities:
                if not self.request.gives(name, collection.request):
                    raise NNJError(
                        f"the `with nnj.collect` around this pass asks for {name}, which was not "
                        "compiled (or with other options, or at other modules). Name it in "
                        "nnj.compile(...) with the same options, or call backward there"
                    )
        return takers

    def _deliver(self, found: list[Contribution], takers: Sequence[Collection]) -> None:
        """Results to what is open; of quantities of which nothing is, to attributes of this pass
        alone.
        """
        rest = set(self.request.quantities)
        for collection in takers:
            names = collection.request.quantities
            collection.add_pass([c.of_quantities(names) for c in found])
            rest -= names.keys()
        if rest:
            mine = self._alone.get(frozenset(rest))
            if mine is None:
                mine = self._alone[frozenset(rest)] = PassByPass(self.request.part(rest))
            mine.publish([c.of_quantities(rest) for c in found])


class Results(Mapping[str, Any]):
    """`results["ggn_diag"]["0.weight"]`: the quantities of one pass by the names of parameters, or
    of modules, that it has reached; what belongs to all parameters together is a tensor.
    """

    def __init__(self, model: nn.Module, request: Request, contributions: list[Contribution]):
        self._model, self._request, self._found = model, request, contributions

    @override
    def __getitem__(self, quantity: str) -> Any:
        alone = Collection(self._request.part({quantity}))
        place = alone.request.quantities[quantity].place  # KeyError
        alone.add_pass([c.of_quantities({quantity}) for c in self._found])
        if place is Whole:
            return alone.accumulator.totals(quantity).get(quantity)
        named: Iterable[tuple[str, Holder]] = (
            self._model.named_modules() if place is nn.Module else self._model.named_parameters()
        )
        found = ((name, alone.accumulator.value(quantity, holder)) for name, holder in named)
        return {name: value for name, value in found if value is not None}

    @property
    def context(self) -> dict[str, Tensor]:
        """What belongs to all parameters together, by name: such as "noise_terms"."""
        alone = Collection(self._request)
        alone.add_pass(self._found)
        found: dict[str, Tensor] = {}
        for name in self._request.quantities:
            found |= alone.accumulator.totals(name)
        return found

    def __repr__(self) -> str:
        return f"Results({', '.join(self)})"

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._request.quantities)

    @override
    def __len__(self) -> int:
        return len(self._request.quantities)

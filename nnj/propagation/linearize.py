"""A module at a point: its Jacobian in the input or in the parameters as one operator per sample,
for layers and whole models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointError
from typing_extensions import TypeVar

from nnj.errors import NNJError, complex_parameter
from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.graph.refusals import refuse_tensor
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sink, Sweep
from nnj.propagation.called import call, logits_of
from nnj.propagation.chunking import checked_memory
from nnj.propagation.forward import Forward
from nnj.propagation.plan import Assumptions, device_of
from nnj.propagation.plan_search import Roots, plan_of_output
from nnj.propagation.verification import verify
from nnj.recording.extend import temporarily_extended
from nnj.recording.records import Edge, edge_of

Slot = Literal["input", "weight"]
Forwarding: TypeAlias = Callable[[nn.Module, Any], Any]
Modules: TypeAlias = "nn.Module | Iterable[nn.Module] | None"  # in whose parameters J is
S = TypeVar("S", bound=Sweep, default=Sweep)


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad, each once, in the order of `parameters()`."""
    return [p for p in module.parameters() if p.requires_grad]


def parameters_by_module(module: nn.Module) -> list[list[nn.Parameter]]:
    """The own parameters that require grad of each module that has any, in the order of
    `modules()`; shared ones once.
    """
    seen: set[nn.Parameter] = set()
    owned = []
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            owned.append(own)
    return owned


def parameters_inside(
    module: nn.Module, modules: nn.Module | Iterable[nn.Module]
) -> set[nn.Parameter]:
    """The parameters of some modules of a model. Errors: `NNJError` for what is none of them."""
    found: list[Any] = [modules] if isinstance(modules, nn.Module) else list(modules)
    known = set(module.modules())
    for part in found:
        if not isinstance(part, nn.Module) or part not in known:
            raise NNJError(
                f"modules= names {type(part).__name__}, which is no module of the "
                f"{type(module).__name__} that is linearised"
            )
    if not found:
        raise NNJError("modules=[] names no module. Leave it out for all of the model")
    return {p for part in found for p in part.parameters()}


def linearization(
    module: nn.Module,
    x: Any,
    wrt: Slot,
    modules: Modules = None,
    forward: Forwarding | None = None,
    memory: int = 2**28,
) -> Linearization:
    """A module at x, for exact products."""
    return Linearization(module, x, wrt, Sweep, True, modules, forward, memory)


class Linearization(Generic[S]):
    """The plan of all products of one module at one x. The forward pass is made here; the module is
    left as it was.

    Args:
        module: extended or not, a layer or a whole model; it is called once.
        x: (N, ...), a single tensor; for "weight" also a tuple of arguments or a dict of named
            ones.
        wrt: "input" or "weight".
        kind: of the sweep.
        matmuls: whether matrix products with bare parameters are seen as layers.
        modules: "weight" is their parameters alone.
        forward: `forward(module, x)` gives the output.
        memory: bytes that the columns which walk together may take, with what is kept of them.

    Attributes:
        y: the output, (N, *outputs).
        n: N.
        params: with respect to which J is, for wrt="weight".
        sizes: their numbers of entries.
        leaves: what J is in: the parameters, or the copy of x that was given to the module.
        sweep: None where y does not depend on them.

    Errors: `TypeError` for what is no module; `NNJError` if y is not one real tensor with the
    samples in axis 0, for complex parameters, or where samples influence one another."""

    def __init__(
        self,
        module: nn.Module,
        x: Any,
        wrt: Slot,
        kind: type[S],
        matmuls: bool,
        modules: Modules = None,
        forward: Forwarding | None = None,
        memory: int = 2**28,
    ):
        _check_input(module, x, wrt, modules)
        self.module, self.wrt, self.memory = module, wrt, checked_memory(memory)
        self.params = parameters(module) if wrt == "weight" else []
        if modules is not None:
            inside = parameters_inside(module, modules)
            self.params = [p for p in self.params if p in inside]
        self.sizes = [p.numel() for p in self.params]
        if any(p.is_complex() for p in self.params):
            raise complex_parameter(f"a parameter of {type(module).__name__}")
        given, y = _called(module, x, wrt, forward)
        n = x.shape[0] if isinstance(x, Tensor) else None
        self.n = _check_output(module, y, n)
        self.y = y.detach()
        self.x = given if isinstance(given, Tensor) else self.y
        self.outputs = tuple(y.shape[1:])
        self.inputs = tuple(x.shape[1:]) if isinstance(x, Tensor) else ()
        self.leaves: list[Tensor] = [self.x] if wrt == "input" else [*self.params]
        self.root = edge_of(y)
        self._owner = y  # of the graph, where its end is a function in Python (`nodes.is_alive`)
        self.sweep = None if self.root is None else self._planned(self.root, kind, matmuls)

    def _planned(self, root: Edge, kind: type[S], matmuls: bool) -> S | None:
        """The sweep under the first assumptions in which samples do not influence one another; None
        where nothing leads to what J is in.
        """
        paths = {m: name for name, m in self.module.named_modules()}
        wanted = set(self.leaves)
        batched = self.x if self.wrt == "input" else None
        graph = Graph([root], wanted.__contains__, paths, batched, matmuls)
        if not graph.steps:
            return None

        def check(sweep: S, rows: Roots) -> None:
            if batched is not None and any(step.leaf is batched for step in sweep.by_column):
                _check_apart(graph, root, self.n, sweep.assume)
            # an approximation cannot be compared with autograd: the same steps, exact
            exact = sweep if kind is Sweep else Sweep(graph, self.n, rows, sweep.assume)
            # hooks have no forward, and J is that of the function
            verify(exact, rows, self.leaves, self.module, hooks=False)

        # an operand cut off at the input would hide what other samples have to do with it
        cut = self.wrt == "weight"
        return plan_of_output(graph, root, self.n, kind, cut, check).sweep

    @property
    def graph_output(self) -> Tensor:
        """The output with autograd's graph behind it."""
        return self._owner

    @property
    def size(self) -> int:
        """in, or P."""
        return math.prod(self.inputs) if self.wrt == "input" else sum(self.sizes)

    @property
    def out(self) -> int:
        """The number of outputs of one sample."""
        return math.prod(self.outputs)

    def factors(self, u: Tensor, take: Sink) -> None:
        """Give `take` each leaf that u of (K, N, *outputs) reaches, with the factor of u J
        there.
        """
        if u.shape[0] and self.sweep is not None and self.root is not None:
            self.sweep.run({self.root: u}, u.shape[0], take)

    def vjp(self, u: Tensor) -> Tensor:
        """u J: (K, N, *outputs) -> (K, N, in or P)."""
        dtypes = [leaf.dtype for leaf in self.leaves] or [u.dtype]
        dtype = functools.reduce(torch.promote_types, dtypes)
        found = u.new_empty(len(u), self.n, self.size, dtype=dtype)
        parts = dict(zip(self.leaves, found.split(self.leaf_sizes, -1), strict=True))
        # each where it belongs, so that J is written once
        self.factors(u, lambda leaf, factor: factor.write(parts.pop(leaf), False))
        for part in parts.values():
            part.zero_()
        return found

    @property
    def leaf_sizes(self) -> list[int]:
        """Of each leaf the entries of one sample."""
        return [self.size] if self.wrt == "input" else self.sizes

    def by_leaf(self, v: Tensor) -> dict[Tensor, Tensor]:
        """(K, N or 1, in or P) as what belongs to each leaf, (K, N or 1, *shape)."""
        shapes = [self.inputs] if self.wrt == "input" else [tuple(p.shape) for p in self.params]
        parts = zip(self.leaves, v.split(self.leaf_sizes, -1), shapes, strict=True)
        return {leaf: t.reshape(*v.shape[:2], *shape) for leaf, t, shape in parts}

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (K, N, in or P) -> (K, N, *outputs); (K, 1, P) is one direction for all samples."""
        k = v.shape[0]
        zero = self.y.new_zeros(k, self.n, *self.outputs)
        if not k or self.sweep is None or self.root is None:
            return zero
        try:
            return Forward(self.sweep).run(self.by_leaf(v), k).get(self.root, zero)
        except CheckpointError:
            if k == 1:
                raise
        # What a checkpoint computes anew under vmap need not be what it saved: one direction after
        # the other.
        return torch.cat([self.jvp(v[i : i + 1]) for i in range(k)])

    def dense(self) -> Tensor:
        """J, (N, out, in or P)."""
        return self.vjp(self.basis()).transpose(0, 1)

    def basis(self) -> Tensor:
        """The unit cotangents, (out, N, *outputs)."""
        eye = torch.eye(self.out, dtype=self.y.dtype, device=self.y.device)
        return (
            eye[:, None].expand(self.out, self.n, self.out).reshape(self.out, self.n, *self.outputs)
        )


def _check_apart(graph: Graph, root: Edge, n: int, assume: Assumptions) -> None:
    """Errors: `Coupled` if a column of one sample comes to the rows of others, where columns come
    to the input one for each sample, and each is taken for that sample's row alone.
    """
    u = torch.rand(graph.shapes[root], generator=OwnGenerator.seeded()) + 0.5
    columns = u[None].to(device_of(root), graph.dtypes[root])
    sweep = Sweep(graph, n, {root: SampleIndex(n)}, assume)
    sweep.run({root: columns}, 1, lambda leaf, factor: None)


def _check_input(module: nn.Module, x: Any, wrt: Slot, modules: Modules) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"products are those of a torch.nn.Module, not of {module!r}")
    if modules is not None and wrt == "input":
        raise NNJError("modules= says in which parameters J is, so it is for wrt='weight'")
    if not isinstance(x, Tensor):
        several = isinstance(x, (tuple, list, Mapping)) and wrt == "weight"
        if not several or not any(isinstance(t, Tensor) for t in tree_leaves(_plain(x))):
            hint = " (for wrt='weight' also a tuple or a dict of them)" if wrt == "input" else ""
            raise NNJError(f"x is {type(x).__name__}, expected a tensor{hint}")
    for t in tree_leaves(_plain(x)):
        if isinstance(t, Tensor):
            refuse_tensor(t.is_nested, t.device)
    if not isinstance(x, Tensor):
        return
    if x.dim() == 0 or x.shape[0] == 0:
        raise NNJError(f"x has shape {tuple(x.shape)}; expected (N, ...) with at least one sample")
    if wrt == "input" and not x.is_floating_point():
        raise NNJError(
            f"x is {x.dtype}, which has no derivative; the input must be of floating point for "
            "wrt='input'"
        )


def _plain(x: Any) -> Any:
    """With a dict for any other mapping, such as a tokenizer's."""
    return dict(x) if isinstance(x, Mapping) else x


def _called(module: nn.Module, x: Any, wrt: Slot, forward: Forwarding | None) -> tuple[Any, Tensor]:
    """The copy of x that the module is given, and what it makes of it."""
    with temporarily_extended(module), torch.enable_grad():
        if wrt == "weight":
            # a copy, which the model may write over
            copied = lambda t: t.detach().clone() if isinstance(t, Tensor) else t
            x = tree_map(copied, _plain(x))
            y = call(module, x) if forward is None else forward(module, x)
            return x, logits_of(y)
        x = x.detach().clone().requires_grad_()
        # a view, which the model may write over, as it may not over a leaf
        return x, logits_of(call(module, x.view_as(x)))


def _check_output(module: nn.Module, y: Any, n: int | None) -> int:
    """The number of samples, n if it is known."""
    if not isinstance(y, Tensor) or y.dim() == 0 or (n is not None and y.shape[0] != n):
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        of = "" if n is None else f" for {n} samples"
        raise NNJError(
            f"{type(module).__name__} gave {what}{of}; products need one tensor (N, ...)"
        )
    if not y.is_floating_point():
        raise NNJError(
            f"{type(module).__name__} gave {y.dtype}; products are those of a real output"
        )
    return len(y)

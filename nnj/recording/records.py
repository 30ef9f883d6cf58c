"""What a forward pass leaves on autograd's graph: records of layers, marks of calls, and the call
of a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from nnj.errors import NNJError
from nnj.recording.called_with import CalledWith, Replaced, is_moved, is_plain, is_same_place
from nnj.recording.engine import Edge as Edge
from nnj.recording.engine import behind_engine
from nnj.recording.tensor_parallel import (
    RECORD as RECORD,
)
from nnj.recording.tensor_parallel import (
    Parallel,
    is_pending,
    local_of,
    parallel_of,
    plain_edge,
    settled,
)
from nnj.registry.claim import Entry
from nnj.registry.layer_rules import parameters_by_name

MARK = "nnj.call"
LOSS = "nnj.loss"


def storage_of(t: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor are in memory, and how they are seen: of two tensors with the
    same the entries are the same, in the same order. Of one for which a collective is under way
    nobody knows yet.
    """
    return (
        (t.untyped_storage().data_ptr(), t.data_ptr(), t.shape, t.stride())
        if t.layout == torch.strided and not is_pending(t)
        else (id(t),)
    )


class Point:
    """A tensor of a call, detached, and the version that it had; only its shape and dtype where the
    rule does not read it.

    Attributes:
        storage: where its numbers are, if it may be an input of the model, or a view of one; None
            for what was computed.
    """

    __slots__ = ("dtype", "shape", "storage", "value", "version")

    def __init__(
        self,
        seen: Tensor | tuple[torch.Size, torch.dtype],
        version: int,
        storage: tuple[Any, ...] | None = None,
    ):
        self.value = seen if isinstance(seen, Tensor) else None
        self.shape, self.dtype = (seen.shape, seen.dtype) if isinstance(seen, Tensor) else seen
        self.version, self.storage = version, storage

    def tensor(self) -> Tensor:
        return (
            torch.empty(self.shape, dtype=self.dtype, device="meta")
            if self.value is None
            else self.value
        )

    @property
    def stale(self) -> bool:
        """Whether something was written over the value after the call."""
        return self.value is not None and self.value._version != self.version


def write_record(
    module: nn.Module, entry: Entry, x: Tensor, y: Tensor, before: tuple[Edge | None, int] | None
) -> None:
    """Put what the backward pass needs of a call on the node of its output y, for `Record`. A
    tuple, since making an object takes time that can be measured on small networks.

    Args:
        before: the edge and the version that x had before the call, if that may have changed it.
    """
    uses = entry.uses
    edge, version = (edge_of(x), x._version) if before is None else before
    node: Any = y.grad_fn
    node.metadata[RECORD, y.output_nr] = (
        module,
        entry,
        edge,
        settled(x.detach()) if "x" in uses else (x.shape, x.dtype),
        version,
        storage_of(x) if x.grad_fn is None or x._is_view() else None,
        settled(y.detach()) if "y" in uses else (y.shape, y.dtype),
        y._version,
        layer_state(module),
        None,
    )


def write_part(module: nn.Module, entry: Entry, x: Tensor, y: Tensor) -> bool:
    """The same of a layer that tensor parallelism distributes: of its part on this rank, between
    the plain tensors before and behind it. Whether there is a record of it.
    """
    parallel, (plain, edge) = parallel_of(module, x, y), plain_edge(x)
    if parallel is None or not plain:
        return False
    node: Any = y.grad_fn
    here = local_of(x), local_of(y)
    state = layer_state(module)
    noted = module, entry, None if edge is None else behind_engine(edge), here[0]
    node.metadata[RECORD, y.output_nr] = (
        *noted,
        here[0]._version,
        None,
        here[1],
        here[1]._version,
        state,
        parallel,
    )
    return True


class Record:
    """One call of a module with a rule: from the edge of its output straight to the edge of its
    input.
    """

    __slots__ = ("edge", "entry", "module", "parallel", "state", "x", "y")

    def __init__(self, noted: tuple[Any, ...]):
        self.module, self.entry, self.edge, x, version, storage, y, now, self.state = noted[:9]
        self.parallel: Parallel | None = noted[9]
        self.x, self.y = Point(x, version, storage), Point(y, now)

    @staticmethod
    def of(node: Any, nr: int) -> Record | None:
        """The record of the call that made output `nr` of a node; None if there is none."""
        noted = node.metadata.get((RECORD, nr))
        return None if noted is None else Record(noted)

    @property
    def by_rows(self) -> bool:
        """Whether x and y have the same number of rows."""
        x, y = self.x.shape, self.y.shape
        return len(x) > 0 < len(y) and x[0] == y[0]

    def working_point(self) -> tuple[Tensor, Tensor] | None:
        """x and y of the call in one dtype; where autocast has mixed precisions, the widest. None
        if parameters are narrower.
        """
        x, y = self.x.tensor(), self.y.tensor()
        if x.dtype is y.dtype and not self.module._modules:  # nearly always
            for p in self.module._parameters.values():
                if p is not None and p.dtype is not y.dtype:
                    break
            else:
                return x, y
        dtype = torch.promote_types(x.dtype, y.dtype) if x.is_floating_point() else y.dtype
        own = {p.dtype for p in parameters_by_name(self.module).values()}
        for other in own:
            dtype = torch.promote_types(dtype, other)
        if own - {dtype}:
            return None
        return x.to(dtype) if x.is_floating_point() else x, y.to(dtype)

    @property
    def stale(self) -> bool:
        """Whether the module is no longer as it was in the call, or what the rule reads was
        overwritten.
        """
        if self.x.stale or self.y.stale:
            return True
        return is_changed(self.state, self.module)


def check_parameters(record: Record, who: str, wanted: Callable[[Tensor], bool]) -> None:
    """Errors: `NNJError` if parameters of a call are others by now, or have other data: autograd's
    nodes would compute with the new ones, or know leaves that are not wanted.
    """
    before, now = record.state, layer_state(record.module)
    if len(before) != len(now):
        return
    for i, (old, new) in enumerate(zip(before, now, strict=True)):
        if not isinstance(old, Tensor) or not old.is_leaf or not is_plain(old):
            continue  # between calls, the parameters of sharded models are others
        if old is not new and old.requires_grad and not wanted(old):
            raise NNJError(
                f"{who}: a parameter in its call was another tensor than it has now (by "
                "torch.func.functional_call, or it was replaced since), and results would stand on "
                "no parameter of the model. Call the model with its own parameters, and load other "
                "values into them"
            )
        if old is new and _changed(before[i + 2], now[i + 2]):
            what = "parameter" if isinstance(old, nn.Parameter) else "buffer"
            raise NNJError(
                f"{who}: the data of a {what} was replaced (by p.data = ..., or model.to(...)) "
                "between its call and the backward pass, which computes with the new data, as "
                ".grad does. Replace it after the backward pass"
            )


def replaced_in(record: Record) -> Iterator[Replaced]:
    """The parameters of a layer in whose place others were in its call."""
    state, at, module = record.state, 0, record.module
    if len(state) != len(layer_state(module)):
        return
    for part in module.modules() if module._modules else (module,):
        at += 1
        for name, now in part._parameters.items():
            if now is not None:
                if state[at] is not now:
                    yield Replaced(part, name, now)
                at += 3
        at += 3 * sum(t is not None for t in part._buffers.values())


_PLAIN = (bool, int, float, str, tuple, type(None))


def layer_state(module: nn.Module) -> list[Any]:
    """What a rule reads of a layer beside x and y: its mode and options, its tensors, and their
    versions and data.
    """
    found: list[Any] = []
    for part in module.modules() if module._modules else (module,):
        own = part.__dict__
        found.append(own.copy())  # all of it: `_changed` picks the options, if it is ever asked
        for t in own["_parameters"].values():
            if t is not None:
                # of a subclass nobody knows what it answers
                found += (t, t._version, (t.data,) if type(t) is nn.Parameter else None)
        for t in own["_buffers"].values():
            if t is not None:
                found += (t, t._version, (t.data,) if type(t) is Tensor else None)
    return found


def is_changed(before: list[Any], module: nn.Module) -> bool:
    """Whether the state of a layer is no longer what `layer_state` gave."""
    if not module._modules and _is_untouched(before, module.__dict__):  # nearly always
        return False
    state = layer_state(module)
    if len(state) != len(before):
        return True
    for one, now in zip(before, state, strict=True):
        if one is not now and _changed(one, now):
            return True
    return False


def _is_untouched(before: list[Any], own: dict[str, Any]) -> bool:
    """Whether nothing was assigned to a layer without parts, nor written into its tensors, which
    are where they were.
    """
    options = before[0]
    if len(options) != len(own) or not all(map(is_, options.values(), own.values())):
        return False
    at, end = 1, len(before)
    for t in (*own["_parameters"].values(), *own["_buffers"].values()):
        if t is None:
            continue
        if at == end or before[at] is not t or before[at + 1] != t._version:
            return False
        data = before[at + 2]
        if data is not None and not is_same_place(t, data[0]):
            return False
        at += 3
    return at == end


def _changed(before: Any, now: Any) -> bool:
    """Whether an element of a layer's state is another."""
    if type(before) is type(now) is tuple:  # data
        return is_moved(now[0], before[0])
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before is not now if isinstance(before, Tensor) else bool(before != now)
    if len(before) == len(now) and all(map(is_, before.values(), now.values())):
        return False  # nothing has been assigned
    options = [
        {k: v for k, v in own.items() if k[0] != "_" and isinstance(v, _PLAIN)}
        for own in (before, now)
    ]
    return options[0] != options[1]


@dataclass(eq=False, slots=True)
class CallMark:
    """An outermost call of an extended module: its batch says what a sample is.

    Attributes:
        inputs: its arguments, detached.
        hooks: how many hooks had been registered in this process when it began, on whatever.
        wrapper: what splits the data over processes, and was called around it.
        engine: of `nnj.recording.wrappers.ENGINES`, by which it was called.
    """

    module: nn.Module
    inputs: list[Tensor]
    batch_axis: int
    order: int
    called_with: CalledWith
    hooks: int
    wrapper: nn.Module | None = None
    engine: str | None = None

    @property
    def sizes(self) -> list[int]:
        """The lengths of the batch axis of its arguments, each once."""
        axis = self.batch_axis
        return list(dict.fromkeys(t.shape[axis] for t in self.inputs if t.dim() > axis))


@dataclass(eq=False)
class LossCall:
    """One call of an extended loss: its arguments, detached, and the edges of those that are
    outputs of a model.

    Attributes:
        state: the options and tensors of a loss of torch; None where they do not say all of it.
        autocast: the dtype of autocast in the call; None where it was off.
        copies: what another loss was before the call (`nnj.recording.loss_state.Copies`).
        counts: whether it adds curvature; what another loss has called is part of that one.
    """

    module: nn.Module
    name: str  # of the loss, for errors
    leaves: list[Any]
    spec: Any
    outputs: list[int]  # which leaves are outputs of a model
    edges: list[Edge]
    versions: list[tuple[Tensor, int]]
    thread: int
    value: Tensor
    output_nr: int
    state: list[Any] | None
    autocast: torch.dtype | None
    copies: Any = None
    counts: bool = True

    def arguments(self, outputs: list[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) of the call with other outputs in place of the model's."""
        leaves = list(self.leaves)
        for index, t in zip(self.outputs, outputs, strict=True):
            leaves[index] = t
        return (leaves, {}) if self.spec is None else tree_unflatten(leaves, self.spec)


def edge_of(t: Tensor) -> Edge | None:
    """The gradient edge of a tensor, behind nodes that belong to an engine; None where no gradient
    flows.
    """
    if not t.requires_grad:
        return None
    if t.grad_fn is not None:
        return behind_engine((t.grad_fn, t.output_nr))
    found = torch.autograd.graph.get_gradient_edge(t)
    return found.node, found.output_nr


def inert() -> bool:
    """Whether there is no graph to write on: under no_grad, torch.func transforms and tracing."""
    return (
        torch.compiler.is_compiling()  # first: at what comes next it would stop, and no longer know
        or not torch.is_grad_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    )


def write(node: Any, key: tuple[str, int], value: Any) -> None:
    """Put something on a node of autograd's graph."""
    node.metadata[key] = value


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and objects with fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    # of the type: a proxy of torch.fx has every attribute
    if hasattr(type(value), "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return []

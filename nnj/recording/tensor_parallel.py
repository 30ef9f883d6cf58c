"""Layers that tensor parallelism distributes over the ranks of a mesh (`ColwiseParallel`,
`RowwiseParallel`): between plain tensors each rank computes with its part of the weight.

Of y = x W^T + b, the ranks of

    ColwiseParallel   have rows of W:     x is whole, y a part; back to x goes a sum over ranks
    RowwiseParallel   have columns of W:  x is a part, y a sum over ranks; to y comes the whole

so that a record between the plain tensors before and behind such a layer is one of its part, and
torch's own steps between these and DTensors are never walked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnj.errors import NNJError

Edge = tuple[Any, int]
RECORD = "nnj.record"

_STEPS = frozenset({"_ToTorchTensor", "_FromTorchTensor", "Redistribute"})


def is_distributed(t: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(t, Tensor) and type(t).__module__.startswith("torch.distributed.tensor")


def check_whole(what: str, parameters: Iterable[Tensor]) -> None:
    """Errors: `NNJError` for parameters of which ranks have parts, where all of them are wanted."""
    if any(map(is_distributed, parameters)):
        raise NNJError(
            f"{what} wants whole parameters, and those of this model are DTensors, of which each "
            "rank has a part. nnj.fit and nnj.collect take them; for this, load all of them into a "
            "model that is not distributed (torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True)"
        )


def is_pending(t: Tensor) -> bool:
    """Whether a tensor is one for which a collective may still be under way."""
    return type(t).__name__ == "AsyncCollectiveTensor"


def settled(t: Tensor) -> Tensor:
    """The numbers of a tensor for which a collective may still be under way."""
    if not is_pending(t):
        return t
    found: Tensor = t.trigger_wait()  # type: ignore[attr-defined]
    return found


def local_of(t: Any) -> Tensor:
    """The part of a DTensor on this rank."""
    return settled(t.detach().to_local())


def local_as(t: Any, like: Any) -> Tensor:
    """The part of a DTensor on this rank, placed as another one is."""
    return local_of(t.redistribute(placements=like.placements))


def part_on_mesh(t: Tensor, like: Any, placements: Any = None) -> Tensor:
    """A tensor that all ranks of a mesh have as a DTensor that is placed as another one is, or
    otherwise.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh
    every = DTensor.from_local(t.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    wanted = like.placements if placements is None else placements
    found: Tensor = every.redistribute(placements=wanted)
    return found


@dataclass(frozen=True)
class Parallel:
    """How a layer is distributed.

    Attributes:
        way: "outputs" where each rank has some of the outputs, "inputs" where some of the inputs.
        mesh: of one dimension.
        inputs, outputs: how many there are on all ranks.
    """

    way: str
    mesh: Any
    inputs: int
    outputs: int

    def summed(self, t: Tensor) -> Tensor:
        """The sum over the ranks of the mesh."""
        t = t.contiguous().clone()
        dist.all_reduce(t, group=self.mesh.get_group())
        return t

    def whole_input(self, x: Tensor) -> Tensor:
        return x if self.way == "outputs" else self._gathered(x, self.inputs)

    def whole_output(self, v: Tensor) -> Tensor:
        return v if self.way == "inputs" else self._gathered(v, self.outputs)

    def for_engine(self, u: Tensor) -> Tensor:
        """A cotangent of the part of the output on this rank, as autograd has it at the layer."""
        found: Tensor = self._seen(u, None if self.way == "inputs" else self.outputs)
        return found

    def _seen(self, t: Tensor, size: int | None) -> Any:
        """A DTensor of parts of the last axis, of `size` entries in all; or of which each rank has
        all.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size(t.shape if size is None else (*t.shape[:-1], size))
        stride = torch.empty(shape, device="meta").stride()
        at = [Replicate() if size is None else Shard(t.dim() - 1)]
        t = t.contiguous()
        return DTensor.from_local(t, self.mesh, at, run_check=False, shape=shape, stride=stride)

    def _gathered(self, t: Tensor, size: int) -> Tensor:
        """All entries of the last axis, of which ranks have parts as of `torch.chunk`."""
        return settled(self._seen(t, size).full_tensor())


def parallel_at(edge: Edge) -> Parallel | None:
    """How the layer is distributed whose output is on an edge; None for anything else."""
    noted = getattr(edge[0], "metadata", {}).get((RECORD, edge[1]))
    found: Parallel | None = None if noted is None else noted[9]
    return found


def may_be_part(module: nn.Module) -> bool:
    """Whether a module may be a linear layer that is distributed in parts."""
    weight: Any = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and (
        not is_distributed(weight) or any(at.is_shard() for at in weight.placements)
    )


def parallel_of(module: nn.Module, x: Any, y: Any) -> Parallel | None:
    """How a linear layer is distributed whose call is between DTensors; None for anything else."""
    weight = module._parameters.get("weight")
    if not (isinstance(module, nn.Linear) and is_distributed(weight) and is_distributed(x)):
        return None
    mesh: Any = weight.device_mesh  # type: ignore[union-attr]
    if mesh.ndim != 1 or 0 in shape_here(weight):  # type: ignore[arg-type]
        return None
    seen = _of(weight, 1), _of(x, x.dim() - 1), _of(y, y.dim() - 1)
    ways = {("rows", "whole", "last"): "outputs", ("last", "last", "sum"): "inputs"}
    way = ways.get(seen)
    sizes = weight.shape[1], weight.shape[0]  # type: ignore[union-attr]
    return None if way is None else Parallel(way, mesh, *sizes)


def _of(t: Any, last: int) -> str:
    """How a DTensor is placed on a mesh of one dimension, in a word."""
    (at,) = t.placements if len(t.placements) == 1 else (None,)
    if at is None:
        return "otherwise"
    if at.is_replicate():
        return "whole"
    if at.is_partial():
        return "sum" if at.reduce_op == "sum" else "otherwise"
    return "last" if at.dim == last else "rows" if at.dim == 0 else "otherwise"


def plain_edge(x: Any) -> tuple[bool, Edge | None]:
    """Whether a DTensor is a plain tensor, seen as one, and the edge of that; None where no
    gradient flows.
    """
    node = x.grad_fn
    if node is None:
        return not x.requires_grad, None
    while _step(node) == "Redistribute" and node.current_spec.placements == x.placements:
        node = node.next_functions[0][0]
    if _step(node) != "_FromTorchTensor":
        return False, None
    older = getattr(node, "previous_placement", None)  # its name in torch 2.6
    given = node.forward_input_placements if older is None else older
    same = tuple(given) == tuple(x.placements)
    edge = node.next_functions[0]
    return same, None if edge[0] is None else edge


def behind_passage(edge: Edge) -> Edge:
    """Behind torch's steps from a DTensor to a plain tensor the output of the layer that made it,
    if there is a record of that, and columns are the same at both; else the edge itself.
    """
    node = edge[0]
    if _step(node) != "_ToTorchTensor":
        return edge
    seen = node.dtensor_spec.placements
    below, nr = node.next_functions[0]
    while below is not None and _step(below) == "Redistribute":
        before = below.current_spec.placements
        if before != seen and not all(
            a == b or (a.is_partial() and b.is_replicate())
            for a, b in zip(before, seen, strict=True)
        ):
            return edge
        seen = before
        below, nr = below.next_functions[0]
    if below is None or (RECORD, nr) not in getattr(below, "metadata", {}):
        return edge
    return below, nr


def is_passage(node: Any) -> bool:
    """Whether a node is one of torch's steps between DTensors and plain tensors."""
    return _step(node) is not None


def _step(node: Any) -> str | None:
    function = getattr(type(node), "_forward_cls", None)
    if function is None or not function.__module__.startswith("torch.distributed.tensor"):
        return None
    return function.__name__ if function.__name__ in _STEPS else None


def check_group(group: Any, models: Iterable[nn.Module]) -> None:
    """Errors: `NNJError` for a group over which data are split that has ranks which share a
    model.
    """
    if group is None:
        return
    meshes = [p.device_mesh for m in models for p in m.parameters() if is_distributed(p)]  # type: ignore[attr-defined]
    ranks = set(dist.get_process_group_ranks(group))
    for mesh in dict.fromkeys(meshes):
        if len(ranks & set(mesh.mesh.flatten().tolist())) > 1:
            raise NNJError(
                "group= has ranks that share a model by tensor parallelism, which have the same "
                "data. Name the group over which data are split, without these: "
                'group=mesh["dp"].get_group()'
            )


def part_of_layer(module: nn.Module) -> nn.Module:
    """A layer with the part of its parameters on this rank, for its rule."""
    part = nn.Module.__new__(type(module))
    part.__dict__.update(module.__dict__)
    part.__dict__["_parameters"] = {
        name: p if p is None else nn.Parameter(local_of(p) if is_distributed(p) else p.detach())
        for name, p in module._parameters.items()
    }
    return part


def whole_layer(module: nn.Module) -> nn.Module:
    """A layer with parameters of which only the shapes are there."""
    whole = nn.Module.__new__(type(module))
    whole.__dict__.update(module.__dict__)
    whole.__dict__["_parameters"] = {
        name: p if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))
        for name, p in module._parameters.items()
    }
    return whole


def part_here(t: Any) -> Tensor:
    """The tensor that a DTensor wraps, without a look at it; any other as it is."""
    found: Tensor = t._local_tensor if is_distributed(t) else t
    return found


def shape_here(p: Tensor) -> tuple[int, ...]:
    """The shape of the part of a parameter on this rank."""
    return tuple(p.to_local().shape) if is_distributed(p) else tuple(p.shape)  # type: ignore[attr-defined]

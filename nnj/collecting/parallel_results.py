"""Results at parameters that tensor parallelism distributes: each rank has those of its part, as
DTensors that are placed as the parameters are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nnj.collecting.contribution import Contribution
from nnj.collecting.quantity import Quantity
from nnj.graph.builder import Graph
from nnj.recording.tensor_parallel import is_distributed


def is_parallel(graph: Graph) -> bool:
    """Whether a layer of a graph is distributed."""
    return graph.parallel and mesh_of(graph) is not None


def mesh_of(graph: Graph) -> Any:
    """The mesh of the distributed layers of a graph; None if there are none."""
    parts = (s.record.parallel for s in graph.steps if s.record is not None)
    return next((part.mesh for part in parts if part is not None), None)


def over_mesh(found: Contribution, quantities: Mapping[str, Quantity]) -> None:
    """Add up over the ranks of the mesh what is a sum over entries of a parameter of which each has
    a part.
    """
    for name, states in found.states.items():
        if quantities[name].entrywise or quantities[name].place is not Tensor:
            continue
        for holder, state in states.items():
            p: Any = holder
            if is_distributed(p) and not _is_whole(p):
                group = p.device_mesh.get_group()
                summed = functools.partial(_summed, group=group)
                states[holder] = tree_map_only(Tensor, summed, state)


def _is_whole(p: Any) -> bool:
    """Whether each rank has all of a DTensor."""
    return all(at.is_replicate() for at in p.placements)


def _summed(t: Tensor, group: Any) -> Tensor:
    total = t.clone()
    dist.all_reduce(total, group=group)
    return total

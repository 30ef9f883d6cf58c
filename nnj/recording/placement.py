"""Results at DTensors: placed as these are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nnj.errors import NNJError
from nnj.recording.tensor_parallel import is_distributed, part_on_mesh, settled, shape_here


def placed(name: str, entrywise: bool, p: Any, value: Any) -> Any:
    """A result, or a state, at a parameter of which each rank has a part: of each tensor with an
    entry, or a row, for each entry of the part a DTensor.

    Errors: `NNJError` for a tensor of another shape, which may be of a part or of all.
    """
    return tree_map_only(Tensor, lambda t: _placed(name, entrywise, p, t), value)


def check_placed(name: str, entrywise: bool, p: Any, value: Any) -> None:
    """Errors: that of `placed`, before anything is placed."""
    for t in tree_leaves(value) if entrywise and is_distributed(p) else ():
        if isinstance(t, Tensor) and not any(_fits(t, rows, p) for rows in (0, 1)):
            raise _unknown(name, p, t)


def _fits(t: Tensor, rows: int, p: Any) -> bool:
    """Whether a tensor has an entry for each of a parameter, or of the part of it on this rank,
    behind so many axes.
    """
    return tuple(t.shape[rows:]) in (tuple(p.shape), shape_here(p))


def _placed(name: str, entrywise: bool, p: Any, t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    if is_distributed(t) or not entrywise:
        return t
    for rows in (0, 1):
        lead, rest = tuple(t.shape[:rows]), tuple(t.shape[rows:])
        placements = [Shard(at.dim + rows) if at.is_shard() else at for at in p.placements]
        shape = torch.Size((*lead, *p.shape))
        if rest == tuple(p.shape):
            return part_on_mesh(t, p, placements)
        if rest == shape_here(p):
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(
                t.contiguous(),
                p.device_mesh,
                placements,
                run_check=False,
                shape=shape,
                stride=stride,
            )
    raise _unknown(name, p, t)


def _unknown(name: str, p: Any, t: Tensor) -> NNJError:
    return NNJError(
        f"{name}: a result of shape {tuple(t.shape)} at a parameter {tuple(p.shape)} of which this "
        f"rank has {shape_here(p)} may be one of the part or of all. Say entrywise=False on the "
        "quantity if it is a sum over entries"
    )


def whole_of(t: Any) -> Any:
    """All of a DTensor, as a plain one, which is a collective; anything else as it is."""
    return settled(t.full_tensor()) if is_distributed(t) else t


def whole_state(name: str, entrywise: bool, p: Any, state: Any) -> Any:
    """A state at all of a parameter: a collective where it is distributed."""
    if is_distributed(p):
        state = placed(name, entrywise, p, state)
    return tree_map_only(Tensor, whole_of, state)

"""Whether all ranks have one model: a sum and a norm of each of its parameters and buffers.

Results over ranks are of one function; a rank that began elsewhere (another seed, no broadcast), or
trained alone, would have added those of another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnj.distributed.ranks import Ranks
from nnj.errors import NNJError
from nnj.recording.tensor_parallel import is_distributed, local_of


class Print(NamedTuple):
    """What is compared of a tensor.

    Attributes:
        total, norm: the sum, and the root of that of the squares.
        near: by how much they may differ, as a part of the norm: ranks may have rounded in other
            ways.
    """

    total: float
    norm: float
    near: float

    def same(self, other: Print) -> bool:
        if not math.isfinite(self.norm):  # which is refused elsewhere
            return not math.isfinite(other.norm)
        most = self.near * self.norm
        return abs(self.total - other.total) <= most and abs(self.norm - other.norm) <= most


def prints(named: Iterable[tuple[str, Tensor]]) -> dict[str, Print]:
    """Those of some tensors, by name; of a DTensor that of the part of this rank."""
    found: dict[str, tuple[Tensor, float]] = {}
    for name, t in named:
        t = local_of(t) if is_distributed(t) else t.detach()
        if t.is_meta or t.layout != torch.strided:
            continue
        t = torch.view_as_real(t) if t.is_complex() else t
        eps = torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0
        near = min(math.sqrt(eps), 0.02)
        t = t if t.device.type == "mps" else t.double()
        found[name] = torch.stack([t.sum(), t.norm()]), near
    # all at once: each number that is read waits for its device
    rows = _read([row for row, _ in found.values()])
    nears = (near for _, near in found.values())
    return {name: Print(*row, near) for name, row, near in zip(found, rows, nears, strict=True)}


def _read(rows: Sequence[Tensor]) -> list[tuple[float, float]]:
    if not rows:
        return []
    pairs = torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    return [(total, norm) for total, norm in pairs]


def check_prints(what: str, every: Sequence[Mapping[str, Print]]) -> None:
    """Errors: `NNJError` for the first rank whose numbers are others than those of rank 0.

    Args:
        what: "parameter", or "buffer".
        every: those of each rank.
    """
    for rank, mine in enumerate(every):
        for name, found in mine.items():
            first = every[0].get(name)
            if first is not None and not first.same(found):
                raise NNJError(
                    f"{what} '{name}' has other numbers on rank {rank} than on rank 0, and results "
                    "over ranks are of one model. Give all ranks the same (torch.distributed."
                    f"broadcast each of model.{what}s(); DistributedDataParallel does so with the "
                    "parameters when it is made, and with the buffers in each call), or say "
                    "group=False for what this rank has"
                )


def check_replicas(ranks: Ranks, model: nn.Module, sharded: bool = False) -> None:
    """A collective. Errors: `NNJError`, on all ranks, where a parameter or a buffer differs.

    Args:
        sharded: whether parameters are those of shards, which differ.
    """
    buffers = (
        (name, t)
        for name, t in model.named_buffers()
        if t.dim() or t.is_floating_point()  # no counter
    )
    mine = prints(() if sharded else model.named_parameters()), prints(buffers)
    ranks.meet()
    notes = ranks.notes(mine)
    check_prints("parameter", [found for found, _ in notes])
    check_prints("buffer", [found for _, found in notes])

"""Random generators of nnj's own, with a seed that never changes: what they draw is the same in
every pass, so that a graph that was traced may hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Self

SEED = 0x6E6E6A
_own: set[int] = set()  # where those that are alive are in memory


class OwnGenerator(torch.Generator):
    """A generator on the CPU that nobody outside of nnj sees; `nnj.compiling` tells it from those
    of users, which draw anew in each pass.
    """

    @classmethod
    def seeded(cls, seed: int = SEED) -> Self:
        """A new one at the beginning of its numbers."""
        found = cls("cpu")
        found.manual_seed(seed)
        _own.add(place_of(found))
        return found

    def __del__(self) -> None:
        _own.discard(place_of(self))


def place_of(generator: torch.Generator) -> int:
    """Where a generator is in memory: torch hands it on as another object of Python."""
    place: int = generator._cdata  # type: ignore[attr-defined]
    return place


def is_own(generator: torch.Generator) -> bool:
    """Whether a generator is one of ours."""
    return place_of(generator) in _own


def of_rank(
    generator: torch.Generator | None, rank: int, device: torch.device
) -> torch.Generator | None:
    """A generator whose numbers are others on each rank, also where all ranks have the same seed;
    that of rank 0 is the one that is given.

    Args:
        device: for which numbers are wanted.
    """
    if rank == 0:
        return generator
    where = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=where))
    # of a seed, generators on a CPU take the last 32 bits alone
    own = (seed + rank * 0x9E3779B1) % 2**63
    return torch.Generator(device if generator is None else generator.device).manual_seed(own)


def same_on(group: Any, generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator that draws the same on all ranks of a group, as the first of them says."""
    where = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=where).to(device)
    dist.broadcast(seed, group=group, group_src=0)
    return torch.Generator(device).manual_seed(int(seed))

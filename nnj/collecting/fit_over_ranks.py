"""What the ranks of a group have read of a data set, as one: nothing is sent while they read, so
that shards may have any sizes, and sums go over the ranks once, at the end.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnj.collecting.accumulate import Accumulator
from nnj.collecting.over_ranks import OverRanks
from nnj.collecting.request import Request
from nnj.collecting.same_data import Seen, check_apart
from nnj.distributed.ranks import Ranks, checked_group, same_ranks
from nnj.errors import NNJError
from nnj.recording.sharded import Sharding
from nnj.recording.wrappers import group_of, inside_wrapper

T = TypeVar("T")


@dataclass
class Read:
    """What has been read of the data, on this rank or on all of them.

    Attributes:
        total: what the mean divides by.
        value: the loss.
        samples: how many samples of the loader.
        seen: which these are.
        run: a name of the whole, if it is that of several ranks.
    """

    total: Tensor | float = 0.0
    value: Tensor | float = 0.0
    samples: int = 0
    seen: Seen = field(default_factory=Seen)
    run: str = ""


def unwrapped(model: nn.Module, group: Any) -> tuple[nn.Module, Any]:
    """The model under DistributedDataParallel, which is called without it, and the group over which
    data are split; None for this process alone.

    Errors: `NNJError` for parts of a model that are wrapped each by itself.
    """
    inner = inside_wrapper(model)
    if inner is not model:
        group = group_of(model) if group is None else group
        model = inner
    if any(isinstance(part, DistributedDataParallel) for part in model.modules()):
        raise NNJError(
            "parts of the model are under DistributedDataParallel, which counts on .backward(), "
            "and fit leaves no gradients. Give a model without it, or one that is under it as a "
            "whole"
        )
    return model, None if group is False else group


@contextmanager
def shared(
    read: Read,
    accumulator: Accumulator,
    request: Request,
    model: nn.Module | None,
    ranks: Ranks | None,
    of_data: Any,
) -> Iterator[None]:
    """What is read inside is afterwards that of all ranks.

    Args:
        model: None for a sharded one, whose passes are those of all ranks already.
        of_data: what must be the same on all ranks, and the loader.

    Errors: `NNJError`, on all ranks, for the first error of any, for samples that a sampler has
    given twice, and for ranks that have read the same.
    """
    if ranks is None:
        yield
        return
    facts, loader = of_data
    error: NNJError | None = None
    try:
        yield
    except NNJError as refused:
        error = refused
    except BaseException as why:
        ranks.leave(why)
        raise
    mine = float(read.total), float(read.value), read.samples, uuid.uuid4().hex
    more = (facts, mine, (_shards(loader), read.seen.sums()))
    if model is None and error is not None:
        raise error  # as on all ranks
    if model is None:
        ranks.meet()
        notes = ranks.notes(more)
    else:
        over = OverRanks(accumulator, request, ranks, mean=False)
        notes = [note.more for note in over.add_up([model], (), error, more)]
    for rank, (said, _, _) in enumerate(notes):
        if said != notes[0][0]:
            raise NNJError(
                f"rank {rank} fits {said}, and rank 0 {notes[0][0]} (the loss, its likelihood and "
                "the scale). Give all ranks of a group the same"
            )
    parts = [part for _, part, _ in notes]
    read.total, read.value = sum(part[0] for part in parts), sum(part[1] for part in parts)
    read.samples, read.run = sum(part[2] for part in parts), parts[0][3]
    _check_padding(read.samples, [shards for _, _, (shards, _) in notes])
    check_apart([seen for _, _, (_, seen) in notes])


def group_of_shards(sharding: Sharding, group: Any) -> Any:
    """The group over which a sharded model is. Errors: `NNJError` for another one."""
    if group is not None and not same_ranks(checked_group(group, "nnj.fit"), sharding.group):
        raise NNJError(
            "the model is sharded by fully_shard, over whose ranks the data are split, and group= "
            "says another thing. Leave it out"
        )
    return sharding.group


def in_step(batches: Iterator[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """Batches, as many on each rank as the one has that has most: a rank that has no more is given
    its last one again, with False for that it does not count.

    Errors: `NNJError`, on all ranks, for one that has none at all, or that of reading any.
    """
    last: list[T] = []
    while True:
        found, notes = ranks.agreed(
            lambda: next(batches, None), functools.partial(_has_more, bool(last))
        )
        if not any(more for more, _ in notes):
            return
        for rank, (more, had) in enumerate(notes):
            if not (more or had):
                raise NNJError(
                    f"rank {rank} has no batch, and a sharded model is called on all ranks. Give "
                    "each rank one batch at least"
                )
        last = last if found is None else [found]
        yield last[0], found is not None


def _has_more(had: bool, batch: object) -> tuple[bool, bool]:
    """Whether there is a batch, and whether there was one before."""
    return batch is not None, had


def _shards(loader: Any) -> tuple[int, int] | None:
    """Of a loader with a distributed sampler the samples of its data set, and the number of shards;
    None of any other.
    """
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        count, data = getattr(sampler, "num_replicas", None), getattr(loader, "dataset", None)
        if isinstance(count, int) and isinstance(data, Sized):
            return len(data), count
    return None


def _check_padding(samples: int, shards: list[tuple[int, int] | None]) -> None:
    """Errors: `NNJError` where samplers have given some samples twice, so that shards are even."""
    for found in shards:
        if found is not None and found[1] == len(shards) and samples > found[0]:
            raise NNJError(
                f"the ranks have read {samples} samples of a data set of {found[0]}: the sampler "
                "pads its shards with samples that count twice then. Give each rank its own, of "
                "any size, without the sampler: torch.utils.data.Subset(data, range(rank, "
                "len(data), world_size))"
            )

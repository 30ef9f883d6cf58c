"""The ranks of a process group over which data are split.

    meet          waits until all have come; who does not come says so by `leave`
    notes         what each rank says, to all of them
    numbers       the same, of a few whole numbers, at less cost
    sums          sums over ranks
    merged        what one rank makes of the trees that all have, to all of them
    rows          rows of all ranks, one rank after the other

Each call is one, or a few, collectives: all ranks of a group make the same ones, in one order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nnj.distributed.packing import (
    Slot,
    filled,
    form_of,
    packed,
    slots_of,
    tensors_of,
    unpacked,
)
from nnj.errors import NNJError

T = TypeVar("T")
Trees = dict[str, Any]

_SOON, _AT_MOST = 0.0005, 0.05  # seconds between two looks at the store
_sent = 0
_meetings: dict[str, int] = {}  # of each group by its name: how many there were


class Ranks:
    """This rank among those of a group.

    Args:
        group: a process group, or a device mesh of one dimension.
        what: who speaks, for errors.

    Attributes:
        size, rank: how many ranks there are, and which this is.

    Errors: `NNJError` for what is no group that this rank is in.
    """

    def __init__(self, group: Any, what: str):
        self.group, self.what = checked_group(group, what), what
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self._why: BaseException | None = None  # for which it has left

    # -- what ranks say ----------------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until all ranks have come, and none has left: in the group's store, so that nothing
        of what ranks are at meets another collective.

        Errors: `NNJError` for a rank that has left, or does not come in torch's time.
        """
        key, store = self._next(), _store()
        if store.add(f"{key}/came", 1) == self.size:
            self._forget_last(store)
            store.set(f"{key}/all", "")
        until, pause = time.monotonic() + store.timeout.total_seconds(), _SOON
        while not store.check([f"{key}/all"]):
            left = _left(store, key, self.size)
            if left or time.monotonic() > until:
                raise self._alone(left or "one has ended, or is elsewhere")
            time.sleep(pause)
            pause = min(2 * pause, _AT_MOST)

    def leave(self, why: BaseException) -> None:
        """Tell the others, without waiting for them, that this rank does not come to `meet`."""
        if self._why is why:
            return
        said, self._why = f"{type(why).__name__}: {why}", why
        with suppress(RuntimeError):  # the store went with its process, and others see that
            _store().set(f"{self._next()}/left/{self.rank}", said)

    def _next(self) -> str:
        """The key of the next meeting, which is the same on all ranks."""
        name = getattr(self.group, "group_name", "")
        _meetings[name] = _meetings.get(name, 0) + 1
        return self._key(_meetings[name])

    def _key(self, number: int) -> str:
        return f"nnj/{getattr(self.group, 'group_name', '')}/{number}"

    def _forget_last(self, store: Any) -> None:
        """Delete what the meeting before this one left in the store, where all have gone on."""
        last = self._key(_meetings[getattr(self.group, "group_name", "")] - 1)
        for what in ("came", "all"):
            store.delete_key(f"{last}/{what}")

    def notes(self, mine: Any) -> list[Any]:
        """What each rank says, in their order; plain values."""
        found: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """The whole numbers of each rank, in their order; as many of all."""
        row = self.carried(torch.tensor(mine))
        found = [torch.empty_like(row) for _ in range(self.size)]
        with self.together():
            dist.all_gather(found, row, group=self.group)
        return [[int(n) for n in row] for row in torch.stack(found).tolist()]

    def agreed(self, work: Callable[[], T], says: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """What this rank has made of its own, and what all say of theirs.

        Errors: `NNJError`, on all ranks, for the first that the work of any has raised.
        """
        mine, error = list[T](), None
        try:
            mine = [work()]
        except NNJError as refused:
            error = refused
        except BaseException as why:
            self.leave(why)
            raise
        self.meet()
        notes = self.notes((str(error), None) if error else (None, says(mine[0])))
        for rank, (said, _) in enumerate(notes):
            if said is not None:
                raise NNJError(f"rank {rank}: {said}") from (error if rank == self.rank else None)
        return mine[0], [note for _, note in notes]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Errors: `NNJError`, with torch's own, for a rank that has ended."""
        try:
            yield
        except RuntimeError as error:
            raise self._alone(f"torch says: {str(error).splitlines()[0]}") from error

    def _alone(self, why: str) -> NNJError:
        return NNJError(
            f"{self.what}: rank {self.rank} waits for the others of its group of {self.size}, and "
            f"not all came: {why}. All ranks must come to the end of it, each in its own time"
        )

    # -- tensors -----------------------------------------------------------------------------------

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over ranks, the same bits on all of them: one reduction for each
        dtype.
        """
        found: list[Tensor] = list(tensors)
        kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
        for dtype, device in kinds:
            mine = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == (dtype, device)]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in mine])
            wide = self.carried(torch.view_as_real(flat).reshape(-1) if dtype.is_complex else flat)
            if wide.numel():
                with self.together():
                    dist.all_reduce(wide, group=self.group)
                # of a ring: each entry once to be added, and once as a sum
                count_sent(2 * (self.size - 1) * wide.nbytes // self.size)
            flat = wide.to(device)
            flat = torch.view_as_complex(flat.reshape(-1, 2)) if dtype.is_complex else flat
            parts = flat.split([tensors[i].numel() for i in mine])
            for i, part in zip(mine, parts, strict=True):
                found[i] = part.reshape(tensors[i].shape)
        return found

    def merged(
        self,
        mine: Mapping[str, Any],
        forms: Sequence[Mapping[str, Any]],
        merge: Callable[[str, list[Any]], Any],
        device: torch.device,
    ) -> Trees:
        """Of each key what `merge` makes of the trees that ranks have for it, in their order: one
        rank does it, and tells the others, so that the results are the same bits.

        Args:
            mine: the trees of this rank.
            forms: those of each rank, without their numbers.
            device: of the tensors.

        Errors: `NNJError`, on all ranks, for one that `merge` raises on any.
        """
        owners = self._owners(forms)
        keys = [
            [key for key, owner in owners.items() if owner == rank] for rank in range(self.size)
        ]

        def there(rank: int, owned: Sequence[str]) -> list[str]:
            return [key for key in owned if key in forms[rank]]

        given = [[mine[key] for key in there(self.rank, owned)] for owned in keys]
        slots = [
            [slot for key in there(rank, keys[self.rank]) for slot in slots_of(forms[rank][key])]
            for rank in range(self.size)
        ]
        arrived = self._exchanged([tensors_of(trees) for trees in given], slots, device)
        found: dict[str, list[Any]] = {key: [] for key in keys[self.rank]}
        for rank, tensors in enumerate(arrived):
            left = iter(tensors)
            for key in there(rank, keys[self.rank]):
                found[key].append(filled(forms[rank][key], left))
        made, error = Trees(), None
        try:
            made = {key: merge(key, trees) for key, trees in found.items()}
        except NNJError as refused:
            error = refused
        notes = self.notes((None if error is None else str(error), form_of(made)))
        for rank, (said, _) in enumerate(notes):
            if said is not None:
                raise NNJError(said) from (error if rank == self.rank else None)
        tensors = tensors_of(list(made.values()))
        slots = [slots_of(list(form.values())) for _, form in notes]
        arrived = self._exchanged([tensors] * self.size, slots, device)
        everything = Trees()
        for (_, form), got in zip(notes, arrived, strict=True):
            everything |= filled(form, got)
        return {key: everything[key] for key in owners if key in everything}

    def _owners(self, forms: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Which rank merges what: the largest first, each to the rank that has least so far."""
        sizes: dict[str, int] = {}
        for form in forms:
            for key, tree in form.items():
                sizes[key] = max(sizes.get(key, 0), sum(s.room for s in slots_of(tree)))
        taken, owners = [0] * self.size, {}
        for key in sorted(sizes, key=lambda key: -sizes[key]):
            owners[key] = owner = min(range(self.size), key=taken.__getitem__)
            taken[owner] += sizes[key]
        return {key: owners[key] for key in sizes}

    def rows(self, mine: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Of each key the rows of all ranks, one rank after the other; any numbers of them."""
        forms = self.notes(form_of(dict(mine)))
        tensors = [mine[key] for key in forms[0]]
        slots = [[form[key] for key in forms[0]] for form in forms]
        arrived = self._exchanged([tensors] * self.size, slots, device)
        columns = zip(*arrived, strict=True)
        return {key: torch.cat(parts) for key, parts in zip(forms[0], columns, strict=True)}

    def _exchanged(
        self,
        given: Sequence[Sequence[Tensor]],
        slots: Sequence[Sequence[Slot]],
        device: torch.device,
    ) -> list[list[Tensor]]:
        """What has arrived from each rank.

        Args:
            given: the tensors for each rank.
            slots: the forms of those from each rank.
        """
        rows = [self.carried(packed(tensors, device)) for tensors in given]
        sizes = [sum(slot.room for slot in row) for row in slots]
        out = torch.cat(rows)
        into = torch.empty(sum(sizes), dtype=torch.uint8, device=out.device)
        with self.together():
            dist.all_to_all_single(into, out, sizes, list(map(len, rows)), group=self.group)
        count_sent(len(out) - len(rows[self.rank]))
        parts = into.to(device).split(sizes)
        return [list(unpacked(part, row)) for part, row in zip(parts, slots, strict=True)]

    def carried(self, t: Tensor) -> Tensor:
        """A tensor where the group can take it."""
        kinds = [part.split(":")[0] for part in dist.get_backend_config(self.group).split(",")]
        return t if t.device.type in kinds else t.to(kinds[0])


def _store() -> Any:
    """The store of torch's, at which all processes have met once already."""
    return dist.distributed_c10d._get_default_store()


def _left(store: Any, key: str, size: int) -> str:
    """Which ranks have said that they do not come."""
    there = [rank for rank in range(size) if store.check([f"{key}/left/{rank}"])]
    said = [(rank, store.get(f"{key}/left/{rank}").decode()) for rank in there]
    return "; ".join(f"rank {rank} has left by {why}" for rank, why in said)


def same_ranks(one: Any, other: Any) -> bool:
    """Whether two groups have the same ranks."""
    return one is other or (
        dist.get_process_group_ranks(one) == dist.get_process_group_ranks(other)
    )


def count_sent(size: int) -> None:
    """Note that this process gives bytes to others."""
    global _sent
    _sent += size


def bytes_sent() -> int:
    """How many bytes of tensors nnj has given to other processes so far, those of a sum as a ring
    sends them; what ranks say of them is some bytes for each place more.
    """
    return _sent


def there_are_groups() -> bool:
    """Whether this process may be one of several: a process group was made."""
    return dist.is_available() and dist.is_initialized()


def checked_group(group: Any, what: str) -> Any:
    """A process group. Errors: `NNJError` for what is none, or does not hold this rank."""
    if hasattr(group, "mesh_dim_names") and hasattr(group, "get_group"):
        if group.ndim != 1:
            raise NNJError(
                f"{what}: group= is a mesh of {group.ndim} dimensions. Name the one over which "
                'data are split: group=mesh["dp"].get_group()'
            )
        group = group.get_group()
    if not there_are_groups():
        raise NNJError(
            f"{what}: group={group!r}, but no process group is there. Call "
            "torch.distributed.init_process_group first, or leave group= out"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise NNJError(
            f"{what}: group={group!r} is no process group that this rank is in. Give one, such as "
            "torch.distributed.group.WORLD, or False for this rank alone"
        )
    return group

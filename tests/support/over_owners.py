"""What each process does in the tests of results that are no sums, of models that `fully_shard`
shards: each goes to its owner while columns walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import nnj
from nnj.collecting.owners import owner_of
from nnj.collecting.shares import Shares
from nnj.collecting.states_over_ranks import StatesOverRanks
from nnj.distributed import rounds
from nnj.distributed.ranks import Ranks
from tests.support.over_ranks import results, share
from tests.support.over_shards import Block, blocks, out_of_step, whole


class Bare(nn.Module):
    """A module whose own parameters are far apart: a chunk comes to one long before the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = Block(), nn.Parameter(torch.rand(4))
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(x @ self.weight)) + self.shift


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Odd(nn.Module):
    """Attention, tied, bare, frozen and checkpointed parts; a class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.bare = nn.Linear(2, 4), Tied(), Bare()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.again, self.frozen, self.head = Block(), nn.Linear(4, 4), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bare(self.tied(self.first(x.mT)))
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = checkpoint(self.again, self.frozen(hidden), use_reentrant=False)
        return self.head(hidden)


def odd() -> nn.Module:
    torch.manual_seed(2)
    return Odd().double()


class Numbers(nnj.Quantity):
    """A stranger's quantity that merges in a way of its own, in the order of passes and ranks: of
    each pass sum B^2 at a module, one behind the other; of two losses the smaller.
    """

    name, degree, place = "numbers", 1, nn.Module

    def add(self, state: Any, factors: Any, params: Any, total_columns: int) -> Any:
        value = sum(f.square_sum().sum() for f in factors if f is not None)
        return {"all": value if state is None else state["all"] + value}

    def end_pass(self, state: Any) -> Any:
        return {"all": state["all"][None]}

    def merge(self, one: Any, other: Any) -> Any:
        return {"all": torch.cat([one["all"], other["all"]])}

    def merge_losses(self, one: Any, other: Any) -> Any:
        return {"all": torch.minimum(one["all"], other["all"])}

    def finish(self, state: Any, samples: int) -> Any:
        return state["all"]


class Largest(nnj.Quantity):
    """Another one, at parameters: the largest entry of sum B^2 in all passes."""

    name, degree = "largest", 1

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Any:
        return factor.square_sum()

    def merge(self, one: Any, other: Any) -> Any:
        return torch.maximum(one, other)


class Sometimes(nnj.Quantity):
    """One that does not know what it is of three samples, and so of all."""

    name, degree = "sometimes", 1

    def module(self, factors: Any, params: Any) -> Any:
        found = [f for f in factors if f is not None]
        return None if found[0].n == 3 else sum(f.square_sum().sum() for f in found)[None]


class SometimesInAWayOfItsOwn(Sometimes):
    name = "sometimes"

    def merge(self, one: Any, other: Any) -> Any:
        return one + other


class Unwilling(Numbers):
    """One that does not merge."""

    name = "unwilling"

    def merge(self, one: Any, other: Any) -> Any:
        raise nnj.NNJError("unwilling: these do not merge")


def _one(model: nn.Module, loss: Any, mse: Any, batch: Any, other: Any) -> Tensor:
    value: Tensor = loss(model(batch[0]), batch[1])
    return value


def _tokens(model: nn.Module, loss: Any, mse: Any, batch: Any, other: Any) -> Tensor:
    """A class for each token."""
    y = (batch[1][:, None] + torch.arange(4)) % 3
    value: Tensor = loss(model(batch[0]).reshape(-1, 3), y.flatten())
    return value


def _two(model: nn.Module, loss: Any, mse: Any, batch: Any, other: Any) -> Tensor:
    """Two losses of the same samples."""
    z = model(batch[0])
    value: Tensor = loss(z, batch[1]) + 0.3 * mse(z, torch.zeros_like(z))
    return value


def _apart(model: nn.Module, loss: Any, mse: Any, batch: Any, other: Any) -> Tensor:
    """Two losses of other samples."""
    value: Tensor = loss(model(batch[0]), batch[1]) + loss(model(other[0]), other[1])
    return value


@dataclass
class Case:
    """What is collected in two passes, and how many places are merged while columns walk.

    Attributes:
        scalar: on which `.backward()` is called.
        of_rank: options of collect, by the rank.
        late: whether all is merged when the pass ends.
    """

    make: Callable[[], nn.Module] = blocks
    units: tuple[str, ...] = ("blocks.0", "blocks.1", "head")
    names: tuple[Any, ...] = ("kfac", "input_moment")
    scalar: Callable[..., Tensor] = _one
    options: dict[str, Any] = field(default_factory=dict)
    of_rank: Callable[[int], dict[str, Any]] = lambda rank: {}
    late: bool = False


ODD = ("tied", "bare", "again", "head")
CASES = {
    "strangers": Case(names=(Numbers(), Largest())),
    "strangers out of step": Case(names=(Numbers(), Largest()), of_rank=out_of_step),
    "two losses": Case(scalar=_two, names=("kfac", "input_moment", Numbers()), late=True),
    "other samples": Case(scalar=_apart, names=("kfac", "grad_variance"), late=True),
    "odd": Case(odd, ODD, ("kfac", "input_moment", "grad_variance", "ggn_diag"), _tokens),
    "odd, out of step": Case(
        odd, ODD, ("kfac", "grad_variance"), _tokens, dict(approx="reduce"), out_of_step
    ),
    "alive": Case(odd, ODD, ("kfac",), _tokens, dict(places="alive"), out_of_step),
    "moments": Case(names=("input_moment",)),
    "forward": Case(names=("kfac",), options=dict(fisher="forward")),
    "empirical": Case(names=("kfac",), options=dict(fisher="empirical"), of_rank=out_of_step),
}


def cases(size: int) -> dict[str, Case]:
    """Those that are tried with so many processes."""
    few = ("strangers", "two losses", "odd, out of step")
    return CASES if size == 2 else {name: CASES[name] for name in few}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many places are merged while columns walk, and how many when a pass ends."""
    found = {"in the pass": 0, "at its end": 0}
    merge, late, late_sum = Shares._merge, StatesOverRanks._merge, StatesOverRanks._sum

    def merged(shares: Shares, key: str, there: list[int]) -> None:
        found["in the pass"] += 1
        merge(shares, key, there)

    def merged_late(over: StatesOverRanks, places: Any, forms: Any, wanted: Any) -> None:
        found["at its end"] += sum(len(keys) for keys in wanted.values())
        late(over, places, forms, wanted)

    def summed_late(over: StatesOverRanks, places: Any, forms: Any, wanted: Any) -> None:
        # what is None on all ranks has nothing to be sent
        every = [form for said in forms for name in wanted for form in said[name].values()]
        found["at its end"] += sum(form is not None for form in every)
        late_sum(over, places, forms, wanted)

    Shares._merge, StatesOverRanks._merge = merged, merged_late  # type: ignore[method-assign]
    StatesOverRanks._sum = summed_late  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Shares._merge, StatesOverRanks._merge = merge, late  # type: ignore[method-assign]
        StatesOverRanks._sum = late_sum  # type: ignore[method-assign]


def sharded(model: nn.Module, units: tuple[str, ...]) -> nn.Module:
    """A model that all ranks share."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for path in units:
        fully_shard(model.get_submodule(path), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def collected(case: Case, ranks: range, over: bool) -> dict[str, Any]:
    """Two passes of each of some ranks."""
    size = dist.get_world_size()
    model = nnj.extend(sharded(case.make(), case.units) if over else case.make())
    loss, mse = nnj.extend(nn.CrossEntropyLoss()), nnj.extend(nn.MSELoss())
    options = case.options | (case.of_rank(ranks[0]) if over else {"group": False})
    with nnj.collect(*case.names, **options) as context:
        for step in range(2):
            for rank in ranks:
                batches = share(rank, step), share(rank, step + 4)
                value = case.scalar(model, loss, mse, *batches)
                (value if over else value / size).backward()
    names = tuple(n if isinstance(n, str) else n.name for n in case.names)
    return {key: whole(t) for key, t in results(model, names, context).items()}


def of_several(rank: int) -> dict[str, Any]:
    """All cases on a rank, beside one process; and what is refused."""
    rounds.BUCKET, found = 1, dict[str, Any]()
    for name, case in cases(dist.get_world_size()).items():
        with counted() as counts:
            over = collected(case, range(rank, rank + 1), True)
        found[name] = over, collected(case, range(dist.get_world_size()), False), counts
    found |= {"models": _models(rank), "refused": _refused(rank), "held": _held()}
    return found | {
        "refused first": _refused_first(rank),
        "once": _once(),
        "unknown": _unknown(rank),
    }


def _models(rank: int) -> Any:
    """One sharded model behind the other, and then the first one alone, in one `with`."""
    size, found = dist.get_world_size(), []
    for over in (True, False):
        torch.manual_seed(0)
        a = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        b = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        a, b = (nnj.extend(sharded(m, ()) if over else m) for m in (a, b))
        loss, ranks = nnj.extend(nn.CrossEntropyLoss()), [rank] if over else range(size)
        with nnj.collect("kfac", **({} if over else {"group": False})):
            for r in ranks:
                x, y = share(r, 0)
                (loss(b(a(x.flatten(1))), y) / len(ranks)).backward()
                (loss(a(x.flatten(1)), y) / len(ranks)).backward()
        each = [results(model, ("kfac",)) for model in (a, b)]
        found.append({f"{k} of {i}": t for i, kfac in enumerate(each) for k, t in kfac.items()})
    return found


def _refused(rank: int) -> Any:
    """A quantity that does not merge; gradients are reduced."""
    model, loss = nnj.extend(sharded(blocks(), ("head",))), nnj.extend(nn.CrossEntropyLoss())
    plain, said = sharded(blocks(), ("head",)), ""
    x, y = share(rank, 0)
    try:
        with nnj.collect(Unwilling()):
            loss(model(x), y).backward()
    except nnj.NNJError as error:
        said = str(error)
    nn.functional.cross_entropy(plain(x), y).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return said, all(torch.equal(whole(a.grad), whole(b.grad)) for a, b in pairs)


def _refused_first(rank: int) -> str:
    """Rank 1 is refused at the loss whose gradient arrives first, and others walk on at the next:
    for that, units that the pass has sharded again must be whole.
    """
    model, loss = nnj.extend(sharded(blocks(), ("head",))), nnj.extend(nn.CrossEntropyLoss())
    (x, y), (others, wanted) = share(rank, 0), share(rank, 4)
    try:
        with nnj.collect("ggn_diag"):
            first, last = loss(model(x), y), loss(model(others), wanted)
            (first + (last.exp() if rank == 1 else last)).backward()
    except nnj.NNJError as error:
        return str(error)
    return "nothing"


def _held() -> Any:
    """The most bytes of Kronecker factors that wait, those of the largest layer, and of all; in a
    pass whose columns walk at once, and in one where they walk one by one.
    """
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(12, 12), nn.Tanh())))
    loss, found = nnj.extend(nn.MSELoss()), []
    model = nnj.extend(sharded(model.double(), ("0", "2", "4", "6", "8")))
    size = Shares.size
    for options in ({}, {"memory": 1}):
        waited = [0]

        def sized(shares: Shares, waited: list[int] = waited) -> int:
            waited.append(size(shares))
            return waited[-1]

        Shares.size = sized  # type: ignore[method-assign]
        try:
            with nnj.collect("kfac", **options), counted() as counts:
                x = torch.randn(3, 12, dtype=torch.float64)
                loss(model(x), torch.zeros_like(x)).backward()
        finally:
            Shares.size = size  # type: ignore[method-assign]
        found.append((max(waited), counts))
    return found


def _unknown(rank: int) -> list[str]:
    """What is said where rank 1 alone does not know what it has."""
    said, (x, y) = [], share(rank, 0)
    for make in (blocks, lambda: sharded(blocks(), ("head",))):
        for quantity in (Sometimes(), SometimesInAWayOfItsOwn()):
            model, loss = nnj.extend(make()), nnj.extend(nn.CrossEntropyLoss())
            try:
                with nnj.collect(quantity, group=dist.group.WORLD):
                    loss(model(x), y).backward()
                said.append("nothing")
            except nnj.NNJError as error:
                said.append(str(error))
    return said


def _once() -> list[bool]:
    """Whether what stands at a parameter is what the collection goes on with, and no other tensor:
    of sums and of rows, after one pass and after two.
    """
    model, loss = nnj.extend(sharded(blocks(), ())), nnj.extend(nn.CrossEntropyLoss())
    x, y = share(0, 0)
    with nnj.collect("ggn_diag", "batch_grad") as context:
        found = []
        for _ in range(2):
            loss(model(x), y).backward()
            p: Any = model.head.weight
            diagonal, rows = (context.accumulator.state(n, p) for n in ("ggn_diag", "batch_grad"))
            found.append(p.ggn_diag.to_local().data_ptr() == diagonal.to_local().data_ptr())
            found.append(p.batch_grad.data_ptr() == rows.data_ptr())
    return found


def owners(rank: int) -> list[int]:
    """Who owns each of six layers, of which the later are known already."""
    ranks = Ranks(dist.group.WORLD, "a test")
    layers = [nn.Linear(4, 4) for _ in range(6)]
    later = nn.Sequential(*layers[3:])
    known = [owner_of(layer, [later], ranks) for layer in layers[3:]]
    every = [owner_of(layer, [nn.Sequential(*layers)], ranks) for layer in layers]
    assert every[3:] == known
    return every

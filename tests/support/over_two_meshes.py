"""What each process does in the tests of models that `fully_shard` shards over one dimension of
ranks, and tensor parallelism distributes over another one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.data import DataLoader, Subset

import nnj
from nnj.distributed import rounds
from tests.support.over_ranks import EVERY, compared, data, results, share
from tests.support.over_shards import fitted, noted, out_of_step, whole
from tests.support.tensor_parallel import HEADS, PAIR, Strange, block, pair

DATA = 2  # ranks over which data are split; as many share a model

EACH = tuple(name for name in EVERY if name != "batch_grad_dot")


@dataclass
class Way:
    """A model, how its layers are distributed and which are units, and what is collected.

    Attributes:
        of_data: options of collect, by the rank among those over which data are split.
    """

    make: Callable[[], nn.Module]
    plan: dict[str, ParallelStyle]
    units: tuple[str, ...] = ()
    names: tuple[str, ...] = ("ggn_diag", "batch_grad", "batch_grad_sq_norm")
    options: dict[str, Any] = field(default_factory=dict)
    of_data: Callable[[int], dict[str, Any]] = lambda rank: {}


WAYS = {
    "pair, one unit": Way(pair, PAIR),
    "pair, every quantity": Way(pair, PAIR, ("1", "3"), EACH),
    "heads": Way(block, HEADS, ("attention", "up", "down")),
    "not resharded": Way(pair, PAIR, ("3",), options=dict(reshard_after_forward=False)),
    "heads, out of step": Way(
        block, HEADS, ("attention", "up"), ("ggn_diag", "grad_variance", "kfac"), {}, out_of_step
    ),
}


def sharded(way: Way, mesh: Any) -> nn.Module:
    model = parallelize_module(way.make(), mesh["tp"], way.plan)
    for path in way.units:
        fully_shard(model.get_submodule(path), mesh=mesh["dp"], **way.options)
    return fully_shard(model, mesh=mesh["dp"], **way.options)


def train(way: Way, mesh: Any, collecting: bool) -> dict[str, Any]:
    """Two batches in one `with`, and a step of an optimizer; twice."""
    model, loss, mine = sharded(way, mesh), nn.CrossEntropyLoss(), mesh["dp"].get_local_rank()
    if collecting:
        model, loss = nnj.extend(model), nnj.extend(loss)
    found = dict[str, Any]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=False)
    for step in range(2):
        optimizer.zero_grad()
        options = way.of_data(mine)
        with nnj.collect(*way.names, **options) if collecting else nullcontext() as context:
            for i in range(2):
                x, y = share(mine, 2 * step + i)
                loss(model(x), y).backward()
        if collecting and step == 0:
            found |= noted(model, way.names, context)
        found[f"grad {step}"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
    found["state"] = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return found


def alone(way: Way) -> dict[str, Any]:
    """One process that differentiates the mean of the losses."""
    model, loss = nnj.extend(way.make()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*way.names, group=False) as context:
        for rank in range(DATA):
            for i in range(2):
                x, y = share(rank, i)
                (loss(model(x), y) / DATA).backward()
    return results(model, way.names, context)


FITTED = ("ggn_diag", "kfac", "ekfac", "grad_variance", "batch_grad")


def _fitted(mesh: Any) -> Any:
    """A fit, all of it, and that of one process."""
    every, mine = data(), mesh["dp"].get_local_rank()
    shard = Subset(every, range(mine, len(every), DATA))
    loss = nn.CrossEntropyLoss()
    over = nnj.fit(sharded(WAYS["heads"], mesh), loss, DataLoader(shard, 3 + mine), *FITTED)
    one = nnj.fit(block(), loss, DataLoader(every, 4), *FITTED)
    return fitted(over), fitted(over.whole()), fitted(one), list(range(mine, len(every), DATA))


def _gathered(mesh: Any) -> Any:
    """Rows of all ranks, and the gradient, which they add up to."""
    model, loss = nnj.extend(sharded(WAYS["heads"], mesh)), nnj.extend(nn.CrossEntropyLoss())
    x, y = share(mesh["dp"].get_local_rank(), 0)
    with nnj.collect("batch_grad") as context:
        loss(model(x), y).backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters()}
    return {n: (t, grads[n]) for n, t in context.gather("batch_grad").items()}


def _draws(mesh: Any) -> Any:
    """Of random columns, where all ranks have the same data, and the seed of a rank is that of
    those with other data: what all have, and what one process has that draws once.
    """
    loss, found, (x, y) = nnj.extend(nn.CrossEntropyLoss()), [], share(0, 0)
    for over in (True, False):
        model = nnj.extend(sharded(WAYS["heads"], mesh) if over else block())
        torch.manual_seed(3 + (mesh["tp"].get_local_rank() if over else 0))
        with nnj.collect("ggn_diag_mc", **({} if over else {"group": False})):
            loss(model(x), y).backward()
        found.append(whole(model.head.weight.ggn_diag_mc))  # type: ignore[union-attr]
    return found


def _strange(mesh: Any) -> list[str]:
    """Quantities of which nobody knows whether they are of a part or of all, and one that says
    so.
    """
    said, (x, y) = list[str](), share(mesh["dp"].get_local_rank(), 0)
    for quantity in (Strange(), StrangeMoments(), Total()):
        model, loss = nnj.extend(sharded(WAYS["heads"], mesh)), nnj.extend(nn.CrossEntropyLoss())
        try:
            with nnj.collect(quantity, "ggn_diag"):
                loss(model(x), y).backward()
            ok = [
                torch.allclose(whole(p.total), whole(p.ggn_diag).sum()[None])
                for p in model.parameters()
            ]
            said.append("right" if all(ok) else "wrong")
        except nnj.NNJError as error:
            said.append(str(error))
    return said


class StrangeMoments(Strange):
    """One that is no sum."""

    def merge(self, one: Any, other: Any) -> Any:
        return one + other


class Total(Strange):
    """One that says what it is."""

    name, entrywise = "total", False


def of_four(rank: int) -> dict[str, Any]:
    """All of it on a rank."""
    mesh = init_device_mesh("cpu", (DATA, 2), mesh_dim_names=("dp", "tp"))
    rounds.BUCKET = 1
    found = {"ways": compared(WAYS, lambda way, on: train(way, mesh, on), alone)}
    found |= {"fitted": _fitted(mesh), "gathered": _gathered(mesh), "draws": _draws(mesh)}
    return found | {"data": mesh["dp"].get_local_rank(), "strange": _strange(mesh)}

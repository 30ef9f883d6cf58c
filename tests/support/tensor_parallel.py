"""What each process does in the tests of models under tensor parallelism: the same training with
and without nnj, and alone, with the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import nnj
from tests.support.over_ranks import EVERY, compared, net, results, share
from tests.support.over_shards import fitted, noted, whole


class Attention(nn.Module):
    """Attention whose heads are on several ranks; each has `heads` of them in all."""

    def __init__(self, width: int = 8, heads: int = 4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.size = width // heads

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            part(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP between norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.attention = nn.Linear(2, 8), nn.LayerNorm(8), Attention()
        self.after, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.mT)
        hidden = hidden + self.attention(self.norm(hidden))
        hidden = hidden + self.down(torch.tanh(self.up(self.after(hidden))))
        return self.head(hidden.mean(1))


def pair() -> nn.Module:
    """A layer by outputs and one by inputs, on vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def last() -> nn.Module:
    """The same, and nothing behind it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def block() -> nn.Module:
    torch.manual_seed(1)
    return Block().double()


PAIR: dict[str, ParallelStyle] = {"1": ColwiseParallel(), "3": RowwiseParallel()}
HEADS: dict[str, ParallelStyle] = {
    **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
    "attention.o": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


@dataclass
class Way:
    """A model, how it is distributed, and what is collected."""

    make: Callable[[], nn.Module]
    plan: dict[str, ParallelStyle]
    names: tuple[str, ...] = ("ggn_diag", "batch_grad")
    extend: str = "outside"


BY_PARAMETER = tuple(
    name
    for name in EVERY
    if name not in ("ggn_block", "kfac", "ggn", "input_moment", "batch_grad_dot")
)
WAYS = {
    "pair": Way(pair, PAIR),
    "pair, inside": Way(pair, PAIR, extend="inside"),
    "pair, every quantity of parameters": Way(pair, PAIR, BY_PARAMETER),
    "pair, every quantity": Way(pair, PAIR, EVERY),
    "last": Way(last, PAIR, EVERY),
    "heads": Way(block, HEADS),
    "heads, every quantity of parameters": Way(block, HEADS, BY_PARAMETER),
    "heads, every quantity": Way(block, HEADS, EVERY),
}


def distributed(way: Way, mesh: Any) -> nn.Module:
    model = way.make()
    if way.extend == "inside":
        nnj.extend(model)
    model = parallelize_module(model, mesh, way.plan)
    return nnj.extend(model) if way.extend == "outside" else model


def train(way: Way, mesh: Any, collecting: bool) -> dict[str, Any]:
    """A batch and a step of an optimizer, twice; all ranks have the same data."""
    model = distributed(way, mesh) if collecting else parallelize_module(way.make(), mesh, way.plan)
    loss = nn.CrossEntropyLoss()
    loss = nnj.extend(loss) if collecting else loss
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), dict[str, Any]()
    for step in range(2):
        optimizer.zero_grad()
        with nnj.collect(*way.names) if collecting else nullcontext() as context:
            x, y = share(0, step)
            loss(model(x), y).backward()
        if collecting and step == 0:
            found |= noted(model, way.names, context)
        found[f"grad {step}"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
    found["state"] = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return found


def alone(way: Way) -> dict[str, Any]:
    model, loss = nnj.extend(way.make()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*way.names) as context:
        x, y = share(0, 0)
        loss(model(x), y).backward()
    return results(model, way.names, context)


def odd(rank: int) -> dict[str, Any]:
    """What is said, and found, of other uses."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), dict[str, Any]()
    for name, run in (ODD if mesh.size() == 2 else OF_FOUR).items():
        dist.barrier()
        try:
            found[name] = run(rank, mesh)
        except (nnj.NNJError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _passed(model: nn.Module, *names: str, rank: int = 0, **options: Any) -> nn.Module:
    nnj.extend(model)
    x, y = share(0, 0)
    with nnj.collect(*names, **options):
        nnj.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    return model


def _fitted(rank: int, mesh: Any) -> Any:
    """fit, of which every rank reads the same data."""
    batches = [share(0, 0), share(0, 1)]
    over = nnj.fit(parallelize_module(pair(), mesh, PAIR), nn.CrossEntropyLoss(), batches, *FITTED)
    one = nnj.fit(pair(), nn.CrossEntropyLoss(), batches, *FITTED)
    found = [
        fitted(fit)
        | {"vector": fit.vector("ggn_diag")}
        | {f"matrix {n}": fit.matrix(n).dense() for n in ("ggn_diag", "kfac", "ekfac")}
        for fit in (over, one)
    ]
    gathered = over.whole()
    with tempfile.TemporaryDirectory() as folder:
        gathered.save(Path(folder) / "fit.pt")
        read = nnj.Fit.load(Path(folder) / "fit.pt")
    x = share(1, 1)[0]
    everything = [
        fitted(fit) | {"predicted": nnj.laplace(fit, "kfac", model=pair()).predict_proba(x)}
        for fit in (gathered, read, one)
    ]
    over, one = (
        nnj.fit(model, nn.CrossEntropyLoss(), batches, *[n for n in FITTED if n != "ekfac"])
        for model in (parallelize_module(pair(), mesh, PAIR), pair())
    )
    everything += [fitted(nnj.Fit.merge([fit, one])) for fit in (over.whole(), one)]
    said = []
    for ask in (lambda: over.save("nowhere"), lambda: nnj.laplace(gathered, "kfac")):
        with pytest.raises(nnj.NNJError) as error:
            ask()
        said.append(str(error.value))
    return found, everything, said


def _draws(rank: int, mesh: Any) -> Any:
    """Ranks with seeds of their own draw the same."""
    torch.manual_seed(rank)
    model = _passed(parallelize_module(pair(), mesh, PAIR), "ggn_diag_mc")
    last = model[5].weight.ggn_diag_mc  # type: ignore[index, union-attr]
    every = [torch.empty_like(last) for _ in range(mesh.size())]
    dist.all_gather(every, last)
    return every


def _uneven(rank: int, mesh: Any) -> Any:
    """Three outputs on two ranks."""
    plan: dict[str, ParallelStyle] = {"5": ColwiseParallel(output_layouts=Replicate())}
    return _passed(parallelize_module(pair(), mesh, plan), "ggn_diag")


def _sequence(rank: int, mesh: Any) -> Any:
    return _passed(
        parallelize_module(block(), mesh, {"norm": SequenceParallel(use_local_output=True)}),
        "ggn_diag",
    )


def _products(rank: int, mesh: Any) -> Any:
    model = nnj.extend(parallelize_module(pair(), mesh, PAIR))
    nnj.jacobian(model, share(0, 0)[0], "weight")


def _same_group(rank: int, mesh: Any) -> Any:
    """group= is that of the mesh of the model."""
    _passed(parallelize_module(pair(), mesh, PAIR), "ggn_diag", group=mesh.get_group())


class Strange(nnj.Quantity):
    """A number for each parameter, which it does not say."""

    degree = 1

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum().sum()[None]


def _strange(rank: int, mesh: Any) -> Any:
    return _passed(parallelize_module(pair(), mesh, PAIR), Strange())


def _two_dimensions(rank: int, mesh: Any) -> Any:
    """Two ranks share a model, and two such pairs the data."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    names = ("ggn_diag", "kfac", "batch_grad", "batch_grad_sq_norm")
    model = nnj.extend(parallelize_module(pair(), both["tp"], PAIR))
    loss, mine = nnj.extend(nn.CrossEntropyLoss()), both.get_local_rank("dp")
    with nnj.collect(*names, group=both["dp"].get_group()):
        x, y = share(mine, 0)
        loss(model(x), y).backward()
    found = {k: whole(t) for k, t in results(model, names, None).items()}
    one = nnj.extend(pair())
    with nnj.collect(*names):
        for r in range(2):
            x, y = share(r, 0)
            (loss(one(x), y) / 2).backward()
    return found, results(one, names, None), mine


def _hybrid(rank: int, mesh: Any) -> Any:
    """Two pairs of ranks, each of which has the whole model in shards."""
    both, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), net()
    for part in (model.head, model):
        fully_shard(part, mesh=both)
    nnj.extend(model)
    loss, names = nnj.extend(nn.CrossEntropyLoss()), ("ggn_diag",)
    with nnj.collect(*names):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()
    found = {k: whole(t) for k, t in results(model, names, None).items()}
    one = nnj.extend(net())
    with nnj.collect(*names):
        for r in range(4):
            (loss(one(share(r, 0)[0]), share(r, 0)[1]) / 4).backward()
    return found, results(one, names, None)


OF_FOUR: dict[str, Callable[[int, Any], Any]] = {
    "two dimensions": _two_dimensions,
    "hybrid": _hybrid,
}
FITTED = ("ggn_diag", "kfac", "batch_grad", "ekfac", "grad_variance", "batch_grad_sq_norm")
ODD: dict[str, Callable[[int, Any], Any]] = {
    "fitted": _fitted,
    "draws": _draws,
    "gathered outputs": _uneven,
    "sequence": _sequence,
    "products": _products,
    "same group": _same_group,
    "strange": _strange,
}


def of_several(rank: int) -> dict[str, Any]:
    """All of it, in one group of processes."""
    return {"ways": all_ways(rank), "odd": odd(rank)}


def all_ways(rank: int) -> dict[str, Any]:
    """All of them on a rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return compared(WAYS, lambda w, on: train(w, mesh, on), alone)

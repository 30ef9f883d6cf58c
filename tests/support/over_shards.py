"""What each process does in the tests of models that `fully_shard` shards: the same training with
and without nnj, and alone, on the batches of all ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

import nnj
from nnj.collecting.shares import Shares
from nnj.distributed import rounds
from nnj.recording.sharded import Sharding
from tests.support.over_ranks import EVERY, compared, data, net, plain, results, share


class Block(nn.Module):
    """A block of a transformer, whose input goes around its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(self.norm(x))))


class Blocks(nn.Module):
    """Blocks behind an embedding, a bare parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.mT) * self.scale
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


def blocks() -> nn.Module:
    torch.manual_seed(1)
    return Blocks().double()


@dataclass
class Way:
    """A way to shard and train.

    Attributes:
        make: the model.
        units: the paths of its units, beside itself.
        options: of fully_shard.
        extend: "inside" of it, or "outside".
        names: the quantities.
        unsynced: whether the gradients of the first of two batches are not reduced.
        divides: as of set_gradient_divide_factor.
        modules: of collect, by their paths.
        of_rank: options of collect, by the rank.
    """

    make: Callable[[], nn.Module] = net
    units: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    extend: str = "outside"
    names: tuple[str, ...] = ("ggn_diag", "batch_grad", "kfac")
    unsynced: bool = False
    divides: float | None = None
    modules: tuple[str, ...] = ()
    of_rank: Callable[[int], dict[str, Any]] = lambda rank: {}


def out_of_step(rank: int) -> dict[str, Any]:
    """Rank 1 walks one column at a time, and verifies nothing."""
    return dict(memory=1, verify=False) if rank == 1 else {}


NESTED = ("conv", "twice", "head")
PARTS = ("blocks.0", "blocks.1", "head")
ALL = tuple(name for name in EVERY if name not in ("batch_grad_dot", "ggn_block", "ggn"))
WAYS = {
    "one unit": Way(),
    "nested": Way(units=NESTED),
    "nested, inside": Way(units=NESTED, extend="inside"),
    "nested, resharded": Way(units=NESTED, options=dict(reshard_after_forward=True)),
    "nested, not resharded": Way(units=NESTED, options=dict(reshard_after_forward=False)),
    "no sync": Way(units=NESTED, unsynced=True),
    "divided by 3": Way(units=NESTED, divides=3.0),
    "blocks": Way(blocks, PARTS),
    "one module": Way(units=NESTED, modules=("head",)),
    "every quantity": Way(units=NESTED, names=EVERY),
    "every quantity of blocks": Way(blocks, PARTS, names=EVERY),
    "out of step": Way(blocks, PARTS, names=EVERY, of_rank=out_of_step),
}


def ways(size: int) -> dict[str, Way]:
    """Those that are tried with so many processes."""
    few = ("nested", "blocks", "every quantity of blocks")
    return WAYS if size == 2 else {name: WAYS[name] for name in few}


def sharded(way: Way) -> tuple[nn.Module, Any]:
    """A model, and its loss, both extended."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = way.make()
    if way.extend == "inside":
        nnj.extend(model)
    for path in way.units:
        fully_shard(model.get_submodule(path), mesh=mesh, **way.options)
    fully_shard(model, mesh=mesh, **way.options)
    if way.divides is not None:
        for part in model.modules():
            if hasattr(part, "set_gradient_divide_factor"):
                part.set_gradient_divide_factor(way.divides)
    return model, nn.CrossEntropyLoss()


def whole(t: Any) -> Any:
    """A result as a plain tensor."""
    t = plain(t)
    return t.full_tensor() if isinstance(t, DTensor) else t


def where(t: Any) -> Any:
    """How a result is placed."""
    return tuple(map(str, t.placements)) if isinstance(t, DTensor) else None


def noted(model: nn.Module, names: tuple[str, ...], context: Any) -> dict[str, Any]:
    """All that was collected, how it is placed, and how the parameters are."""
    parts = results(model, names, context)
    return {
        "results": {key: whole(t) for key, t in parts.items()},
        "placed": {key: where(t) for key, t in parts.items()},
        "like": {name: where(p) for name, p in model.named_parameters()},
    }


def train(way: Way, rank: int, collecting: bool) -> dict[str, Any]:
    """Two batches in one `with`, and a step of an optimizer; twice."""
    model, loss = sharded(way)
    found = dict[str, Any]()
    if collecting:
        model, loss = nnj.extend(model), nnj.extend(loss)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tops = [model.get_submodule(path) for path in way.modules] or None
    for step in range(2):
        optimizer.zero_grad()
        options = way.of_rank(rank)
        collect = nnj.collect(*way.names, modules=tops, **options) if collecting else nullcontext()
        with collect as context:
            for i in range(2 if "batch_grad_dot" not in way.names else 1):
                if way.unsynced:
                    model.set_requires_gradient_sync(i > 0)
                x, y = share(rank, 2 * step + i)
                loss(model(x), y).backward()
        if collecting and step == 0:
            found |= noted(model, way.names, context)
            found["samples"] = context.samples
        grads = {n: p.grad for n, p in model.named_parameters()}
        found[f"grad {step}"] = {n: whole(g) for n, g in grads.items()}
        optimizer.step()
    found["state"] = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return found


def alone(way: Way, size: int) -> dict[str, Any]:
    """One process that differentiates the losses of all ranks, over what gradients divide by."""
    model, loss = nnj.extend(way.make()), nnj.extend(nn.CrossEntropyLoss())
    divides = size if way.divides is None else way.divides
    tops = [model.get_submodule(path) for path in way.modules] or None
    dot = "batch_grad_dot" in way.names
    names = tuple(name for name in way.names if name != "batch_grad_dot")
    with nnj.collect(*names, modules=tops, group=False) as context:
        for rank in range(size):
            for i in range(1 if dot else 2):
                x, y = share(rank, i)
                (loss(model(x), y) / divides).backward()
    return results(model, names, context)


def all_ways(rank: int) -> dict[str, Any]:
    """All of them on a rank: of two processes, sums are shared as soon as there are any."""
    size = dist.get_world_size()
    if size == 2:
        rounds.BUCKET = 1
    return compared(ways(size), lambda w, on: train(w, rank, on), lambda w: alone(w, size))


def of_several(rank: int) -> dict[str, Any]:
    """All of it, in one group of processes; of three less than of two."""
    found = {"ways": all_ways(rank)}
    return found | ({"odd": odd(rank)} if dist.get_world_size() == 2 else {})


# -- fit -------------------------------------------------------------------------------------------

FITTED = ("ggn_diag", "kfac", "ekfac", "grad_variance", "batch_grad")


def fitted(fit: nnj.Fit) -> dict[str, Any]:
    """All numbers of a fit."""
    found: dict[str, Any] = {}
    for name, values in fit.items():
        each = values.items() if isinstance(values, dict) else [("", values)]
        found |= {f"{name} {key}": whole(value) for key, value in each}
    facts = ("samples", "total", "terms", "loss_value", "scale", "loss", "likelihood", "trace")
    return found | {fact: getattr(fit, fact) for fact in facts}


def odd(rank: int) -> dict[str, Any]:
    """What fit gives, and what is said where not all goes well."""
    size, found = dist.get_world_size(), dict[str, Any]()
    every = data()
    mine = Subset(every, range(rank, len(every), size))
    way = WAYS["nested"]
    for scale in ("sum", "mean"):
        model, loss = sharded(way)
        over = nnj.fit(model, loss, DataLoader(mine, 1 + rank), *FITTED, scale=scale)
        one = nnj.fit(net(), loss, DataLoader(every, 4), *FITTED, scale=scale)
        found[scale] = fitted(over), fitted(one), over.rows
    for name, run in ODD.items():
        dist.barrier()
        try:
            found[name] = run(rank, size)
        except (nnj.NNJError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _refused(rank: int, size: int) -> Any:
    """Rank 1 is refused; gradients are reduced, and training goes on."""
    model, loss = sharded(WAYS["nested"])
    model, loss, found = nnj.extend(model), nnj.extend(loss), {}
    x, y = share(rank, 0)
    try:
        with nnj.collect("ggn_diag"):
            value = loss(model(x), y)
            (value.exp() if rank == 1 else value).backward()
    except nnj.NNJError as error:
        found["said"] = str(error)
    found["grad"] = {n: whole(p.grad) for n, p in model.named_parameters()}
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    found["later"] = whole(model.head.weight.ggn_diag)
    return found


def _mixed_precision(rank: int, size: int) -> Any:
    """Parameters in bfloat16 while they are whole: as one process has them."""
    mesh, results = init_device_mesh("cpu", (size,)), {}
    x, y = share(rank, 0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, loss = net().float(), nnj.extend(nn.CrossEntropyLoss())
    fully_shard(model.head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        loss(model(x.float()).float(), y).backward()
    results["found"] = {n: whole(p.ggn_diag) for n, p in model.named_parameters()}
    one = nnj.extend(net().bfloat16())
    with nnj.collect("ggn_diag"):
        for r in range(size):
            x, y = share(r, 0)
            (loss(one(x.bfloat16()).float(), y) / size).backward()
    results["alone"] = {n: p.ggn_diag for n, p in one.named_parameters()}
    return results


def _world(rank: int, size: int) -> Any:
    """group= is another one with the same ranks."""
    model, loss = sharded(WAYS["nested"])
    model, loss = nnj.extend(model), nnj.extend(loss)
    x, y = share(rank, 0)
    with nnj.collect("ggn_diag", group=dist.new_group()) as context:
        loss(model(x), y).backward()
    try:
        context.matrix("ggn_diag")
    except nnj.NNJError as error:
        return whole(model.head.weight.ggn_diag), str(error)


def _parts_of_fit(rank: int, size: int) -> Any:
    """What wants all of a fit."""
    model, loss = sharded(WAYS["nested"])
    fit, said = nnj.fit(model, loss, [share(rank, 0)], "ggn_diag", "kfac"), []
    for ask in (
        lambda: fit.vector("ggn_diag"),
        lambda: fit.matrix("kfac"),
        lambda: fit.save("nowhere"),
        lambda: nnj.Fit.merge([fit, fit]),
        lambda: nnj.laplace(fit, "kfac"),
    ):
        try:
            ask()
        except nnj.NNJError as error:
            said.append(str(error))
    return said


def _whole(rank: int, size: int) -> Any:
    """All of a fit on each rank: as that of one process, also in a file and of a posterior."""
    model, loss = sharded(WAYS["nested"])
    names, every = (*FITTED, "ggn_block", "ggn", "batch_grad_sq_norm"), data()
    mine = Subset(every, range(rank, len(every), size))
    over = nnj.fit(model, loss, DataLoader(mine, 1 + rank), *names).whole()
    one = nnj.fit(net(), loss, DataLoader(every, 4), *names)
    with tempfile.TemporaryDirectory() as folder:
        over.save(Path(folder) / "fit.pt")
        read = nnj.Fit.load(Path(folder) / "fit.pt")
    found = []
    for fit in (over, read, one):
        results = {k: plain(t) for k, t in fitted(fit).items()}
        matrices = {f"matrix {n}": fit.matrix(n).dense() for n in ("ggn_diag", "kfac", "ggn")}
        posterior = nnj.laplace(fit, "kfac", model=net() if fit is not one else None)
        predicted = {"predicted": posterior.predict_proba(every[:][0])}
        found.append(results | matrices | predicted | {"vector": fit.vector("ggn_diag")})
    assert over.whole() is over and not any(isinstance(t, DTensor) for t in found[0].values())
    again = nnj.fit(net(), loss, DataLoader(every, 4), *FITTED[:2])
    pairs = [
        nnj.Fit.merge([fit, again])
        for fit in (
            nnj.fit(sharded(WAYS["nested"])[0], loss, DataLoader(mine, 2), *FITTED[:2]).whole(),
            again,
        )
    ]
    return found, [fitted(fit) for fit in pairs]


def _partly(rank: int, size: int) -> Any:
    """Only some parameters are in units."""
    mesh = init_device_mesh("cpu", (size,))
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    fully_shard(model.head, mesh=mesh)
    with nnj.collect("ggn_diag"):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _alone(rank: int, size: int) -> Any:
    """group=False, which a sharded model cannot be."""
    model, loss = sharded(WAYS["nested"])
    nnj.extend(model)
    with nnj.collect("ggn_diag", group=False):
        nnj.extend(loss)(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _then_plain(rank: int, size: int) -> Any:
    """A pass of a model that is not sharded comes after one of a sharded model."""
    model, loss = sharded(WAYS["nested"])
    model, loss, other = nnj.extend(model), nnj.extend(loss), nnj.extend(net())
    x, y = share(rank, 0)
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
        loss(other(x), y).backward()


def _gathered(rank: int, size: int) -> Any:
    model, loss = sharded(WAYS["nested"])
    nnj.extend(model)
    with nnj.collect("batch_grad") as context:
        nnj.extend(loss)(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters()}
    return {n: (t, grads[n]) for n, t in context.gather("batch_grad").items()}


def _factors(rank: int, size: int) -> Any:
    """Units with other factors."""
    model, loss = sharded(WAYS["nested"])
    nnj.extend(model)
    model.head.set_gradient_divide_factor(3.0)
    with nnj.collect("ggn_diag"):
        nnj.extend(loss)(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _no_batch(rank: int, size: int) -> Any:
    model, loss = sharded(WAYS["nested"])
    nnj.fit(model, loss, [share(0, 0)] if rank == 0 else [], "ggn_diag")


class Watch:
    """How many units are whole at a time, and how many bytes of results wait to be shared."""

    def __init__(self) -> None:
        self.opened, self.whole, self.most, self.waited = list[int](), set[int](), 0, 0
        self._kept = Sharding.open, Sharding.close, Shares.size

    def __enter__(self) -> Watch:
        opens, closes, size = self._kept

        def opened(sharding: Sharding, unit: int) -> None:
            opens(sharding, unit)
            self.opened.append(unit)
            self.whole.add(unit)
            self.most = max(self.most, len(self.whole))

        def closed(sharding: Sharding, unit: int) -> None:
            closes(sharding, unit)
            self.whole.remove(unit)

        def sized(shares: Shares) -> int:
            found = size(shares)
            self.waited = max(self.waited, found)
            return found

        Sharding.open, Sharding.close, Shares.size = opened, closed, sized  # type: ignore
        return self

    def __exit__(self, *_: Any) -> None:
        Sharding.open, Sharding.close, Shares.size = self._kept  # type: ignore[method-assign]


def _memory(rank: int, size: int) -> Any:
    """Six layers, a unit each, of as many parameters."""
    mesh = init_device_mesh("cpu", (size,))
    layers = [m for _ in range(6) for m in (nn.Linear(12, 12), nn.Tanh())]
    model = nn.Sequential(*layers).double()
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model, loss = nnj.extend(model), nnj.extend(nn.MSELoss())
    x, y = torch.randn(3, 12).double(), torch.randn(3, 12).double()
    rounds.BUCKET, found = 1, {}
    for name in ("first", "known", "in chunks"):
        options = dict(memory=1) if name == "in chunks" else {}
        with nnj.collect("ggn_diag", **options) as context, Watch() as watch:
            value = loss(model(x), y)
            value.backward()
        found[name] = len(watch.opened), len(watch.whole), watch.most, watch.waited
    asleep = [p.numel() for p in model.parameters() if isinstance(p, DTensor)]
    return found, sum(asleep), context.samples


def _two_models(rank: int, size: int) -> Any:
    """One sharded model behind the other, beside the same in one process."""
    mesh, found = init_device_mesh("cpu", (size,)), []
    for over in (True, False):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(8, 6), nn.Tanh()).double(), nn.Linear(6, 3).double()]
        loss = nnj.extend(nn.CrossEntropyLoss())
        a, b = (nnj.extend(fully_shard(m, mesh=mesh) if over else m) for m in models)
        ranks = [rank] if over else range(size)
        with nnj.collect("ggn_diag", "kfac", "batch_grad", **({} if over else {"group": False})):
            for r in ranks:
                x, y = share(r, 0)
                (loss(b(a(x.flatten(1))), y) / len(ranks)).backward()
        found.append({n: whole(p.ggn_diag) for m in (a, b) for n, p in m.named_parameters()})
    return found


def _products(rank: int, size: int) -> Any:
    nnj.jacobian(nnj.extend(sharded(WAYS["nested"])[0]), share(rank, 0)[0], "weight")


ODD: dict[str, Callable[[int, int], Any]] = {
    "refused": _refused,
    "mixed precision": _mixed_precision,
    "world": _world,
    "parts of fit": _parts_of_fit,
    "whole fit": _whole,
    "partly": _partly,
    "alone": _alone,
    "then plain": _then_plain,
    "gathered": _gathered,
    "factors": _factors,
    "no batch": _no_batch,
    "products": _products,
    "memory": _memory,
    "two models": _two_models,
}

"""What each process does in the tests of results over ranks: the same work with the group, on this
rank's share, and alone, on the shares of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import nnj
from nnj.testing import check_model
from tests.support.data_parallel import MODES, Branches, batch

W = TypeVar("W")
SHARDS = (5, 3, 2, 4)  # samples of a rank in a batch
SUMS = ("ggn_diag", "ggn_block", "kfac", "ggn_diag_empirical", "grad_variance", "ggn")
MOMENTS = ("input_moment",)
ROWS = ("batch_grad", "batch_ggn_diag", "batch_grad_sq_norm")
EVERY = (*SUMS, *MOMENTS, *ROWS, "batch_grad_dot")


class Net(nn.Module):
    """A convolution, a norm, a layer used twice, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.LayerNorm(3)
        self.twice, self.head = nn.Linear(3, 3), nn.Linear(9, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.conv(x)).mT)
        return self.head(self.twice(torch.tanh(self.twice(hidden))).flatten(1))


def net(used: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    if used:
        del model.unused
    return model


def share(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """What a rank is given in a step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(SHARDS[rank], 2, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (len(x),), generator=generator)


def plain(value: Any) -> Any:
    """A result as tensors: a matrix as a dense one."""
    return value.dense() if isinstance(value, nnj.matrices.matrix.Matrix) else value


def results(model: nn.Module, names: tuple[str, ...], context: Any = None) -> dict[str, Any]:
    """All that was collected, by quantity and place."""
    found: dict[str, Any] = {}
    for name in names:
        places = [*model.named_parameters(), *model.named_modules()]
        found |= {f"{name} {key}": plain(getattr(h, name, None)) for key, h in places}
    for name in ("ggn", "noise_terms", "noise_scale"):
        if context is not None and {"ggn": "ggn"}.get(name, "grad_variance") in names:
            found[f"{name} of the context"] = getattr(context, name)
    return {key: value for key, value in found.items() if value is not None}


@dataclass
class Way:
    """A way to train.

    Attributes:
        options: of DistributedDataParallel.
        extend: "inside" of it, or "outside".
        names: the quantities.
        group: as of collect.
        unsynced: whether the gradients of the first of two batches are not reduced.
        unused: whether the model has parameters that are not used.
    """

    options: dict[str, Any] = field(default_factory=dict)
    extend: str = "inside"
    names: tuple[str, ...] = ("ggn_diag", "batch_grad", "kfac")
    group: str = "of the wrapper"
    unsynced: bool = False
    unused: bool = False


FIND = dict(find_unused_parameters=True)
WAYS = {f"{mode}, outside": Way(options, "outside") for mode, options in MODES.items()}
WAYS |= {
    "plain, inside": Way(),
    "static_graph, inside": Way(MODES["static_graph"]),
    "every quantity": Way(names=tuple(n for n in EVERY if n != "batch_grad_dot")),
    "tiny buckets": Way(dict(bucket_cap_mb=1e-5)),
    "huge buckets": Way(dict(bucket_cap_mb=1000)),
    "no_sync": Way(unsynced=True),
    "a group": Way(group="the world"),
    "unused": Way(FIND, unused=True),
    "no wrapper": Way(group="no wrapper"),
}


def ways(size: int) -> dict[str, Way]:
    """Those that are tried with so many processes."""
    few = ("plain, outside", "every quantity", "unused", "no wrapper")
    return WAYS if size == 2 else {name: WAYS[name] for name in few}


def train(way: Way, rank: int, collecting: bool) -> dict[str, Any]:
    """Two batches in one `with`, and a step of an optimizer; twice."""
    model, loss, found = net(used=not way.unused), nn.CrossEntropyLoss(), dict[str, Any]()
    if collecting:
        nnj.extend(model)
        loss = nnj.extend(loss)
    parallel = DistributedDataParallel(model, **way.options)
    if collecting and way.extend == "outside":
        nnj.retract(model)
        nnj.extend(parallel)
    called = model if way.group == "no wrapper" else parallel
    group = None if way.group == "of the wrapper" else dist.group.WORLD
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        with nnj.collect(*way.names, group=group) if collecting else nullcontext() as context:
            for i in range(2):
                x, y = share(rank, 2 * step + i)
                silent = way.unsynced and i == 0 and called is parallel
                with parallel.no_sync() if silent else nullcontext():
                    loss(called(x), y).backward()
        if collecting and step == 0:
            found["results"] = results(model, way.names, context)
            found["samples"] = context.samples
            if "batch_grad" in way.names:
                found["rows"] = context.gather("batch_grad")
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        found[f"grad {step}"] = grads
        if called is parallel:
            optimizer.step()
    found["state"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found


def alone(way: Way, size: int) -> dict[str, Any]:
    """One process that differentiates the mean of the losses of all ranks."""
    model, loss = nnj.extend(net(used=not way.unused)), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*way.names, group=False) as context:
        for rank in range(size):
            for i in range(2):
                x, y = share(rank, i)
                (loss(model(x), y) / size).backward()
    return results(model, way.names, context)


def compared(
    ways: Mapping[str, W], train: Callable[[W, bool], Any], alone: Callable[[W], Any]
) -> dict[str, Any]:
    """Of each way what this rank has without and with nnj, and what one process has."""
    return {
        name: {"plain": train(way, False), "found": train(way, True), "alone": alone(way)}
        for name, way in ways.items()
    }


def all_ways(rank: int) -> dict[str, Any]:
    """All of them on a rank."""
    size = dist.get_world_size()
    return compared(ways(size), lambda w, on: train(w, rank, on), lambda w: alone(w, size))


# -- what else happens to ranks --------------------------------------------------------------------


def odd(rank: int) -> dict[str, Any]:
    """What ranks say, or have, where not all goes well on all of them."""
    found: dict[str, Any] = {}
    for name, run in ODD.items():
        dist.barrier()
        try:
            found[name] = run(rank, dist.get_world_size())
        except (nnj.NNJError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _pair() -> tuple[Any, Any]:
    return nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())


def _refused_first(rank: int, size: int) -> Any:
    """The first of two batches is refused on rank 1: gradients go on."""
    model, loss = _pair()
    parallel, found = DistributedDataParallel(model), {}
    try:
        with nnj.collect("ggn_diag"):
            for i in range(2):
                x, y = share(rank, i)
                value = loss(parallel(x), y)
                (value.exp() if (rank, i) == (1, 0) else value).backward()
            found["passes"] = 2
    except nnj.NNJError as error:
        found["said"] = str(error)
    found["grad"] = {n: p.grad.clone() for n, p in model.named_parameters()}
    with nnj.collect("ggn_diag"):  # training goes on
        loss(parallel(share(rank, 0)[0]), share(rank, 0)[1]).backward()
    found["later"] = model.head.weight.ggn_diag
    return found


def _left(rank: int, size: int) -> Any:
    """Rank 1 leaves by an error of its own."""
    model, loss = _pair()
    group = dist.new_group(timeout=timedelta(seconds=60))
    with nnj.collect("ggn_diag", group=group):
        x, y = share(rank, 0)
        loss(model(x), y).backward()
        if rank == 1:
            raise ValueError("of the user")


def _branches(rank: int, size: int) -> Any:
    """The loss of each rank takes another branch of the model."""
    names = ("ggn_diag", "kfac", "batch_grad", "grad_variance")

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nnj.extend(Branches().double())

    model, loss = made(), nnj.extend(nn.CrossEntropyLoss())
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    with nnj.collect(*names) as context:
        x, y = batch(rank, 0)
        loss(parallel(x)[rank], y).backward()
    found = results(model, names, context)
    rows, one = context.gather("batch_grad"), made()
    with nnj.collect(*names, group=False) as context:
        for r in range(size):
            x, y = batch(r, 0)
            (loss(one(x)[r], y) / size).backward()
    expected = results(one, names, context)
    every = {f"batch_grad {name}": t for name, t in rows.items()}
    return found | every, expected


def _no_data(rank: int, size: int) -> Any:
    """Rank 0 has no batch at all."""
    model, loss = _pair()
    with nnj.collect("ggn_diag", "kfac", "batch_grad", group=dist.group.WORLD) as context:
        if rank > 0:
            x, y = share(rank, 0)
            loss(model(x), y).backward()
    rows = context.gather("batch_grad")
    return {
        **results(model, ("ggn_diag", "kfac")),
        "rows": {name: len(t) for name, t in rows.items()},
        "samples": context.samples,
    }


def _no_rows(rank: int, size: int) -> Any:
    """The batch of rank 0 has no rows."""
    names = ("ggn_diag", "kfac", "input_moment", "batch_grad", "grad_variance")
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = share(rank, 0)
    with nnj.collect(*names, group=dist.group.WORLD) as context:
        loss(model(x[: rank * len(x)]), y[: rank * len(y)]).backward()
    found = results(model, names, context)
    one = nnj.extend(net())
    with nnj.collect(*names, group=False) as context:
        (loss(one(share(1, 0)[0]), share(1, 0)[1]) / size).backward()
    expected = results(one, names, context)
    rows = {k: t[: rank * len(t)] for k, t in expected.items() if k.startswith("batch_")}
    return found, expected | rows


def _nowhere(rank: int, size: int) -> Any:
    """No rank has a batch."""
    _pair()
    with nnj.collect("ggn_diag", group=dist.group.WORLD):
        pass


def _other_model(rank: int, size: int) -> Any:
    model, loss = _pair()
    if rank == 1:
        model.head.weight.requires_grad_(False)
    with nnj.collect("ggn_diag", group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _other_options(rank: int, size: int) -> Any:
    model, loss = _pair()
    with nnj.collect("kfac", approx=("expand", "reduce")[rank % 2], group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _other_modules(rank: int, size: int) -> Any:
    model, loss = _pair()
    part = [model.head, model.conv][rank % 2]
    with nnj.collect("ggn_diag", modules=[part], group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _hook(rank: int, size: int) -> Any:
    model, loss = _pair()
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, fp16_compress_hook)
    with nnj.collect("ggn_diag"):
        loss(parallel(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _join(rank: int, size: int, mean: bool = True) -> Any:
    """Rank r has r + 1 batches."""
    model, loss = _pair()
    parallel = DistributedDataParallel(model)
    with (
        nnj.collect("ggn_diag"),
        parallel.join(divide_by_initial_world_size=mean),
    ):
        for i in range(rank + 1):
            loss(parallel(share(rank, i)[0]), share(rank, i)[1]).backward()
    return model.head.weight.ggn_diag


def _mixed(rank: int, size: int, group: Any = None) -> Any:
    """One call goes through the wrapper, and one does not."""
    model, loss = _pair()
    parallel = DistributedDataParallel(model)
    with nnj.collect("ggn_diag", group=group):
        for called in (parallel, model):
            loss(called(share(rank, 0)[0]), share(rank, 0)[1]).backward()
    return model.head.weight.ggn_diag


def _left_out(rank: int, size: int) -> Any:
    """DDP leaves one parameter to this rank."""
    model, loss = _pair()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.bias"])
    parallel = DistributedDataParallel(model)
    with nnj.collect("ggn_diag"):
        loss(parallel(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _other_numbers(rank: int, size: int) -> Any:
    """No wrapper has made the parameters the same."""
    model, loss = _pair()
    with torch.no_grad():
        model.twice.bias += rank * 1e-6
    with nnj.collect("ggn_diag", group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _check(rank: int, size: int) -> str:
    """Under the wrapper, whose passes are over ranks."""
    x, y = share(rank, 0)
    return str(check_model(DistributedDataParallel(net()), nn.CrossEntropyLoss(), x, y))


def _compiled(rank: int, size: int) -> Any:
    """Gradients would be those of this rank."""
    nnj.compile(DistributedDataParallel(net()), nn.CrossEntropyLoss(), "ggn_diag")


def _compiled_inside(rank: int, size: int) -> Any:
    """Passes of this rank, replayed, in a `with` of all."""
    model = net()
    step = nnj.compile(model, nn.CrossEntropyLoss(), "ggn_diag", backend="aot")
    for _ in range(4):
        with nnj.collect("ggn_diag", group=dist.group.WORLD):
            step(*share(rank, 0))
    return step.replays, model.head.weight.ggn_diag


def _pipeline(rank: int, size: int) -> Any:
    """A model of two stages, which trains on."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 4), nn.Tanh()), nn.Linear(4, 3)]
    mine, loss, said = stages[rank].double(), nn.CrossEntropyLoss(), ""
    nnj.extend(mine)
    schedule = ScheduleGPipe(
        PipelineStage(mine, rank, size, torch.device("cpu")), 2, loss_fn=nnj.extend(loss)
    )
    x, y = share(0, 0)[0][:4].flatten(1), share(0, 0)[1][:4]
    try:
        with nnj.collect("ggn_diag"):
            schedule.step(x) if rank == 0 else schedule.step(target=y)
    except nnj.NNJError as error:
        said = str(error)
    nn.functional.cross_entropy(nn.Sequential(*stages).double()(x), y).backward()
    twice = [p.grad / 2 for p in mine.parameters()]  # of the pipeline, and of all of it here
    mine.zero_grad()
    nn.functional.cross_entropy(nn.Sequential(*stages)(x), y).backward()
    return said, all(
        torch.allclose(t, p.grad) for t, p in zip(twice, mine.parameters(), strict=True)
    )


def _ekfac(rank: int, size: int) -> Any:
    model, loss = _pair()
    with nnj.collect("ekfac", group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _draws(rank: int, size: int) -> Any:
    """All ranks have the same data and the same seed."""
    model, loss = _pair()
    x, y = share(0, 0)
    for group in (False, dist.group.WORLD):
        generator = torch.Generator().manual_seed(3)
        with nnj.collect("ggn_diag_mc", generator=generator, group=group):
            loss(model(x), y).backward()
        if group is False:
            one = model.head.weight.ggn_diag_mc.clone()
    return one, model.head.weight.ggn_diag_mc


class Cubes(nnj.Quantity):
    """Of no degree that anybody knows."""

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum() ** 3


def _no_degree(rank: int, size: int) -> Any:
    model, loss = _pair()
    with nnj.collect(Cubes(), group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _failing(rank: int, size: int) -> Any:
    """A stranger's quantity whose merge fails on the rank that merges."""

    class Failing(nnj.Quantity):
        degree = 1

        def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
            return factor.square_sum()

        def merge(self, one: Any, other: Any) -> Any:
            raise KeyError("of a stranger")

    model, loss = _pair()
    with nnj.collect(Failing(), group=dist.group.WORLD):
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()


def _dot(rank: int, size: int) -> Any:
    model, loss = _pair()
    with nnj.collect("batch_grad_dot", group=dist.group.WORLD) as context:
        loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()
    return context.batch_grad_dot


ODD: dict[str, Callable[[int, int], Any]] = {
    "refused first": _refused_first,
    "left": _left,
    "branches": _branches,
    "no data": _no_data,
    "no rows": _no_rows,
    "nowhere": _nowhere,
    "other model": _other_model,
    "other options": _other_options,
    "other modules": _other_modules,
    "hook": _hook,
    "join": _join,
    "join by what is left": lambda rank, size: _join(rank, size, mean=False),
    "mixed": _mixed,
    "mixed in a group": lambda rank, size: _mixed(rank, size, dist.group.WORLD),
    "left out": _left_out,
    "other numbers": _other_numbers,
    "checked": _check,
    "compiled": _compiled,
    "compiled inside": _compiled_inside,
    "pipeline": _pipeline,
    "ekfac": _ekfac,
    "draws": _draws,
    "no degree": _no_degree,
    "failing": _failing,
    "dot": _dot,
}


def of_several(rank: int) -> dict[str, Any]:
    """All of it, in one group of processes; of three less than of two."""
    found = {"ways": all_ways(rank), "fits": fits(rank)}
    return found | ({"odd": odd(rank)} if dist.get_world_size() == 2 else {})


def dying(rank: int) -> Any:
    """Rank 1 ends in the middle."""
    model, loss = _pair()
    group = dist.new_group(timeout=timedelta(seconds=5))
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=5))
    with pytest.raises(nnj.NNJError) as said:
        with nnj.collect("ggn_diag", group=group):
            loss(model(share(rank, 0)[0]), share(rank, 0)[1]).backward()
            if rank == 1:
                os._exit(7)
    return str(said.value)


def failing(rank: int) -> None:
    """Rank 1 fails, and rank 0 has what it wants."""
    if rank == 1:
        raise ZeroDivisionError("of a test")


def hanging(rank: int) -> int:
    """Rank 1 does not end."""
    return time.sleep(600) or 0 if rank == 1 else 3


# -- fit -------------------------------------------------------------------------------------------

FITTED = (*SUMS, "batch_grad", "ekfac", "input_moment")


def data() -> TensorDataset:
    """Eleven samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 2, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (11,), generator=generator))


def fitted(fit: nnj.Fit) -> dict[str, Any]:
    """All numbers of a fit."""
    found: dict[str, Any] = {}
    for name, values in fit.items():
        each = values.items() if isinstance(values, dict) else [("", values)]
        found |= {f"{name} {key}": plain(value) for key, value in each}
    facts = ("samples", "total", "terms", "loss_value", "scale", "loss", "likelihood", "trace")
    return found | {fact: getattr(fit, fact) for fact in facts}


def fits(rank: int) -> dict[str, Any]:
    """What fit gives over ranks, and alone."""
    size, found = dist.get_world_size(), dict[str, Any]()
    every = data()
    mine = Subset(every, range(rank, len(every), size))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    for scale in ("sum", "mean"):
        ask = dict(scale=scale)
        over = nnj.fit(DistributedDataParallel(net()), loss, DataLoader(mine, 2), *FITTED, **ask)
        one = nnj.fit(net(), loss, DataLoader(every, 4), *FITTED, **ask)
        found[scale] = fitted(over), fitted(one), over.rows, over.runs
    empty = DataLoader(every, 3) if rank == 0 else []
    found["empty"] = fitted(nnj.fit(net(), loss, empty, "kfac", group=dist.group.WORLD))
    found["empty alone"] = fitted(nnj.fit(net(), loss, DataLoader(every, 4), "kfac"))
    apart = nnj.fit(DistributedDataParallel(net()), loss, DataLoader(mine, 2), "kfac", group=False)
    found["apart"] = apart.samples
    found["operators"] = operators(mine, every)
    for name, run in FIT_REFUSED.items():
        try:
            run(rank, size)
            found[name] = ""
        except (nnj.NNJError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def operators(mine: Subset[Any], every: TensorDataset) -> dict[str, tuple[Any, Any]]:
    """What operators give over ranks, and alone."""
    group, loss, found = dist.group.WORLD, nn.CrossEntropyLoss(), dict[str, tuple[Any, Any]]()
    load = lambda data: list(DataLoader(data, 4))
    v = torch.linspace(-1, 1, sum(p.numel() for p in net().parameters()), dtype=torch.float64)
    for kind in (nnj.GGN, nnj.HessianOperator):
        for scale in ("sum", "mean"):
            over = kind(net(), loss, load(mine), scale=scale, group=group)
            one = kind(net(), loss, load(every), scale=scale)
            found[f"{kind.__name__}, {scale}"] = over @ v, one @ v
    wrapped = nnj.GGN(DistributedDataParallel(net()), loss, load(mine))
    found["diagonal"] = wrapped.diagonal(), nnj.GGN(net(), loss, load(every)).diagonal()
    torch.manual_seed(dist.get_rank())  # ranks are not seeded alike
    traces = wrapped.trace(samples=3)
    found["trace"] = traces, torch.stack(_all(traces)).mean()
    x = torch.stack([x for x, _ in mine])
    order = [
        i for r in range(dist.get_world_size()) for i in range(r, len(every), dist.get_world_size())
    ]
    for per_class in (False, True):
        kernel = nnj.ntk(net(), x, group=group, per_class=per_class)
        found[f"ntk {per_class}"] = kernel, nnj.ntk(net(), x, every[order][0], per_class=per_class)
    with pytest.raises(nnj.NNJError, match="rank 1 multiplies another vector than rank 0"):
        _ = wrapped @ (v * (1 + dist.get_rank()))
    return found


def _all(t: Tensor) -> list[Tensor]:
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t)
    return found


def _padded(rank: int, size: int) -> None:
    every = data()
    loader = DataLoader(every, 2, sampler=DistributedSampler(every, size, rank, shuffle=False))
    nnj.fit(net(), nn.CrossEntropyLoss(), loader, "ggn_diag", group=dist.group.WORLD)


def _other_buffers(rank: int, size: int) -> None:
    """What a rank has seen since DDP last called the model."""
    model = nn.Sequential(nn.BatchNorm1d(2), net()).double()
    parallel, norm = DistributedDataParallel(model), model[0]
    for buffer in (norm.num_batches_tracked, norm.running_mean):  # of a counter nothing is said
        with torch.no_grad():
            buffer += rank
        nnj.fit(parallel, nn.CrossEntropyLoss(), [share(rank, 0)], "ggn_diag")


def _other_weights(rank: int, size: int) -> None:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    nnj.fit(model, nn.CrossEntropyLoss(), [share(rank, 0)], "ggn_diag", group=dist.group.WORLD)


def _same_data(rank: int, size: int) -> None:
    """All ranks read everything, in orders of their own."""
    load = DataLoader(data(), 2 + rank, shuffle=True)
    nnj.fit(net(), nn.CrossEntropyLoss(), load, "ggn_diag", group=dist.group.WORLD)


def _one_fails(rank: int, size: int) -> None:
    x, y = share(rank, 0)
    batches = [(x, y), (x * torch.nan if rank == 1 else x, y), (x, y)]
    nnj.fit(net(), nn.CrossEntropyLoss(), batches, "ggn_diag", group=dist.group.WORLD)


def _one_leaves(rank: int, size: int) -> None:
    def batches() -> Iterator[Any]:
        yield share(rank, 0)
        if rank == 1:
            raise ValueError("of a loader")

    nnj.fit(net(), nn.CrossEntropyLoss(), batches(), "ggn_diag", group=dist.group.WORLD)


def _other_loss(rank: int, size: int) -> None:
    loss = [nn.CrossEntropyLoss(), nn.MultiMarginLoss()][rank % 2]
    nnj.fit(net(), loss, [share(rank, 0)], "ggn_diag", group=dist.group.WORLD)


FIT_REFUSED: dict[str, Callable[[int, int], None]] = {
    "padded": _padded,
    "other buffers": _other_buffers,
    "other weights": _other_weights,
    "same data": _same_data,
    "one fails": _one_fails,
    "one leaves": _one_leaves,
    "other loss": _other_loss,
    "nothing": lambda rank, size: (
        nnj.fit(net(), nn.CrossEntropyLoss(), [], "ggn_diag", group=dist.group.WORLD) and None
    ),
}

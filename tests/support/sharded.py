"""What each process does in the tests of models whose parameters are sharded or distributed: the
same training with and without nnj, and what nnj says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import nnj
from tests.support.data_parallel import Bare, batch

Wrap = Callable[[nn.Module, Any], nn.Module]


def _fsdp(**options: Any) -> Wrap:
    return lambda model, mesh: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), **options
    )


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def _shard_parts(model: nn.Module, mesh: Any) -> nn.Module:
    for part in model.children():
        if [*part.parameters()]:
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "bare": lambda: nn.Sequential(Bare(3)),
}
PARTS = ModuleWrapPolicy({nn.Linear, Bare})
SHARDED: dict[str, Wrap] = {
    "FSDP": _fsdp(),
    "FSDP of parts": _fsdp(auto_wrap_policy=PARTS),
    "FSDP with use_orig_params": _fsdp(use_orig_params=True),
    "FSDP of parts with use_orig_params": _fsdp(use_orig_params=True, auto_wrap_policy=PARTS),
}
TAKEN: dict[str, Wrap] = {
    "fully_shard": _shard,
    "fully_shard of parts": _shard_parts,
    "tensor parallel": _tensor_parallel,
}
DISTRIBUTED: dict[str, Wrap] = {
    "distribute_module": lambda model, mesh: distribute_module(model, mesh),
}
CASES = [
    (model, wrap, extend)
    for model in MODELS
    for wrap in (*SHARDED, *TAKEN, *DISTRIBUTED)
    for extend in ("inside", "outside")
    if (model, wrap) != ("bare", "tensor parallel")
]


def _whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else None if t is None else t.clone()


def train(way: tuple[str, str, str], rank: int, mesh: Any, collecting: bool) -> list[Any]:
    """Of each step the loss, the gradients, and what nnj says."""
    kind, wrap, extend = way
    torch.manual_seed(0)
    model, loss = MODELS[kind](), nn.CrossEntropyLoss()
    inside = collecting and extend == "inside"
    model = (SHARDED | TAKEN | DISTRIBUTED)[wrap](nnj.extend(model) if inside else model, mesh)
    if collecting:
        model, loss = model if inside else nnj.extend(model), nnj.extend(loss)
    x, y = batch(0 if wrap in (*DISTRIBUTED, "tensor parallel") else rank, 0)
    x = x.float()
    if wrap == "distribute_module":
        x, y = (distribute_tensor(t, mesh, [Replicate()]) for t in (x, y))
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        value, said = loss(model(x), y), ""
        try:
            with nnj.collect("ggn_diag") if collecting else nullcontext():
                value.backward()
        except nnj.NNJError as error:
            said = str(error)
        found.append((_whole(value.detach()), [_whole(p.grad) for p in model.parameters()], said))
        optimizer.step()
    return found


def all_ways(rank: int) -> dict[Any, tuple[Any, Any]]:
    """Of each way the steps without and with nnj."""
    mesh = init_device_mesh("cpu", (2,))
    return {way: (train(way, rank, mesh, False), train(way, rank, mesh, True)) for way in CASES}

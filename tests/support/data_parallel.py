"""What each process does in the tests of DistributedDataParallel: the same training with and
without nnj, and what was collected beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_PREFIX,
    checkpoint_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import nnj

STEPS = 3
NAMES = ("ggn_diag", "batch_grad")


class Bare(nn.Module):
    """A parameter without a layer, which the fallback describes."""

    def __init__(self, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class Several(nn.Module):
    """Outputs among what is no tensor and what needs no gradient; parameters that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"n": 3, "none": None, "x": x, "aside": self.two(x).detach(), "z": self.one(x)}


class Branches(nn.Module):
    """Of two branches a loss may take one, whose other one has a gradient on another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return self.one(hidden), self.two(hidden)


class Checkpointed(nn.Sequential):
    """The same, where torch.func cannot go."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False)
        return self[2](hidden)


def mlp(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    return kind(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()


def wrapped() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


@dataclass
class Way:
    """A way to train.

    Attributes:
        make: the model.
        twin: the same for torch.func, with the same names of parameters.
        options: of DistributedDataParallel.
        extend: "inside" of it, or "outside".
        apart: whether each part is under one of its own.
        hook: a communication hook.
        refused: steps and ranks at which the scalar is not linear in the loss.
        unsynced: steps whose gradients are not reduced.
        pick: from the output of the model to the logits, on a rank.
        products: whether a Jacobian is taken before each step.
    """

    make: Callable[[], nn.Module] = mlp
    options: dict[str, Any] = field(default_factory=dict)
    extend: str = "inside"
    twin: Callable[[], nn.Module] | None = None
    apart: bool = False
    hook: Any = None
    refused: frozenset[tuple[int, int]] = frozenset()
    unsynced: frozenset[int] = frozenset()
    pick: Callable[[Any, int], Tensor] = lambda z, rank: z
    products: bool = False


def of(way: Way, twin: bool = False) -> nn.Module:
    """The model of a way in float64, always the same."""
    torch.manual_seed(0)
    return (way.twin if twin and way.twin else way.make)().double()


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """What a rank is given in a step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


STATIC, FIND = dict(static_graph=True), dict(find_unused_parameters=True)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": STATIC,
    "find_unused_parameters": FIND,
    "gradient_as_bucket_view": dict(gradient_as_bucket_view=True),
    "static_graph, gradient_as_bucket_view": STATIC | dict(gradient_as_bucket_view=True),
}
WAYS: dict[str, Way] = {}
for mode, options in MODES.items():
    WAYS |= {
        mode: Way(options=options),
        f"{mode}, extended outside": Way(options=options, extend="outside"),
        f"{mode}, refused on rank 0": Way(options=options, refused=frozenset({(0, 0), (2, 0)})),
        f"{mode}, refused on both": Way(
            options=options, refused=frozenset({(0, 0), (0, 1), (1, 0), (1, 1)})
        ),
        f"{mode}, products": Way(options=options, products=True),
    }
for extend in ("inside", "outside"):
    extended: dict[str, Any] = dict(extend=extend)
    more = {
        "no_sync": Way(unsynced=frozenset({0, 1}), **extended),
        "no_sync, refused": Way(
            unsynced=frozenset({0, 1}), refused=frozenset({(1, 1)}), **extended
        ),
        "communication hook": Way(hook=fp16_compress_hook, **extended),
        "bare": Way(lambda: Bare(3), **extended),
        "bare, static_graph": Way(lambda: Bare(3), STATIC, **extended),
        "bare, find_unused_parameters": Way(lambda: Bare(3), FIND, **extended),
        "several outputs": Way(Several, FIND, pick=lambda z, rank: z["z"], **extended),
        "another branch on each rank": Way(
            Branches, FIND, pick=lambda z, rank: z[rank], **extended
        ),
        "checkpoint": Way(lambda: mlp(Checkpointed), twin=mlp, **extended),
        "checkpoint, static_graph": Way(lambda: mlp(Checkpointed), STATIC, twin=mlp, **extended),
        "checkpoint wrapper": Way(wrapped, twin=mlp, **extended),
        "batch norm in eval mode": Way(normalised, **extended),
    }
    WAYS |= {f"{name}, extended {extend}": way for name, way in more.items()}
WAYS |= {
    "one after the other": Way(options=FIND, extend="outside", apart=True),
    "one after the other, static_graph": Way(options=STATIC, extend="outside", apart=True),
}


def parallel_of(way: Way, model: nn.Module, collecting: bool) -> nn.Module:
    """A model under DistributedDataParallel."""
    training, inside = model.training, collecting and way.extend == "inside"
    if inside:
        nnj.extend(model)
    wrap = lambda part: (
        DistributedDataParallel(part, **way.options) if [*part.parameters()] else part
    )
    parallel = nn.Sequential(*map(wrap, model)) if way.apart else wrap(model)  # type: ignore[arg-type]
    parallel.train(training)
    if collecting and not inside:
        nnj.extend(parallel)
    if way.hook is not None:
        parallel.register_comm_hook(None, way.hook)
    return parallel


def train(way: Way, rank: int, collecting: bool) -> list[dict[str, Any]]:
    """Of each step the state before it, the gradients, and what was collected or why not."""
    model, loss = of(way), nn.CrossEntropyLoss()
    parallel = parallel_of(way, model, collecting)
    if collecting:
        loss = nnj.extend(loss)
    named = {n.replace(_CHECKPOINT_PREFIX, ""): p for n, p in model.named_parameters()}
    optimizer, steps = torch.optim.SGD(parallel.parameters(), 0.1), []
    for step in range(STEPS):
        if step - 1 not in way.unsynced:
            optimizer.zero_grad()
        x, y = batch(rank, step)
        found: dict[str, Any] = {"state": {k: t.clone() for k, t in model.state_dict().items()}}
        if way.products:
            found["jacobian"] = nnj.jacobian(parallel if collecting else model, x, "weight")
        with parallel.no_sync() if step in way.unsynced else nullcontext():
            value = loss(way.pick(parallel(x), rank), y)
            scalar = value.exp() if (step, rank) in way.refused else value * 0.5
            try:
                with nnj.collect(*NAMES, group=False) if collecting else nullcontext():
                    scalar.backward()
                for name in NAMES if collecting else ():
                    found[name] = {n: getattr(p, name) for n, p in named.items()}
            except nnj.NNJError as error:
                found["error"] = str(error)
        found["grad"] = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
        if step not in way.unsynced:
            optimizer.step()
        steps.append(found)
    return steps


def refused(rank: int) -> dict[str, str]:
    """What nnj says of what it does not take under DistributedDataParallel."""
    x, y = batch(rank, 0)
    loss = nnj.extend(nn.CrossEntropyLoss())
    apart = nnj.extend(nn.Sequential(DistributedDataParallel(mlp().double())))
    calls = {"fit": lambda: nnj.fit(apart, loss, [(x, y)], "ggn_diag")}
    mixed = nnj.extend(mlp().double())
    DistributedDataParallel(mixed, mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))

    def mixed_precision() -> None:
        with nnj.collect("ggn_diag"):
            # the parameters without the calls, which need a GPU
            loss(x @ mixed[2].weight[:, :4].T, y).backward()

    found = {}
    for name, call in (calls | {"mixed_precision": mixed_precision}).items():
        with pytest.raises(nnj.NNJError) as said:
            call()
        found[name] = str(said.value)
    return found


def all_of_it(rank: int) -> dict[str, Any]:
    """Of each way the steps without and with nnj, and what is refused."""
    ways = {name: (train(way, rank, False), train(way, rank, True)) for name, way in WAYS.items()}
    return {"ways": ways, "refused": refused(rank)}

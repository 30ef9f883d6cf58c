"""What a row of the table of models is, and the parts that rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N = 3
r = torch.randn


def classes(n: int = N, c: int = 3, *more: int) -> Tensor:
    return torch.randint(c, (n, *more))


def in_order(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """As many rows for each sample, one behind the other."""
    n = len(data[0])
    return [torch.arange(len(t)) // (len(t) // n) for t in outs]


def every(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Row r belongs to sample r modulo the number of samples
    (token-major rows, concatenated views).
    """
    n = len(data[0])
    return [torch.arange(len(t)) % n for t in outs]


def one_behind_the_other(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Each call of the loss has samples of its own."""
    found, start = [], 0
    for t in outs:
        found.append(torch.arange(start, start + len(t)))
        start += len(t)
    return found


def by_loss(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Rows of the loss are the samples."""
    return [torch.arange(len(t)) for t in outs]


def plain(m: Any, l: Any, x: Any, y: Any) -> Tensor:
    return l(m(x), y)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        make: the model.
        data: inputs and targets; the samples are in axis 0 of the first, unless `numbers` says
            otherwise.
        run: user code `run(model, loss, *data) -> scalar`; it may call both as often as it likes.
        loss: the loss, or a tuple of several, which `run` then gets as a tuple.
        twin: the same model with the same state dict, for torch.func, where it cannot take the
            model itself.
        numbers: for each output that a loss is given, in order, the number of the sample of each
            row.
        batch_axis: for nnj.extend.
        n: how many samples there are, where the last of them has no row.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Any, ...]]
    run: Callable[..., Tensor] = plain
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    twin: Callable[[], nn.Module] | None = None
    numbers: Callable[[list[Tensor], tuple[Any, ...]], list[Tensor]] = in_order
    batch_axis: int = 0
    n: int | None = None


CASES: dict[str, Case] = {}


EITHER: dict[str, Case] = {}  # to be exact, or to be refused


def case(
    name: str, make: Any, data: Any, *args: Any, table: dict[str, Case] = CASES, **kwargs: Any
) -> None:
    assert name not in CASES and name not in EITHER, name
    table[name] = Case(name, make, data, *args, **kwargs)


class Do(nn.Module):
    """A model of named parts and a forward given as a function of (self, *inputs)."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            bare = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            setattr(self, name, nn.Parameter(part) if bare else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def do(run: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Do(run, **{name: part() for name, part in parts.items()})


def distances(s: Any, x: Tensor) -> Tensor:
    return s.head(torch.exp(-torch.cdist(s.one(x), s.centres)))


def distances_by_hand(s: Any, x: Tensor) -> Tensor:
    """torch.func of cdist is wrong: vmap of its backward."""
    return s.head(torch.exp(-(s.one(x)[:, None] - s.centres).square().sum(-1).sqrt()))


def linear(i: int, o: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, **options)


def vectors() -> tuple[Any, ...]:
    return r(N, 4), classes()


def images() -> tuple[Any, ...]:
    return r(N, 2, 4, 4), classes()


def sequences() -> tuple[Any, ...]:
    return r(N, 4, 4), classes()


def tokens() -> tuple[Any, ...]:
    return torch.randint(5, (N, 4)), torch.randint(5, (N, 4))


def settled(m: nn.Module) -> nn.Module:
    """Statistics of their own for norms, in eval mode."""
    for part in m.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return m.eval()

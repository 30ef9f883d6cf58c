"""Small models with data of each likelihood, and the dense formulas of a Laplace posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

STRUCTURES = ["ggn_diag", "kfac", "ekfac", "ggn_block", "ggn"]


class Small(NamedTuple):
    """A model, a loss, and batches of unequal size."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        cut = len(self.x) // 3
        return [(self.x[:cut], self.y[:cut]), (self.x[cut:], self.y[cut:])]


def _mlp(out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out))


class Tokens(nn.Module):
    """(N, T, 3) to (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x + x.mean(1, keepdim=True)).mT
        return found


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def _classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


KINDS: dict[str, Callable[[], Small]] = {
    "classes": lambda: Small(_mlp(3), nn.CrossEntropyLoss(), torch.randn(14, 3), _classes(14)),
    "images": lambda: Small(_cnn(), nn.CrossEntropyLoss(), torch.randn(8, 1, 6, 6), _classes(8)),
    "tokens": lambda: Small(Tokens(), nn.CrossEntropyLoss(), torch.randn(7, 4, 3), _classes(7, 4)),
    "binary": lambda: Small(
        _mlp(1), nn.BCEWithLogitsLoss(), torch.randn(14, 3), torch.rand(14, 1).round()
    ),
    "regression": lambda: Small(_mlp(1), nn.MSELoss(), torch.randn(14, 3), torch.randn(14, 1)),
    "several outputs": lambda: Small(_mlp(2), nn.MSELoss(), torch.randn(9, 3), torch.randn(9, 2)),
}


def small(kind: str) -> Small:
    torch.manual_seed(0)
    made = KINDS[kind]()
    y = made.y.double() if made.y.is_floating_point() else made.y
    return Small(made.model.double(), made.loss, made.x.double(), y)


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(N, C, P) by torch.func, in eval mode."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(given: dict[str, Tensor], row: Tensor) -> Tensor:
        found: Any = functional_call(model, given, (row[None],))
        return found[0].flatten()

    by_name = vmap(jacrev(one), (None, 0))(params, x)
    return torch.cat([t.flatten(2) for t in by_name.values()], -1)


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])

"""What the tests of nnj.fit share: a model and a data set, its batches, and dense derivatives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.support.oracle import close

N, C = 7, 3
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=G).double()
IMAGE = torch.randn(N, 1, 3, 3, generator=G).double()
CLASSES = torch.randint(C, (N,), generator=G)
# at batch size 1 and 3 whole batches are ignored, or almost
HOLES = CLASSES.clone().index_fill(0, torch.tensor([0, 3, 4]), -100)
PLACES = torch.randint(C, (N, 3, 3), generator=G).masked_fill(
    torch.rand(N, 3, 3, generator=G) < 0.3, 2
)
REAL = torch.randn(N, C, generator=G).double()
SHARES = REAL.softmax(1)
BITS = (REAL > 0).double()
W = torch.tensor([0.3, 1.7, 0.9]).double()


def mlp(*more: nn.Module) -> nn.Module:
    """A network with dropout, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, C), *more
    ).double()


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """A data set in batches of `size`."""
    return list(zip(x.split(size), y.split(size), strict=True))


def dense(
    model: nn.Module, loss: Any, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """diag(J^T H J), J^T H J for each module, and the gradient, of all data, by torch.func."""
    model = copy.deepcopy(model).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    f = functional_call(model, params, (x,)).detach()
    # their curvature is that of cross entropy
    logarithms = isinstance(loss, (nn.NLLLoss, nn.KLDivLoss))
    scalar = lambda t: loss(
        t.reshape(f.shape).log_softmax(1) if logarithms else t.reshape(f.shape), y
    )
    h = jacrev(jacrev(scalar))(f.flatten())
    j = {
        name: t.detach().reshape(f.numel(), -1)
        for name, t in jacrev(lambda p: functional_call(model, p, (x,)))(params).items()
    }
    diag = {name: ((h @ t) * t).sum(0).reshape(params[name].shape) for name, t in j.items()}
    block = {}
    for path, m in model.named_modules():
        own = [j[f"{path}.{name}"] for name, _ in m.named_parameters(recurse=False)]
        if own:
            block[path] = torch.cat(own, 1).T @ h @ torch.cat(own, 1)
    slope = jacrev(scalar)(f.flatten())
    return diag, block, {name: (slope @ t).reshape(params[name].shape) for name, t in j.items()}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, with the same values."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert close(found[name], value) == "", name


LOADER = batches(X, CLASSES, 3)


def expected(scale: str = "sum") -> dict[str, Tensor]:
    """ggn_diag of `mlp` under cross entropy, on X and CLASSES."""
    return dense(mlp(), nn.CrossEntropyLoss(reduction=scale), X, CLASSES)[0]

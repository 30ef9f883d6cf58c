"""What the tests of losses share: outputs, targets and losses to be made."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def z(*shape):
    return lambda: torch.randn(shape, dtype=torch.float64)


def y(classes, *shape):
    return lambda: torch.randint(classes, shape)


def soft(*shape):
    return lambda: torch.rand(*shape, dtype=torch.float64)


def ignoring(index, classes, *shape):
    """Classes, of which about a third are ignored."""
    return lambda: torch.where(torch.rand(shape) < 0.35, index, torch.randint(classes, shape))


def ce(classes=4, weighted=False, **options):
    weight = torch.linspace(0.2, 2.0, classes) if weighted else None
    return lambda: nn.CrossEntropyLoss(weight=weight, **options)


CE = nn.CrossEntropyLoss


def made(table):
    """Rows of a table for pytest, by name."""
    return [pytest.param(*[case[0], case[1:]], id=name) for name, case in table.items()]


class LogCosh(nn.Module):
    """A loss of a user, which has no reduction."""

    def forward(self, y, target):
        return (y - target).cosh().log().sum()


class Quadratic(nn.Module):
    """x^T A x for each row, with A not diagonal and of rank 2."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 5))

    def forward(self, y):
        return (y @ self.a.mT).square().sum()


def reduced(loss, rows):
    return {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[loss.reduction]


def multi_margin(loss, z, t):
    z, t = torch.atleast_2d(z), t.reshape(-1)
    hinge = (loss.margin - z.gather(1, t[:, None]) + z).relu() ** loss.p * (
        torch.arange(z.shape[1]) != t[:, None]
    )
    rows = hinge.sum(1) / z.shape[1] * (1.0 if loss.weight is None else loss.weight[t])
    return reduced(loss, rows)


def multi_label_margin(loss, z, t):
    rows = []
    for own, labels in zip(z, t, strict=True):
        there = [int(c) for c in labels[: (labels < 0).nonzero()[0, 0]]]
        others = [c for c in range(len(own)) if c not in there]
        rows.append((1 - own[there][:, None] + own[others]).relu().sum() / len(own))
    return reduced(loss, torch.stack(rows))

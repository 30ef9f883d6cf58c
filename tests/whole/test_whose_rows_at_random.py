"""Random models, random glue between output and loss, random losses: each quantity is that of the
samples of the output, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nnj
from tests.support.cases import do
from tests.support.slow import few
from tests.support.whose_rows import (
    BARE,
    EACH,
    MIXED,
    Model,
    Run,
    entropy,
    entropy_in_the_last_axis,
    frozen_first,
    r,
    squares,
)

SEEDS = 40
Glue = Callable[[Tensor], Tensor]


def vectors(d: random.Random) -> Model:
    make = d.choice([EACH, frozen_first(EACH), BARE, do(lambda s, x: s.net(x + 1), net=EACH)])
    n = d.choice([2, 3, 4, 5])
    return Model(make, lambda: r(n, 4))


def sequences(d: random.Random) -> Model:
    make = d.choice([EACH, frozen_first(EACH), BARE, MIXED, frozen_first(MIXED)])
    axis = d.choice([0, 1]) if make in (EACH, BARE) else 0
    n, t = d.choice([(3, 3), (2, 3), (3, 2), (2, 4)])
    if axis:
        return Model(make, lambda: r(t, n, 4), 1, 1)
    arranged, at = d.choice(
        [(lambda z: z, 0), (lambda z: z, 0), (lambda z: z[None], 1), (lambda z: z.unsqueeze(2), 0)]
    )
    return Model(do(lambda s, x: arranged(s.net(x)), net=make), lambda: r(n, t, 4), at)


def glue(d: random.Random, z: Tensor) -> Glue:
    """One step; classes are in the last axis."""
    rows = len(z)
    pick = [d.randrange(rows) for _ in range(d.choice([rows, rows, 2 * rows, 1]))]
    order = list(range(rows))
    d.shuffle(order)
    mask = torch.tensor([d.random() < 0.6 for _ in range(rows)])
    mask[d.randrange(rows)] = True
    steps: list[Glue] = [
        lambda z: z[pick],
        lambda z: z[order],
        lambda z: z[mask],
        lambda z: z.flip(0),
        lambda z: torch.cat([z, z.flip(0)]),
        lambda z: torch.stack([z, 2 * z]).flatten(0, 1),
        lambda z: torch.cat(z.split(1)[::-1]),
        lambda z: z.repeat(2, *[1] * (z.dim() - 1)),
        lambda z: torch.tanh(z) + 0.1 * z,
        lambda z: z.log_softmax(-1),
        lambda z: z * torch.arange(1, 1 + len(z)).reshape(-1, *[1] * (z.dim() - 1)),
        lambda z: z.roll(1, 0),
        lambda z: z.unsqueeze(0).transpose(0, 1).reshape(z.shape),
    ]
    if z.dim() > 2:
        steps += 2 * [
            lambda z: z.flatten(0, -2),
            lambda z: z.transpose(0, 1),
            lambda z: z.transpose(0, 1).flatten(0, 1),
            lambda z: z.mean(-2),
            lambda z: z[:, -1],
            lambda z: z[-1],
            lambda z: z[:, torch.arange(z.shape[1]).flip(0)],
            lambda z: z.flip(0, 1).reshape(-1, *z.shape[2:]),
        ]
    return d.choice(steps)


def made(seed: int) -> tuple[Model, Run]:
    d = random.Random(seed)
    model = d.choice([vectors, sequences])(d)
    z, steps = model.dense[0], []
    for _ in range(d.randrange(4)):
        if z.dim() > 1:
            steps.append(glue(d, z))
            z = steps[-1](z)

    def through(z: Tensor) -> Tensor:
        for step in steps:
            z = step(z)
        return z

    losses: list[Any] = [squares, entropy_in_the_last_axis] if z.dim() > 1 else [squares]
    if z.dim() == 2:
        losses.append(entropy)
    loss = d.choice(losses)
    return model, lambda m, x, ext: loss(through(m(x)), ext)


@pytest.mark.parametrize("seed", few(range(SEEDS)))
def test_right_or_refused(seed):
    model, run = made(seed)
    check(model, run)


def check(model: Model, run: Run) -> tuple[bool, bool]:
    """What was refused: sums over samples, and shares of each."""
    refused = []
    for quantities in (("ggn_diag", "ggn_block"), ("batch_grad",)):
        try:
            assert model.wrong(run, *quantities) == []
            refused.append(False)
        except nnj.NNJError as error:
            assert "sweep failed" not in str(error), error
            refused.append(True)
    return refused[0], refused[1]


def test_little_is_refused():
    refused = [check(*made(seed)) for seed in range(1000, 1030)]
    assert sum(sums for sums, _ in refused) <= 3 and sum(shares for _, shares in refused) <= 6

"""Samples that two ranks have read: found in any order, and not where sums alone agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nnj
from nnj.collecting.same_data import Seen, Sums, check_apart

X = torch.randint(2, (8, 5), generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def seen(order: list[int], batch: int, axis: int = 0, x: Tensor = X) -> Sums:
    found = Seen()
    for rows in torch.tensor(order).long().split(batch):
        taken = x[rows].movedim(0, axis)
        found.add({"ids": taken, "more": [3, None]}, Y[rows], len(rows), axis)
    return found.sums()


@pytest.mark.parametrize("axis", [0, 1])
def test_the_same_samples_in_another_order(axis):
    with pytest.raises(nnj.NNJError, match="ranks 1 and 2 have read the same 8 samples"):
        check_apart(
            [
                seen([0, 1], 2, axis),
                seen([*range(8)], 3, axis),
                seen([7, 1, 0, 2, 6, 4, 5, 3], 2, axis),
            ]
        )


def test_others_are_taken():
    flipped = X.clone()
    flipped[3], flipped[4] = X[4], X[3]  # the same inputs, with other targets
    every = [seen([*range(8)], 4), seen([*range(8)], 4, x=flipped), seen([*range(7)], 4)]
    check_apart([*every, seen([], 1), seen([], 1)])
    check_apart([seen([2, 2], 1), seen([2, 2], 1)])  # one sample, which a data set may have often
    check_apart([seen([1, 2, 3], 1, x=X.new_zeros(8, 5)), seen([1, 5, 3], 1, x=X)])

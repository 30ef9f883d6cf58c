"""The factor at a table is made without asking how many of its rows are read."""

from __future__ import annotations

import pytest
import torch

from nnj.jacobians.row_sparse import RowSparse
from tests.support.questions import Questions

K, WIDTH = 3, 2
# samples, rows of the table, places
SIZES = [(4, 50, 30), (4, 3, 30), (1, 5, 5), (2, 40, 1), (3, 7, 0), (1, 2, 1), (5, 6, 29)]


def made(n: int, rows: int, places: int) -> tuple[RowSparse, torch.Tensor]:
    """A factor some of whose places are nobody's, and the same dense."""
    torch.manual_seed(n * rows + places)
    v = torch.randn(K, places, WIDTH, dtype=torch.float64)
    sample, row = torch.randint(-1, n, (places,)), torch.randint(0, rows, (places,))
    expected = v.new_zeros(K, n, rows, WIDTH)
    for i in range(places):
        if sample[i] >= 0:
            expected[:, sample[i], row[i]] += v[:, i]
    questions = Questions()
    with questions:
        found = RowSparse.build(v, sample, row, n, (rows, WIDTH))
    assert not questions.asked
    return found, expected


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_what_its_places_add_up_to(size: tuple[int, int, int]) -> None:
    found, expected = made(*size)
    assert torch.allclose(found.dense(), expected)
    assert torch.allclose(found.square_sum(), expected.square().sum((0, 1)))
    assert torch.allclose(found.square_sum(per_sample=True), expected.square().sum(0))
    assert torch.allclose(found.merge([found, found]).dense(), 2 * expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pair_occurs_once(size: tuple[int, int, int]) -> None:
    found, _ = made(*size)
    pairs = list(zip(found.sample.tolist(), found.row.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= s < size[0] and 0 <= r < size[1] for s, r in pairs)

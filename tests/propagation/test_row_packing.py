"""Where columns of rows stand among those of their samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnj.propagation.row_packing import RowPacking, in_parts

SAMPLE = torch.tensor([0, 2, 1, 0, 3, 1, 0, 1])  # of three samples; row 4 is nobody's
COUNTS = torch.tensor([3, 0, 1, 2, 2, 3, 1, 0])


def alone(v: Tensor, counts: Tensor | None, start: int) -> Tensor:
    """Of each sample, its columns with one row alone, that are not left out."""
    found = []
    for n in range(3):
        for row in (SAMPLE == n).nonzero()[:, 0]:
            for k in range(len(v)):
                if counts is None or start + k < counts[row]:
                    found.append((n, torch.zeros(8).index_fill(0, row, float(v[k, row]))))
    return torch.stack([torch.cat([torch.tensor([float(n)]), c]) for n, c in found])


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 1), (1, 3)])
def test_each_column_of_a_row_stands_in_one_of_its_sample(counts, start, stop):
    packing = RowPacking(SAMPLE, 3, counts)
    (size,) = packing.sizes([(start, stop)])
    v = torch.arange(1.0, 1 + 8 * (stop - start)).reshape(stop - start, 8)
    packed = packing.table(start, stop, size)
    whole = packing.spread(v, torch.arange(8), packed)
    parts = [packing.spread(v, torch.arange(8), part) for part in in_parts(packed, 2)]
    assert torch.equal(torch.cat(parts), whole) and len(whole) == size
    found = []
    for n in range(3):
        mine = whole * (SAMPLE == n)
        assert (mine != 0).sum(1).max() <= 1  # of each sample one row at a time
        for c in mine[(mine != 0).any(1)]:
            found.append(torch.cat([torch.tensor([float(n)]), c]))
    expected = alone(v, counts, start)
    assert sorted(map(tuple, torch.stack(found).tolist())) == sorted(map(tuple, expected.tolist()))
    assert not whole[:, 4].any()
    if counts is not None:
        per_sample = (counts - start).clamp(0, stop - start)
        assert size == max(int(per_sample[SAMPLE == n].sum()) for n in range(3))


def test_where_nobody_has_a_row_there_is_one_column_of_zeros():
    packing = RowPacking(torch.full((4,), 3), 3)
    assert packing.sizes([(0, 2)]) == [2]
    assert not packing.spread(torch.ones(2, 4), torch.arange(4), packing.table(0, 2, 2)).any()

"""Blocks that do not fit side by side."""

from __future__ import annotations

import pytest
import torch

from nnj import NNJError
from nnj.jacobians.views import View
from nnj.matrices import BlockDiagonal, Diagonal, Kronecker, Part, Seen


def diagonal(**shapes: tuple[int, ...]) -> Diagonal:
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Diagonal(shapes, torch.ones(size))


def test_blocks_that_overlap_or_are_elsewhere() -> None:
    shapes = {"a": (4, 2), "b": (2,)}
    rows = [View.rows((4, 2), *ends) for ends in ((0, 3), (2, 4))]
    seen = [
        Part(diagonal(x=view.inner), {"x": Seen("a", view)})
        for view in rows  # type: ignore[arg-type]
    ]
    for parts in (seen, [diagonal(a=(4, 2)), seen[0]], [diagonal(b=(2,)), diagonal(b=(2,))]):
        with pytest.raises(NNJError, match="two blocks of a matrix have rows of"):
            BlockDiagonal(shapes, parts)
    for wrong in (diagonal(c=(2,)), diagonal(b=(2, 1)), Part(diagonal(x=(2, 2)), seen[0].seen)):
        with pytest.raises(NNJError, match="is none of"):
            BlockDiagonal(shapes, [wrong])


def test_sums_are_block_by_block() -> None:
    eye = torch.eye(4).expand(1, 4, 4)
    shapes = {"w": (4, 4), "x": (4,)}
    m = BlockDiagonal(shapes, [Kronecker({"w": (4, 4)}, eye, eye)])
    m.block_limit = 4  # of a block, none of which is formed
    total = m + m
    assert isinstance(total, BlockDiagonal) and type(total.parts[0].matrix) is Kronecker
    assert total.block_limit == 4
    assert torch.equal(total.diagonal(), torch.tensor([2.0] * 16 + [0.0] * 4))

"""Whose the blocks of a loss's Hessian are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import nnj
from nnj.collecting.coupling import samples_of
from nnj.errors import Coupled
from nnj.jacobians.sample_index import SampleAxis, SampleIndex

CPU = torch.device("cpu")


def asked(hessian, n, *indices):
    edges = [(object(), i) for i in range(len(indices))]
    planned = SimpleNamespace(
        sweep=SimpleNamespace(n=n), roots=dict(zip(edges, indices, strict=True))
    )
    sample, group = samples_of(hessian, edges, planned)
    return (*(None if t is None else t.tolist() for t in (sample, group)),)


def along(n, shape, axis, run=1):
    return SampleIndex.by_axis(n, shape, SampleAxis(axis, run), CPU)


def test_rows_and_places():
    diagonal = nnj.DiagonalHessian(torch.ones(4, 3))
    assert asked(diagonal, 4, SampleIndex(4)) == (None, None)
    assert asked(diagonal, 2, SampleIndex(2)) == ([0, 0, 1, 1], None)
    assert asked(diagonal, 2, along(2, (4, 3), 0)) == ([0, 1, 0, 1], None)
    assert asked(diagonal, 3, along(3, (4, 3), 1)) == ([[0, 1, 2]] * 4, None)
    softmax = nnj.SoftmaxHessian(torch.zeros(4, 2, 3))  # classes in axis 1
    assert asked(softmax, 3, along(3, (4, 2, 3), 2)) == ([[0, 1, 2]] * 4, None)
    softmax = nnj.SoftmaxHessian(torch.zeros(4, 3, 2), axis=2)
    assert asked(softmax, 3, along(3, (4, 3, 2), 1)) == ([[0, 1, 2]] * 4, None)


def test_samples_that_blocks_connect():
    of = torch.tensor([0, 1, 3])[:, None]
    two = nnj.BlockHessian(torch.eye(4).expand(3, 1, 4, 4), [(3, 2), (3, 2)])
    found = asked(two, 4, SampleIndex(4, of), SampleIndex(4, torch.tensor([2, 1, 3])[:, None]))
    assert found == (None, [0, 1, 0, 2])
    found = asked(two, 4, SampleIndex(4, of), SampleIndex(4, of))
    assert found == ([0, 1, 3], None)
    with pytest.raises(Coupled, match="the loss couples samples.*transpose"):
        asked(nnj.SoftmaxHessian(torch.zeros(4, 3)), 3, along(3, (4, 3), 1))
    one = nnj.SoftmaxHessian(torch.zeros(1, 3))
    assert asked(one, 3, along(3, (1, 3), 1)) == (None, [0, 0, 0])

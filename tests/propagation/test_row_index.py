"""The row of each entry of an operand, against the node itself, which is asked where numbers go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnj.propagation.row_index import arranged, behind, leading, reshaped

N, T, C = 2, 3, 4


@pytest.mark.parametrize(
    "arrange",
    [
        lambda z: z.transpose(1, 2),
        lambda z: z.permute(2, 0, 1),
        lambda z: z.reshape(N * T, C),
        lambda z: z.unsqueeze(1),
        lambda z: z[:, :-1],
        lambda z: z[:, 1:],
        lambda z: z[:, ::2],
        lambda z: z[:, -2:-1],
        lambda z: z[:, 1],
        lambda z: z[:, -1],
        lambda z: z[1],
        lambda z: z.transpose(0, 1).clone(),
    ],
)
def test_arranged(arrange: Callable[[Tensor], Tensor]) -> None:
    z = torch.zeros(N, T, C, requires_grad=True)
    out = arrange(z)
    number = torch.arange(1, out.numel() + 1).reshape(out.shape)
    (there,) = torch.autograd.grad(out, z, number.to(out), retain_graph=True)
    node, of = out.grad_fn, number - 1
    while True:  # one node after another, as a slice of all axes is several
        below = node.next_functions[0][0]
        last = type(below).__name__ == "AccumulateGrad"
        into = tuple(z.shape) if last else tuple(below._input_metadata[0].shape)
        of = arranged(node, of, tuple(of.shape), into)
        assert of is not None
        if last:
            break
        node = below
    assert torch.equal(of.expand(z.shape), there.long() - 1)


@pytest.mark.parametrize(
    ("out", "into", "of", "expected"),
    [
        ((N * T, C), (N, T, C), (N * T, 1), (N, T, 1)),
        ((N, T, C), (N * T, C), (N, T, 1), (N * T, 1)),
        ((N, C, T, 5), (N, C, T * 5), (N, 1, T, 5), (N, 1, T * 5)),
        ((N, T, 1, C), (N, T, C), (N, T, 1, 1), (N, T, 1)),
        ((1, N, T, C), (N, T, C), (1, N, T, 1), (N, T, 1)),
        ((N, T, C), (N, T * C), (N, T, 1), (N, T * C)),
        ((1, 1), (1,), (1, 1), (1,)),
    ],
)
def test_reshaped(out, into, of, expected):
    """As small as what it says, and the same as of a whole tensor."""
    index = torch.arange(torch.Size(of).numel()).reshape(of)
    found = reshaped(index, out, into)
    assert tuple(found.shape) == expected
    assert torch.equal(found.expand(into), index.expand(out).reshape(into))


def test_what_works_along_rows_does_not_tell():
    z = torch.rand(N, T, C, requires_grad=True)
    rows, each = torch.arange(N * T).reshape(N, T, 1), torch.arange(N).reshape(N, 1, 1)
    over_tokens, over_classes = z.softmax(1).grad_fn, z.softmax(2).grad_fn
    shape = (N, T, C)
    assert behind(over_tokens, 0, rows, shape, shape) is None
    assert torch.equal(behind(over_tokens, 0, each, shape, shape), each)
    assert torch.equal(behind(over_classes, 0, rows, shape, shape), rows)
    summed = z.sum(1).grad_fn
    assert behind(summed, 0, rows[:, 0], (N, C), shape).shape == (N, 1, 1)
    product = (z * torch.rand(C, requires_grad=True)).grad_fn
    assert behind(product, 1, rows, shape, (C,)) is None


def test_leading():
    assert leading(torch.zeros(2, 3, 1)) == 2 and leading(torch.zeros(1, 1)) == 1

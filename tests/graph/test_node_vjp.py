"""What nodes send to their operands, where nnj knows it without asking them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnj.graph import node_vjp
from nnj.graph.node_vjp import call_node, known_of_some

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "two": lambda a, b: a + b,
    "one of them twice": lambda a, b: b + b,
    "one is broadcast": lambda a, b: b + a[0],
    "scaled": lambda a, b: torch.add(a, b, alpha=3),
    "a constant first": lambda a, b: torch.ones(2, 3) + b,
    "a number": lambda a, b: b + 2,
    "in place": lambda a, b: (1.0 * a).add_(b, alpha=2),
    "wider": lambda a, b: a.float() + b.double(),
    "complex": lambda a, b: a + 1j * b,
}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("form", SUMS.values(), ids=SUMS)
def test_an_addition(monkeypatch, form, k):
    a, b = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    y = form(a, b)
    assert y.grad_fn.name() == "AddBackward0"
    g = torch.randn(k, *y.shape, dtype=y.dtype)
    found = call_node(y.grad_fn, [g], k)
    monkeypatch.setattr(node_vjp, "_add_backward", lambda *_: None)
    expected = call_node(y.grad_fn, [g], k)
    assert len(found) == len(expected) == len(y.grad_fn.next_functions)
    for mine, true in zip(found, expected, strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine, true)


# -- what a node makes of columns of some samples is what it makes of all, at these ---------------

SOME_K, SOME_N = 3, 5
OF = torch.tensor([0, 3, 4])
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: z + z.sin(),
    "scaled sum": lambda z: torch.add(z, z.sin(), alpha=-2.5),
    "difference in place": lambda z: z.clone().add_(z.sin(), alpha=3),
    "view": lambda z: z.view(SOME_N, 2, 36),
    "flat": lambda z: z.flatten(1),
    "one more axis": lambda z: z.unsqueeze(2),
    "relu": lambda z: F.relu(z),
    "relu in place": lambda z: F.relu_(z.clone()),
    "pooling": lambda z: F.max_pool2d(z, 2),
    "pooling with holes": lambda z: F.max_pool2d(z, 3, 1, padding=1, dilation=2, ceil_mode=True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_columns_of_some_samples(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(SOME_N, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    out = KNOWN[name](z)
    node, ends = out.grad_fn, [(SOME_N, 2, 6, 6)] * 2
    part = torch.randn(SOME_K, len(OF), *out.shape[1:], dtype=torch.float64)
    whole = part.new_zeros(SOME_K, *out.shape).index_copy_(1, OF, part)
    ends = ends[: len(node.next_functions)]
    mine = known_of_some(node, part, OF, ends)
    assert mine is not None
    for one, other in zip(mine, call_node(node, [whole], SOME_K), strict=True):
        torch.testing.assert_close(one, other[:, OF])


@pytest.mark.parametrize(
    "make",
    [
        lambda z: z + torch.randn(1, 1, 6, 6, requires_grad=True),  # a broadcast operand
        lambda z: F.gelu(z),
        lambda z: z * z,
        lambda z: F.max_pool2d(z[0], 2),  # without samples
    ],
)
def test_others_are_given_zeros_for_all_samples(make: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(SOME_N, 2, 6, 6, requires_grad=True)
    out = make(z)
    ends = [tuple(z.shape), (1, 1, 6, 6)][: len(out.grad_fn.next_functions)]
    g = torch.randn(SOME_K, len(OF), *out.shape[1:])
    assert known_of_some(out.grad_fn, g, OF, ends) is None

"""What nodes send to their operands, where nnj knows it without asking them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnj.graph import node_vjp
from nnj.graph.node_vjp import call_node

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

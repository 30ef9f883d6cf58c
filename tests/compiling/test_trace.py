"""A graph of everything that autograd does, whose results are tensors of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnj.compiling import trace as tracing
from nnj.compiling.program import Untraceable
from nnj.compiling.trace import trace

X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


def test_forward_and_backward_at_other_weights():
    m = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    ps = list(m.parameters())

    def gradients(x):
        return torch.autograd.grad(m(x).square().sum(), ps)

    found = trace(lambda: gradients(X), [*ps, X])
    with torch.no_grad():
        for p in ps:
            p.add_(0.3)
        replayed = found.graph(*ps, X + 1)
    for one, other in zip(replayed, gradients(X + 1), strict=True):
        assert torch.equal(one, other)
    assert (
        found.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default) == []
    )


def test_results_share_no_memory():
    c = torch.ones(2)

    def function():
        y = X * 2
        return [y, y, y[0], X, X[0], c, y.T]

    found = trace(function, [X])
    for results in (found.results, found.graph(X)):
        places = [t.untyped_storage().data_ptr() for t in results]
        assert len(set(places)) == len(places)
        assert not {X.untyped_storage().data_ptr(), c.untyped_storage().data_ptr()} & set(places)
    for one, other in zip(found.graph(X + 1), [(X + 1) * 2] * 2, strict=False):
        assert torch.equal(one, other)


def test_what_nobody_reads_is_left_out():
    def function():
        _ = [X.exp() for _ in range(5)]
        return [X + 1]

    names = [n.name for n in trace(function, [X]).graph.graph.nodes if n.op == "call_function"]
    assert len(names) == 1


def test_a_pass_too_large(monkeypatch):
    monkeypatch.setattr(tracing, "LARGEST", 3)
    with pytest.raises(Untraceable, match="operators"):
        trace(lambda: [X + 1 + 1 + 1 + 1], [X])


def test_errors_of_the_function_are_its_own():
    def function():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace(function, [X])

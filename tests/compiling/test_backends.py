"""What runs a graph."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nnj.compiling.backends import check_backend, compiled
from nnj.errors import NNJError

X = torch.tensor([1.0, -2.0, 3.0])
GRAPH = make_fx(lambda x: [x.exp() * 2, x.sum()])(X)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler on a CPU",
)


@pytest.mark.parametrize("backend", ["aot", pytest.param("inductor", marks=needs_compiler)])
@torch.no_grad()
def test_a_backend_gives_what_the_graph_gives(backend):
    run = compiled(GRAPH, [X], 0, backend)
    for x in (X, X + 1):
        for one, other in zip(run(x), [x.exp() * 2, x.sum()], strict=True):
            torch.testing.assert_close(one, other)


@torch.no_grad()
def test_where_inductor_fails_operators_are_replayed_after_a_warning(monkeypatch):
    import torch._inductor.compile_fx as inductor

    def broken(*args):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(inductor, "compile_fx", broken)
    with pytest.warns(UserWarning, match="RuntimeError: no compiler"):
        run = compiled(GRAPH, [X], 0, "inductor")
    assert torch.equal(run(X)[1], X.sum())


def test_cuda_graphs_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NNJError, match="torch sees none"):
        check_backend("cudagraphs")


def test_cuda_graphs_of_what_is_on_a_cpu():
    with pytest.raises(NNJError, match="is on another device"):
        compiled(GRAPH, [X], 0, "cudagraphs")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
def test_cuda_graphs():
    x = X.cuda()
    weight = torch.ones(3, device="cuda")
    graph = make_fx(lambda w, x: [w * x, x.sum()])(weight, x)
    run = compiled(graph, [weight, x], 1, "cudagraphs")
    first = run(weight, x)
    weight.add_(1)
    second = run(weight, x + 1)
    assert torch.equal(first[0], x) and torch.equal(second[0], 2 * (x + 1))
    other = torch.full((3,), 5.0, device="cuda")
    assert torch.equal(run(other, x)[0], 5 * x)

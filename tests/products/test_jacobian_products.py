"""Every product of each model of the table against dense float64 Jacobians, with each flag and
metrics that are not symmetric.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.products import MODELS, SLOTS, N, bare, block_index, case, metrics, r, same

on_models = pytest.mark.parametrize("name", MODELS)
on_slots = pytest.mark.parametrize("wrt", SLOTS)


@on_models
@on_slots
def test_vectors_and_matrices(name, wrt):
    model, x, j = case(name, wrt)
    _, out, d = j.shape
    same(nnj.jacobian(model, x, wrt), j)
    u, v, many, rows = r(N, out), r(N, d), r(N, d, 4), r(N, 4, out)
    same(nnj.vjp(model, x, u, wrt), torch.einsum("no,noi->ni", u, j))
    same(nnj.vjp(model, x, u.reshape(model(x).shape), wrt), torch.einsum("no,noi->ni", u, j))
    same(nnj.jvp(model, x, v, wrt), torch.einsum("noi,ni->no", j, v))
    if wrt == "weight":
        same(nnj.jvp(model, x, v[0], wrt), j @ v[0])
        same(nnj.jvp(model, x, v, "weights"), nnj.jvp(model, x, v, wrt))
    else:
        same(nnj.jvp(model, x, v.reshape(x.shape)), torch.einsum("noi,ni->no", j, v))
    same(nnj.jmp(model, x, many, wrt), j @ many)
    same(nnj.jmp(model, x, many[0], wrt), j @ many[0])
    same(nnj.mjp(model, x, rows, wrt), rows @ j)
    same(nnj.mjp(model, x, rows[0], wrt), rows[0] @ j)
    same(nnj.jmp(model, x, None, wrt), j)
    same(nnj.mjp(model, x, None, wrt), j)
    same(nnj.jmp(model, x, many[..., :0], wrt), j @ many[..., :0])
    same(nnj.mjp(model, x, rows[:, :0], wrt), rows[:, :0] @ j)


@on_models
@on_slots
def test_metric_on_the_output(name, wrt):
    model, x, j = case(name, wrt)
    for given, m in metrics(j.shape[1]):
        full = j.mT @ m @ j
        same(nnj.jTmjp(model, x, wrt=wrt, to_diag=True, **given), full.diagonal(dim1=1, dim2=2))
        if wrt == "weight":
            same(nnj.jTmjp(model, x, wrt=wrt, joint=True, **given), full)
            full = bare([full[:, i][:, :, i] for i in block_index(model)])
        same(nnj.jTmjp(model, x, wrt=wrt, **given), full)


@on_models
@on_slots
def test_metric_on_input_or_weights(name, wrt):
    model, x, j = case(name, wrt)
    given = metrics(j.shape[2])
    if wrt == "weight":
        for shape in ((N,), ()):
            blocks, whole = [], r(N, j.shape[2], j.shape[2]) * 0
            for i in block_index(model):
                blocks.append(r(*shape, len(i), len(i)))
                whole[:, torch.tensor(i)[:, None], i] = blocks[-1]
            given.append(({"matrix": blocks}, whole))
    for options, m in given:
        full = j @ m @ j.mT
        same(nnj.jmjTp(model, x, wrt=wrt, **options), full)
        same(nnj.jmjTp(model, x, wrt=wrt, to_diag=True, **options), full.diagonal(dim1=1, dim2=2))


@on_models
@on_slots
def test_pair(name, wrt):
    model, x1, one = case(name, wrt)
    _, x2, two = case(name, wrt, 1)
    pairs = ((one, one), (one, two), (two, two))
    given = [metrics(one.shape[1]) for _ in pairs]
    for options in zip(*given, strict=True):
        flags = {key: value for key, value in options[0][0].items() if key != "matrix"}
        matrices = tuple(o["matrix"] for o, _ in options) if "matrix" in options[0][0] else None
        full = [a.mT @ m @ b for (a, b), (_, m) in zip(pairs, options, strict=True)]
        diagonals = [t.diagonal(dim1=1, dim2=2) for t in full]
        same(list(nnj.jTmjp_pair(model, x1, x2, matrices, wrt, to_diag=True, **flags)), diagonals)
        if wrt == "weight":
            full = [bare([t[:, i][:, :, i] for i in block_index(model)]) for t in full]
        same(list(nnj.jTmjp_pair(model, x1, x2, matrices, wrt, **flags)), full)


@on_models
def test_the_module_is_left_as_it_was(name):
    model, x, _ = case(name, "input")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    kept = x.clone()
    for wrt in SLOTS:
        nnj.jTmjp(model, x, wrt=wrt, to_diag=True)
    assert all(t.equal(before[key]) for key, t in model.state_dict().items()) and x.equal(kept)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_extended_module_stays_extended_and_no_grad_does_not_matter():
    model, x, j = case("residual", "weight")
    nnj.extend(model)
    with torch.no_grad():
        same(nnj.jacobian(model, x, "weight"), j)
    assert model._forward_hooks
    nnj.retract(model)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


NOT_TWICE = {
    "std": lambda x: x.std(1, keepdim=True),
    "std and mean": lambda x: torch.cat(torch.std_mean(x, 1, keepdim=True), 1),
    "norm 3": lambda x: x.norm(p=3, dim=1, keepdim=True),
    "in a model": lambda x: torch.cat([x.square(), (2 * x).std(1, keepdim=True)], 1),
}


@pytest.mark.parametrize("function", NOT_TWICE.values(), ids=NOT_TWICE)
def test_jvp_is_finite_where_jacobian_is(function):
    """Torch's derivative of the node is 0 times infinity, where the node itself sends zero."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.zeros(4, 3).double(), torch.randn(4, 3, generator=generator).double()
    x[0], x[1] = torch.randn(3, generator=generator), 1.0
    model = Applied(function)
    j = nnj.jacobian(model, x)
    assert j.isfinite().all()
    torch.testing.assert_close(nnj.jvp(model, x, v), (j @ v[..., None])[..., 0])
    m = torch.stack([v, 2 * v], -1)
    torch.testing.assert_close(nnj.jmp(model, x, m), j @ m)


def test_all_products_of_some_modules_and_of_named_inputs() -> None:
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.c(torch.tanh(self.a(x)) * self.b(z))

    model = Gated().double()
    x, z = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    whole = nnj.jacobian(model, (x, z), "weight")
    torch.testing.assert_close(whole, nnj.jacobian(model, {"x": x, "z": z}, "weight"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.a, model.b, model.c)]
    a, _, c = whole.split(sizes, 2)
    j, given = torch.cat([a, c], 2), {"wrt": "weight", "modules": [model.c, model.a]}
    p, close = j.shape[2], torch.testing.assert_close
    v, u, m = torch.randn(p).double(), torch.randn(5, 2).double(), torch.rand(p).double()
    close(nnj.jvp(model, (x, z), v, **given), j @ v)
    close(nnj.vjp(model, (x, z), u, **given), torch.einsum("ncp,nc->np", j, u))
    close(nnj.jmp(model, (x, z), torch.diag(m), **given), j * m)
    close(nnj.mjp(model, (x, z), u[:2], **given), u[:2] @ j)
    close(nnj.jmjTp(model, (x, z), m, from_diag=True, **given), (j * m) @ j.mT)
    close(nnj.jTmjp(model, (x, z), joint=True, **given), j.mT @ j)
    close(nnj.jTmjp(model, (x, z), to_diag=True, **given), j.square().sum(1))
    close(nnj.jTmjp_pair(model, (x, z), (x, z), to_diag=True, **given)[1], j.square().sum(1))
    shapes = {name: q.shape for name, q in model.named_parameters() if name[0] in "ac"}
    matrix = nnj.matrices.Diagonal(shapes, m)
    close(nnj.jmjTp(model, (x, z), matrix, **given), (j * m) @ j.mT)
    with pytest.raises(nnj.NNJError, match=r"^a matrix of nnj.matrices is one on parameters"):
        nnj.jmjTp(model.a, x, matrix)
    with pytest.raises(nnj.NNJError, match=r"^diag_backprop is of all parameters"):
        nnj.jTmjp(model, (x, z), diag_backprop=True, **given)
    with pytest.raises(nnj.NNJError, match=r"^modules= says in which parameters J is"):
        nnj.jacobian(model.a, x, modules=[model.a])

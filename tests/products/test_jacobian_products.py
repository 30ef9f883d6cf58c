"""Every product of each model of the table against dense float64 Jacobians, with each flag and
metrics that are not symmetric.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import nnj

N = 3
r = functools.partial(torch.randn, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.act(self.one(x))
        h = self.two(h)
        h += x
        return self.head(self.act(h).flatten(1))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 2), nn.Linear(5, 2), nn.Linear(7, 2)

    def forward(self, x):
        x = torch.cat([x, torch.tanh(self.one(x))], 1)
        return self.head(torch.cat([x, torch.tanh(self.two(x))], 1))


class Block(nn.Module):
    """A transformer block with fused attention."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x):
        q, k, v = (
            t.unflatten(2, (2, 2)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(a)
        return x + self.mlp(x)


class Bare(nn.Module):
    """A class token, places and a scale of each channel, which no layer owns."""

    def __init__(self):
        super().__init__()
        self.token, self.places, self.scale = (
            nn.Parameter(torch.randn(s)) for s in ((1, 1, 3), (3, 3), (3,))
        )
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head((x + self.scale * torch.tanh(self.inner(x)))[:, 0] + x.mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))) * x)


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cell, self.head = cls(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def tied():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)
    )
    model[2].weight = model[0].weight
    return model


def frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(2, 3),
    )


def normed():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 2)
    )
    model(torch.randn(8, 2, 3))
    return model.eval()


MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)
        ),
        (3,),
    ),
    "cnn": (cnn, (1, 4, 5)),
    "residual": (Residual, (2, 2, 2)),
    "densenet": (Dense, (3,)),
    "transformer": (Block, (3, 4)),
    "bare-parameters": (Bare, (2, 3)),
    "tied": (tied, (3,)),
    "called-twice": (Twice, (3,)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 2)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 2)),
    "batchnorm": (normed, (2, 3)),
    "frozen": (frozen, (3,)),
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "conv": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), (2, 3, 2)),
    "softmax": (lambda: nn.Softmax(-1), (4,)),
    "tanh-on-places": (lambda: nn.Tanh(), (2, 2)),
}
SLOTS = ("input", "weight")


def dense_jacobian(model, x, wrt):
    """(N, out, in or P) by torch.func."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run = lambda p, z: functional_call(model, p, (z.clone(),)).flatten(1)
    if wrt == "weight":
        if not params:
            return r(*run(params, x).shape, 0)
        found = jacrev(lambda p: run(p, x))(params)
        return torch.cat([j.flatten(2) for j in found.values()], 2).detach()
    j = jacrev(lambda z: run(params, z))(x).flatten(3)
    return torch.stack([j[i, :, i] for i in range(len(x))]).detach()


@functools.cache
def case(name, wrt, which=0):
    """A model, its input and its dense Jacobian there."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    for _ in range(which + 1):
        x = r(N, *shape)
    return model, x, dense_jacobian(model, x, wrt)


def block_index(model):
    """Positions in the flattened parameters of those of each module, in the order of
    `modules()`.
    """
    starts, total, names = {}, 0, []
    for p in model.parameters():
        if p.requires_grad:
            starts[p] = range(total, total + p.numel())
            total += p.numel()
    for part in model.modules():
        mine = [starts.pop(p) for p in part.parameters(recurse=False) if p in starts]
        if mine:
            names.append([i for m in mine for i in m])
    return names


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def bare(found):
    return found[0] if len(found) == 1 else found


def metrics(d):
    """(arguments, the same as (N, d, d)): not symmetric, not definite."""
    full, shared, diagonal, one = r(N, d, d), r(d, d), r(N, d), r(d)
    eye = torch.eye(d, dtype=full.dtype).expand(N, d, d)
    return [
        ({}, eye),
        ({"matrix": full}, full),
        ({"matrix": shared}, shared.expand(N, d, d)),
        ({"matrix": diagonal, "from_diag": True}, diagonal.diag_embed()),
        ({"matrix": one, "from_diag": True}, one.expand(N, d).diag_embed()),
    ]


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

"""What the tests of products share: a table of models with their dense float64 Jacobians."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.func import functional_call

from tests.support.oracle import jacobians

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
        found = jacobians(lambda p: run(p, x), params)
        return torch.cat([j.flatten(2) for j in found.values()], 2).detach()
    j = jacobians(lambda z: run(params, z), x).flatten(3)
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

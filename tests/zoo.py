"""The table of models: each row is a model, its inputs, and a loss; the tests are products over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.parts import (
    MASK,
    D,
    Net,
    P,
    Scaled,
    Sine,
    T,
    between,
    block,
    conv,
    dense_net,
    gated,
    language_model,
    masked,
    residual,
    segment,
    sequence_first,
    slices,
    time_major,
    transformer,
    u_net,
)

N, C = 4, 3


@dataclass
class Case:
    """One row.

    Args:
        make: the model; `twin` the same function in a form that torch.func can take, with the same state.
        data: (inputs, targets).
        outputs: from run and inputs to the list of outputs of the model; by default the one that it returns.
        loss: an nn.Module, or a function of (output, target), called on each output with its target.
        axis: where the samples are.
        samples: how many samples batch_grad has; by default N, in the order of the output's rows.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[tuple[Any, ...], Any]]
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    outputs: Callable[..., list[Any]] = field(default=lambda run, *x: [run(*x)])
    twin: Callable[[nn.Module], nn.Module] | None = None
    axis: int = 0
    owner: Callable[[int], torch.Tensor] | None = None  # the sample of each row of the output, where rows are not samples


def labels(*shape: int, c: int = C) -> torch.Tensor:
    return torch.randint(0, c, shape)


def vectors() -> tuple[Any, Any]:
    return (torch.randn(N, D),), labels(N)


def tokens() -> tuple[Any, Any]:
    return (torch.randn(N, T, D),), labels(N)


def images() -> tuple[Any, Any]:
    return (torch.randn(N, 2, 6, 6),), labels(N)


def twin_of(change: Callable[[nn.Module], None]) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        change(model)
        return model

    return make


def body(forward: Callable[..., Any]) -> Callable[[nn.Module], nn.Module]:
    return twin_of(lambda m: setattr(m, "body", forward))


def frozen_prefix() -> nn.Module:
    m = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, C))
    m[0].requires_grad_(False)
    m[2].bias.requires_grad_(False)
    return m


def eval_norm() -> nn.Module:
    m = nn.Sequential(
        conv(2, D), nn.BatchNorm2d(D), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C)
    )
    m[1].running_mean.uniform_(-1, 1)
    m[1].running_var.uniform_(0.5, 2)
    return m.eval()


def poisson(f, t):
    return (f.exp() - t * f).mean()


two = lambda **parts: dict(a=nn.Linear(D, D), b=nn.Linear(D, C), **parts)
regression = lambda: ((torch.randn(N, D),), torch.randn(N, C))

CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)), vectors),
    Case(
        "cnn",
        lambda: nn.Sequential(
            conv(2, 4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, C),
        ),
        images,
    ),
    Case(
        "residual, in place",
        lambda: Net(residual, a=conv(2, 4), b=conv(4, 4), relu=nn.ReLU(inplace=True), head=nn.Linear(4, C)),
        images,
    ),
    Case("dense net", lambda: Net(dense_net, a=conv(2, 3), b=conv(5, 2), head=nn.Linear(7, C)), images),
    Case(
        "u-net, extra axes",
        lambda: Net(u_net, a=conv(2, 3), pool=nn.MaxPool2d(2), b=conv(3, 2), head=nn.Conv2d(4, C, 1)),
        lambda: ((torch.randn(2, 2, 4, 4),), labels(2, 4, 4)),
    ),
    Case(
        "transformer",
        lambda: Net(transformer, inner=nn.Linear(D, D), token=P(1, 1, D), place=P(T + 1, D), head=nn.Linear(D, C), **block()),
        tokens,
    ),
    Case(
        "functional calls",
        lambda: Net(between, a=nn.Linear(D, 2 * D), b=nn.Linear(D + 2, C), gain=P(D + 2), shift=P(1, D + 2)),
        vectors,
    ),
    Case("in-place slices", lambda: Net(slices, **two(gain=P(D))), vectors),
    Case("called twice", lambda: Net(lambda s, x: s.b(s.a(s.a(x).tanh())), **two()), vectors),
    Case(
        "convolution called twice",
        lambda: Net(lambda s, x: s.h(s.a(s.a(x).tanh()).mean((2, 3))), a=conv(2, 2), h=nn.Linear(2, C)),
        images,
    ),
    Case(
        "tied language model",
        lambda: language_model(True),
        lambda: ((labels(N, T, c=5),), labels(N * T, c=5)),
        owner=lambda n: torch.arange(n) // T,
    ),
    Case(
        "language model",
        lambda: language_model(False),
        lambda: ((labels(N, T, c=5),), labels(N * T, c=5)),
        owner=lambda n: torch.arange(n) // T,
    ),
    Case(
        "a weight used by a layer and by hand",
        lambda: Net(lambda s, x: s.b(F.linear(s.a(x).tanh(), s.a.weight)), **two()),
        vectors,
    ),
    Case(
        "two inputs",
        lambda: Net(lambda s, x, z: s.b(s.a(x) * s.c(z).sigmoid()), c=nn.Linear(2, D), **two()),
        lambda: ((torch.randn(N, D), torch.randn(N, 2)), labels(N)),
    ),
    Case(
        "dict output",
        lambda: Net(lambda s, x: {"logits": s.b(s.a(x).relu()), "aux": s.a(x)}, **two()),
        vectors,
        outputs=lambda run, x: [run(x)["logits"]],
    ),
    Case(
        "siamese",
        lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C)),
        lambda: ((torch.randn(N, D), torch.randn(N, D)), None),
        loss=lambda: lambda f, g: (f - g).square().sum(),
        outputs=lambda run, x, z: [(run(x), run(z))],
    ),
    Case(
        "a branch that does not reach the loss",
        lambda: Net(lambda s, x: (s.b(s.a(x).tanh()), s.c(x))[0], c=nn.Linear(D, 2), **two()),
        vectors,
    ),
    Case(
        "checkpoint",
        lambda: Net(
            lambda s, x: s.b(checkpoint(lambda h: s.c(s.a(h).tanh() * s.gain).relu(), x, use_reentrant=False)),
            c=nn.Linear(D, D),
            **two(gain=P(D)),
        ),
        vectors,
        twin=body(lambda s, x: s.b(s.c(s.a(x).tanh() * s.gain).relu())),
    ),
    Case("subclass of Linear", lambda: Net(lambda s, x: s.b(s.c(s.a(x))), c=Scaled(D, D), **two()), vectors),
    Case(
        "weight norm",
        lambda: Net(lambda s, x: s.b(s.c(s.a(x).tanh())), c=parametrizations.weight_norm(nn.Linear(D, D)), **two()),
        vectors,
    ),
    Case(
        "spectral norm",
        lambda: Net(lambda s, x: s.b(s.c(s.a(x).tanh())), c=parametrizations.spectral_norm(nn.Linear(D, D)), **two()).eval(),
        vectors,
    ),
    Case(
        "custom function",
        lambda: Net(lambda s, x: s.b(Sine.apply(s.a(x))), **two()),
        vectors,
        twin=body(lambda s, x: s.b(s.a(x).sin())),
    ),
    Case("batch norm in eval", eval_norm, images),
    Case(
        "multi-head attention",
        lambda: Net(
            lambda s, x: s.head(s.a(x, x, x)[0][:, 0]), a=nn.MultiheadAttention(D, 2, batch_first=True), head=nn.Linear(D, C)
        ),
        tokens,
    ),
    Case(
        "gru", lambda: Net(lambda s, x: s.head(s.a(x)[0][:, -1]), a=nn.GRU(D, D, batch_first=True), head=nn.Linear(D, C)), tokens
    ),
    Case(
        "lstm",
        lambda: Net(lambda s, x: s.head(s.a(x)[0].mean(1)), a=nn.LSTM(D, D, batch_first=True), head=nn.Linear(D, C)),
        tokens,
    ),
    Case(
        "a list of parameters",
        lambda: Net(lambda s, x: s.b(torch.tanh(x @ s.p[0] + s.p[1])), p=nn.ParameterList([P(D, D), P(D)]), b=nn.Linear(D, C)),
        vectors,
    ),
    Case("one parameter for each place", lambda: Net(lambda s, x: s.b((s.a(x) * s.m).sum(1)), **two(m=P(T, D))), tokens),
    Case(
        "conv1d and group norm",
        lambda: nn.Sequential(nn.Conv1d(T, 4, 2), nn.GroupNorm(2, 4), nn.ELU(), nn.Flatten(), nn.Linear(12, C)),
        tokens,
    ),
    Case("experts", lambda: Net(gated, e0=nn.Linear(D, D), e1=nn.Linear(D, D), head=nn.Linear(D, C)), vectors),
    Case(
        "time-major rows",
        lambda: Net(lambda s, x: time_major(s, x, 0.0), **two()),
        lambda: ((torch.randn(N, T, D),), labels(N * T)),
        owner=lambda n: torch.arange(n) % N,
    ),
    Case(
        "time-major rows that mix",
        lambda: Net(lambda s, x: time_major(s, x, 1.0), **two()),
        lambda: ((torch.randn(N, T, D),), labels(N * T)),
        owner=lambda n: torch.arange(n) % N,
    ),
    Case(
        "masked rows that mix",
        lambda: Net(masked, **two()),
        lambda: ((torch.randn(N, T, D),), labels(int(MASK.sum()))),
        owner=lambda n: MASK.nonzero()[:, 0],
    ),
    Case("permuted rows", lambda: Net(lambda s, x: s.b(s.a(x).tanh()[torch.tensor([2, 0, 3, 1])]), **two()), vectors),
    Case("sequence first", lambda: Net(sequence_first, **two()), lambda: ((torch.randn(T, N, D),), labels(N)), axis=1),
    Case(
        "as many places as samples, sequence first",
        lambda: Net(sequence_first, **two()),
        lambda: ((torch.randn(N, N, D),), labels(N)),
        axis=1,
    ),
    Case(
        "two views in one batch",
        lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C)),
        lambda: ((torch.randn(N, D), torch.randn(N, D)), None),
        loss=lambda: lambda f, g: (f - g).square().mean(),
        outputs=lambda run, x, z: [tuple(run(torch.cat([x, z])).chunk(2))],
    ),
    Case("frozen parts", frozen_prefix, vectors),
    Case(
        "segmentation, class weights",
        lambda: Net(segment, a=conv(2, 3), b=nn.Conv2d(3, C, 1)),
        lambda: ((torch.randn(2, 2, 3, 3),), labels(2, 3, 3)),
        loss=lambda: nn.CrossEntropyLoss(torch.rand(C, dtype=torch.float64) + 0.5, reduction="sum", label_smoothing=0.1),
    ),
    Case(
        "soft targets",
        lambda: Net(lambda s, x: s.b(s.a(x).tanh()), **two()),
        lambda: ((torch.randn(N, D),), torch.rand(N, C).softmax(1)),
    ),
    Case("mse", lambda: Net(lambda s, x: s.b(s.a(x).tanh()), **two()), regression, loss=nn.MSELoss),
    Case(
        "binary",
        lambda: Net(lambda s, x: s.b(s.a(x).tanh()), **two()),
        lambda: ((torch.randn(N, D),), torch.rand(N, C)),
        loss=lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(C, dtype=torch.float64) + 0.5),
    ),
    Case(
        "a plain function",
        lambda: Net(lambda s, x: s.b(s.a(x).tanh()), **two()),
        lambda: ((torch.randn(N, D),), torch.rand(N, C)),
        loss=lambda: poisson,
    ),
    Case(
        "one sample",
        lambda: language_model(False),
        lambda: ((labels(1, T, c=5),), labels(T, c=5)),
        owner=lambda n: torch.arange(n) // T,
    ),
]

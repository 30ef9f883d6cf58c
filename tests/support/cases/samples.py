"""Rows: whose the rows of a loss are, in every order; and what can only be right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases.models import LM, MLP, Block
from tests.support.cases.table import (
    EITHER,
    N,
    by_loss,
    case,
    classes,
    do,
    every,
    in_order,
    linear,
    one_behind_the_other,
    plain,
    r,
    sequences,
    tokens,
    vectors,
)

# -- which rows belong to which sample -------------------------------------------------------------


def token_major(s: Any, x: Tensor) -> Tensor:
    return s.head(torch.tanh(s.one(x.permute(1, 0, 2).reshape(-1, x.shape[2]))))


def token_major_mixed(s: Any, x: Tensor) -> Tensor:
    return s.head(s.block(x).permute(1, 0, 2).reshape(-1, x.shape[2]))


def routed(s: Any, x: Tensor, to: Tensor) -> Tensor:
    """Each row goes to its expert and back to its place."""
    h = torch.tanh(s.one(x))
    out = torch.zeros_like(h)
    for number, expert in enumerate(s.experts):
        where = (to == number).nonzero()[:, 0]
        if len(where):
            out = out.index_put((where,), expert(h.index_select(0, where)))
    return s.head(out)


def routed_in_place(s: Any, x: Tensor, to: Tensor) -> Tensor:
    h = torch.tanh(s.one(x))
    out = torch.zeros_like(h)
    for number, expert in enumerate(s.experts):
        out[to == number] = expert(h[to == number])
    return s.head(out)


def sorted_experts(s: Any, x: Tensor, to: Tensor) -> Tensor:
    """Token routing with a gate, rows sorted by expert and sent back by index_add."""
    flat = s.one(x).reshape(-1, 3)
    gate = s.gate(flat).softmax(-1)
    to = to.reshape(-1)
    out = torch.zeros_like(flat)
    for number, expert in enumerate(s.experts):
        where = (to == number).nonzero()[:, 0]
        out.index_add_(0, where, gate[where, number, None] * expert(flat[where]))
    return s.head(out.view(len(x), -1, 3).mean(1))


def experts(d: int = 3) -> nn.Module:
    return nn.ModuleList([nn.Linear(d, d), nn.Linear(d, d)])


def two_of_four() -> Tensor:
    return torch.tensor([1, 0, 0, 1])


def rows_of(*numbers: int) -> Callable[..., list[Tensor]]:
    return lambda outs, data: [torch.tensor(numbers)]


MASK = torch.tensor(
    [[True, False, True, False], [False, False, False, True], [True, True, True, False]]
)
MASKED = rows_of(0, 0, 1, 2, 2, 2)
PERM = torch.tensor([2, 0, 1])


def flat_tokens() -> tuple[Any, ...]:
    return r(N, 4, 4), classes(4 * N)


case(
    "token-major", do(token_major, one=linear(4, 3), head=linear(3, 3)), flat_tokens, numbers=every
)
case(
    "token-major-as-many-tokens",
    do(token_major, one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(3, 3, 4), classes(9)),
    numbers=every,
)
case(
    "token-major-mixed",
    do(token_major_mixed, block=Block, head=linear(4, 3)),
    flat_tokens,
    numbers=every,
)
case(
    "token-major-extra-axis",
    do(lambda s, x: s.head(s.block(x)).permute(1, 2, 0), block=Block, head=linear(4, 3)),
    lambda: (r(N, 4, 4), classes(4, 3, N)),
    numbers=lambda outs, data: [torch.arange(N).expand(4, 3, N)],
    table=EITHER,
)
case(
    "energy-of-the-batch",
    do(lambda s, x: s.head(torch.tanh(s.one(x))).sum(), one=linear(4, 3), head=linear(3, 1)),
    lambda: (r(N, 4), r(())),
    plain,
    nn.MSELoss,
    numbers=lambda outs, data: [torch.tensor(0)],
    table=EITHER,
)
case(
    "token-major-reshaped",
    do(token_major, one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(N, 4, 4), classes()),
    lambda m, l, x, y: l(m(x).view(4, N, 3).mean(0), y),
)
case(
    "sequence-first-mean",
    do(lambda s, x: s.head(torch.tanh(s.one(x)).mean(0)), one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(4, N, 4), classes()),
    numbers=by_loss,
    batch_axis=1,
)
case(
    "sequence-first-as-long-as-samples",
    do(lambda s, x: s.head(torch.tanh(s.one(x)).mean(0)), one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(3, 3, 4), classes()),
    numbers=by_loss,
    batch_axis=1,
)
case(
    "sequence-first-attention",
    do(
        lambda s, x: s.head(s.attention(x, x, x)[0]).mean(0),
        attention=lambda: nn.MultiheadAttention(4, 2),
        head=linear(4, 3),
    ),
    lambda: (r(4, N, 4), classes()),
    numbers=by_loss,
    batch_axis=1,
)
case(
    "sequence-first-lstm",
    do(lambda s, x: s.head(s.cell(x)[0][-1]), cell=lambda: nn.LSTM(4, 2), head=linear(2, 3)),
    lambda: (r(4, N, 4), classes()),
    numbers=by_loss,
    batch_axis=1,
)
case(
    "sequence-first-tokens",
    do(
        lambda s, x: s.head(s.cell(s.table(x))[0]),
        table=lambda: nn.Embedding(5, 3),
        cell=lambda: nn.GRU(3, 3),
        head=linear(3, 3),
    ),
    lambda: (torch.randint(5, (4, N)), classes(4 * N)),
    lambda m, l, x, y: l(m(x).view(-1, 3), y),
    numbers=lambda outs, data: [torch.arange(4 * N) % N],
    batch_axis=1,
)
case(
    "masked-rows",
    do(lambda s, x: s.head(torch.tanh(s.one(x))), one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(N, 4, 4), classes(6)),
    lambda m, l, x, y: l(m(x)[MASK], y),
    numbers=MASKED,
)
case(
    "masked-rows-mixed",
    do(lambda s, x: s.head(s.block(x)), block=Block, head=linear(4, 3)),
    lambda: (r(N, 4, 4), classes(6)),
    lambda m, l, x, y: l(m(x)[MASK], y),
    numbers=MASKED,
)
case(
    "masked-rows-before-head",
    do(lambda s, x: s.head(s.block(x)[MASK]), block=Block, head=linear(4, 3)),
    lambda: (r(N, 4, 4), classes(6)),
    numbers=MASKED,
)
case(
    "masked-rows-an-odd-number",
    do(lambda s, x: s.head(s.block(x)), block=Block, head=linear(4, 3)),
    lambda: (r(N, 4, 4), classes(5)),
    lambda m, l, x, y: l(m(x)[MASK][:5], y),
    numbers=rows_of(0, 0, 1, 2, 2),
)
case("masked-tokens-lm", LM, tokens, lambda m, l, x, y: l(m(x)[MASK], y[MASK]), numbers=MASKED)
case(
    "two-views-in-model",
    do(lambda s, a, b: s.net(torch.cat([a, b])), net=MLP),
    lambda: (r(N, 4), r(N, 4), classes(2 * N)),
    lambda m, l, a, b, y: l(m(a, b), y),
    numbers=every,
)
case(
    "two-views-of-images",
    do(
        lambda s, a, b: s.net(torch.cat([a, b])),
        net=lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
    ),
    lambda: (r(N, 2, 4, 4), r(N, 2, 4, 4), classes(2 * N)),
    lambda m, l, a, b, y: l(m(a, b), y),
    numbers=every,
)
case(
    "two-views-outside",
    MLP,
    lambda: (r(N, 4), r(N, 4), classes(2 * N)),
    lambda m, l, a, b, y: l(m(torch.cat([a, b])), y),
    numbers=by_loss,
)
case(
    "two-views-compared-in-loss",
    MLP,
    lambda: (r(N, 4), r(N, 4)),
    lambda m, l, a, b: (lambda z: l(z[:N], z[N:]))(m(torch.cat([a, b]))),
    nn.MSELoss,
    numbers=one_behind_the_other,
)
case(
    "two-views-compared-in-model",
    do(
        lambda s, a, b: (lambda z: s.head(z[:N] * z[N:]))(s.net(torch.cat([a, b]))),
        net=MLP,
        head=linear(3, 3),
    ),
    lambda: (r(N, 4), r(N, 4), classes()),
    lambda m, l, a, b, y: l(m(a, b), y),
)
case(
    "views-averaged",
    do(lambda s, a, b: s.net(torch.cat([a, b])).view(2, N, 3).mean(0), net=MLP),
    lambda: (r(N, 4), r(N, 4), classes()),
    lambda m, l, a, b, y: l(m(a, b), y),
)
case(
    "repeated-inputs",
    do(lambda s, x: s.net(x.repeat(2, 1)), net=MLP),
    lambda: (r(N, 4), classes(2 * N)),
    numbers=every,
)
case(
    "repeated-inputs-with-a-parameter",
    do(lambda s, x: s.net(x.repeat(2, 1) * s.noise[:, None]), net=MLP, noise=lambda: r(2 * N)),
    lambda: (r(N, 4), classes(2 * N)),
    numbers=every,
    table=EITHER,
)
case(
    "repeat-interleave",
    do(lambda s, x: s.net(x.repeat_interleave(2, 0)), net=MLP),
    lambda: (r(N, 4), classes(2 * N)),
)
case(
    "experts",
    do(routed, one=linear(4, 3), experts=experts, head=linear(3, 3)),
    lambda: (r(4, 4), two_of_four(), classes(4)),
    lambda m, l, x, to, y: l(m(x, to), y),
)
case(
    "experts-uneven",
    do(routed, one=linear(4, 3), experts=experts, head=linear(3, 3)),
    lambda: (r(4, 4), torch.tensor([1, 0, 0, 0]), classes(4)),
    lambda m, l, x, to, y: l(m(x, to), y),
)
case(
    "experts-in-place",
    do(routed_in_place, one=linear(4, 3), experts=experts, head=linear(3, 3)),
    lambda: (r(4, 4), two_of_four(), classes(4)),
    lambda m, l, x, to, y: l(m(x, to), y),
)
case(
    "experts-all-to-one-permuted",
    do(lambda s, x: s.head(s.one(x[PERM])[PERM.argsort()]), one=linear(4, 3), head=linear(3, 3)),
    vectors,
)
case(
    "experts-for-tokens",
    do(sorted_experts, one=linear(4, 3), gate=linear(3, 2), experts=experts, head=linear(3, 3)),
    lambda: (r(N, 4, 4), torch.randint(2, (N, 4)), classes()),
    lambda m, l, x, to, y: l(m(x, to), y),
)
case("permuted-rows", MLP, vectors, lambda m, l, x, y: l(m(x)[PERM], y), numbers=rows_of(2, 0, 1))
case(
    "permuted-rows-mixed",
    do(lambda s, x: s.head(s.block(x)).mean(1), block=Block, head=linear(4, 3)),
    sequences,
    lambda m, l, x, y: l(m(x)[PERM], y[PERM]),
    numbers=rows_of(2, 0, 1),
)
case(
    "permuted-in-model",
    do(lambda s, x: s.head(torch.tanh(s.one(x))[PERM]), one=linear(4, 3), head=linear(3, 3)),
    vectors,
    numbers=by_loss,
)
case(
    "subset-of-rows",
    MLP,
    lambda: (r(5, 4), classes(2)),
    lambda m, l, x, y: l(m(x)[1:3], y),
    numbers=rows_of(1, 2),
    n=5,
)
case(
    "transposed-batch",
    do(lambda s, x: (s.w @ torch.tanh(s.one(x)).T).T, one=linear(4, 3), w=lambda: r(3, 3)),
    vectors,
)
case(
    "batch-in-the-last-axis",
    do(lambda s, x: s.w2 @ torch.tanh(s.w1 @ x), w1=lambda: r(3, 4), w2=lambda: r(3, 3)),
    lambda: (r(4, N), classes()),
    lambda m, l, x, y: l(m(x).T, y),
    numbers=by_loss,
    batch_axis=1,
)


def repeated_tokens() -> tuple[Any, ...]:
    """Equal keys: what reaches queries cancels, to zero in some columns and to rounding errors in
    others.
    """
    return torch.randint(5, (5, 2)).repeat_interleave(2, 1), classes(5)


case(
    "repeated-tokens-in-another-order",
    do(
        lambda s, x: s.head(s.block(s.words(x))[torch.tensor([3, 0, 4, 1, 2])].mean(1)),
        words=lambda: nn.Embedding(5, 4),
        block=lambda: Block(causal=True),
        head=linear(4, 3),
    ),
    repeated_tokens,
    numbers=by_loss,
)

# -- what stands before the first layer hides the samples: right, or refused -----------------------


def either(
    name: str,
    run: Callable[..., Any],
    data: Any,
    numbers: Any = every,
    call: Any = plain,
    **parts: Callable[[], Any],
) -> None:
    case(name, do(run, **parts), data, call, numbers=numbers, table=EITHER)


def two_equal() -> tuple[Any, ...]:
    x, y = flat_tokens()
    x[1] = x[0]
    return x, y


def of_one_row() -> tuple[Any, ...]:
    return r(1, 1, 4).expand(N, 4, 4).contiguous(), classes(4 * N)


def padded() -> tuple[Any, ...]:
    x, y = flat_tokens()
    x[:, 2:] = 0.0
    return x, y


PARTS = dict(one=linear(4, 3), head=linear(3, 3))
NET = dict(net=MLP)
either("token-major-equal-samples", token_major, two_equal, **PARTS)
either("token-major-of-one-row", token_major, of_one_row, **PARTS)
either("token-major-padded", token_major, padded, **PARTS)
either("token-major-scaled", lambda s, x: token_major(s, 2 * x + 1), flat_tokens, **PARTS)
either(
    "token-major-normalised",
    lambda s, x: token_major(s, F.layer_norm(x, (4,))),
    flat_tokens,
    **PARTS,
)
either(
    "token-major-with-places",
    lambda s, x: token_major(s, x + s.places),
    flat_tokens,
    places=lambda: r(4, 4),
    **PARTS,
)
either(
    "token-major-as-many-scaled",
    lambda s, x: token_major(s, 2 * x),
    lambda: (r(3, 3, 4), classes(9)),
    **PARTS,
)
either(
    "token-major-integers",
    lambda s, x: s.head(torch.tanh(s.table(x.T.reshape(-1)))),
    lambda: (torch.randint(5, (N, 4)), classes(4 * N)),
    table=lambda: nn.Embedding(5, 3),
    head=linear(3, 3),
)
either(
    "token-major-integers-shifted",
    lambda s, x: s.head(torch.tanh(s.table((x + 1).T.reshape(-1)))),
    lambda: (torch.randint(5, (N, 4)), classes(4 * N)),
    table=lambda: nn.Embedding(6, 3),
    head=linear(3, 3),
)
either(
    "token-major-one-hot",
    lambda s, x: s.head(torch.tanh(s.one(F.one_hot(x, 5).double().transpose(0, 1).reshape(-1, 5)))),
    lambda: (torch.randint(5, (N, 4)), classes(4 * N)),
    one=linear(5, 3),
    head=linear(3, 3),
)
either(
    "token-major-patches",
    lambda s, x: s.head(
        torch.relu(s.one(F.unfold(x, 2, stride=2).permute(2, 0, 1).reshape(-1, 8)))
    ),
    lambda: (r(N, 2, 4, 4), classes(4 * N)),
    one=linear(8, 3),
    head=linear(3, 3),
)
either(
    "sample-major-scaled",
    lambda s, x: s.head(torch.tanh(s.one((2 * x).reshape(-1, 4)))),
    flat_tokens,
    in_order,
    **PARTS,
)
either(
    "sample-major-patches",
    lambda s, x: s.head(torch.relu(s.one(F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, 8)))),
    lambda: (r(N, 2, 4, 4), classes(4 * N)),
    in_order,
    one=linear(8, 3),
    head=linear(3, 3),
)
either(
    "two-views-scaled",
    lambda s, x: s.net(torch.cat([2 * x, -x])),
    lambda: (r(N, 4), classes(2 * N)),
    **NET,
)
either(
    "two-views-flipped",
    lambda s, x: s.net(torch.cat([x, x.flip(1)])),
    lambda: (r(N, 4), classes(2 * N)),
    **NET,
)
either(
    "two-views-with-noise",
    lambda s, x: s.net(torch.cat([x, x + torch.randn(x.shape).double()])),
    lambda: (r(N, 4), classes(2 * N)),
    **NET,
)
either(
    "two-views-interleaved",
    lambda s, x: s.net(torch.stack([x, 2 * x], 1).flatten(0, 1)),
    lambda: (r(N, 4), classes(2 * N)),
    in_order,
    **NET,
)
either(
    "two-views-of-equal-samples",
    lambda s, a, b: s.net(torch.cat([a, b])),
    lambda: (r(1, 4).repeat(N, 1), r(N, 4), classes(2 * N)),
    call=lambda m, l, a, b, y: l(m(a, b), y),
    **NET,
)
either(
    "two-views-the-second-turned-round",
    lambda s, a, b: s.net(torch.cat([a, b.flip(0)])),
    lambda: (r(N, 4), r(N, 4), classes(2 * N)),
    lambda outs, data: [torch.tensor([0, 1, 2, 2, 1, 0])],
    lambda m, l, a, b, y: l(m(a, b), y),
    **NET,
)
either("shuffled-before-the-first-layer", lambda s, x: s.net(x[PERM]), vectors, by_loss, **NET)
either(
    "shuffled-and-scaled-before-the-first-layer",
    lambda s, x: s.net(2 * x[PERM]),
    vectors,
    by_loss,
    **NET,
)
either(
    "shuffled-and-back", lambda s, x: s.net(2 * x[PERM])[PERM.argsort()], vectors, in_order, **NET
)
either(
    "masked-before-the-first-layer",
    lambda s, x: s.head(torch.tanh(s.one(x[MASK]))),
    lambda: (r(N, 4, 4), classes(6)),
    MASKED,
    **PARTS,
)
either(
    "masked-and-scaled-before-the-first-layer",
    lambda s, x: s.head(torch.tanh(s.one(2 * x[MASK]))),
    lambda: (r(N, 4, 4), classes(6)),
    MASKED,
    **PARTS,
)

"""Rows: attention, recurrence, and bare weights that meet the data in products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.support.cases.table import (
    N,
    by_loss,
    case,
    classes,
    do,
    linear,
    r,
    sequences,
    tokens,
    vectors,
)


def glue(
    name: str, run: Callable[..., Any], data: Any = sequences, **parts: Callable[[], Any]
) -> None:
    case(name, do(run, **parts), data)


def sequence_first() -> tuple[Any, ...]:
    return r(4, N, 4), classes()


def first(name: str, run: Callable[..., Any], **parts: Callable[[], Any]) -> None:
    """The same with the samples in axis 1."""
    case(name, do(run, **parts), sequence_first, numbers=by_loss, batch_axis=1)


# -- attention -------------------------------------------------------------------------------------

FLOAT_MASK = torch.tensor(
    [[0.0, -1.0, 0.5, 0.0], [0.3, 0.0, 0.0, -2.0], [0.0, 0.0, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]]
)
CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False, False, True, True], [False] * 4, [False, False, False, True]])


def attention(name: str, options: dict[str, Any], call: dict[str, Any], width: int = 4) -> None:
    """Self-attention behind a layer, each batch_first, with and without weights."""
    for weights in (True, False):

        def run(s: Any, x: Tensor, weights: bool = weights) -> Tensor:
            z = torch.tanh(s.one(x))
            return s.head(s.attention(z, z, z, need_weights=weights, **call)[0])

        layer = lambda bf: lambda: nn.MultiheadAttention(width, 2, batch_first=bf, **options)
        suffix = "" if weights else "-fused"
        glue(
            f"mha-{name}{suffix}",
            lambda s, x, run=run: run(s, x).mean(1),
            one=linear(4, width),
            attention=layer(True),
            head=linear(width, 3),
        )
        first(
            f"mha-{name}-sequence-first{suffix}",
            lambda s, x, run=run: run(s, x).mean(0),
            one=linear(4, width),
            attention=layer(False),
            head=linear(width, 3),
        )


attention("plain", {}, {})
attention("no-bias", {"bias": False}, {})
attention("bias-kv-zero-attn", {"add_bias_kv": True, "add_zero_attn": True}, {})
attention("causal", {}, {"attn_mask": CAUSAL, "is_causal": True})
attention("masked", {}, {"attn_mask": FLOAT_MASK.double(), "key_padding_mask": PADDED})
attention("mask-of-each-head", {}, {"attn_mask": FLOAT_MASK.double().repeat(2 * N, 1, 1)})


def cross(s: Any, x: Tensor, weights: bool = True) -> Tensor:
    q, k = torch.tanh(s.one(x[:, :2])), torch.tanh(s.two(x))
    return s.head(
        s.attention(q, k, k if s.attention.kdim == s.attention.vdim else x, need_weights=weights)[0]
    ).mean(1)


for weights in (True, False):
    suffix = "" if weights else "-fused"
    run = lambda s, x, weights=weights: cross(s, x, weights)
    glue(
        f"mha-cross{suffix}",
        run,
        one=linear(4, 4),
        two=linear(4, 4),
        head=linear(4, 3),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    )
    glue(
        f"mha-cross-kdim-vdim{suffix}",
        run,
        one=linear(4, 4),
        two=linear(4, 3),
        head=linear(4, 3),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=4),
    )
glue(
    "mha-three-inputs",
    lambda s, x: s.head(s.attention(s.one(x), s.two(x), x)[0]).mean(1),
    one=linear(4, 4),
    two=linear(4, 4),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True, bias=False),
    head=linear(4, 3),
)
glue(
    "mha-weights-in-the-output",
    lambda s, x: (lambda a: s.head(torch.cat([a[0].mean(1), a[1].flatten(1)], 1)))(
        s.attention(x, s.one(x), x, average_attn_weights=False)
    ),
    one=linear(4, 4),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(4 + 32, 3),
)
glue(
    "mha-called-twice",
    lambda s, x: s.head(s.attention(*[torch.tanh(s.attention(x, x, x)[0])] * 3)[0].mean(1)),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(4, 3),
)
glue(
    "mha-self-and-cross",
    lambda s, x: s.head(s.attention(s.attention(x, x, x)[0], x[:, :1], x[:, :1])[0].mean(1)),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(4, 3),
)


def attended(s: Any, x: Tensor) -> Tensor:
    return s.head(s.attention(*[s.one(x)] * 3)[0]).mean(1)


def again(run: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is computed anew in the backward pass, which torch.func cannot take."""
    return lambda s, x: checkpoint(run, s, x, use_reentrant=False)


def checkpointed(name: str, run: Callable[..., Any], data: Any, **parts: Callable[[], Any]) -> None:
    case(name, do(again(run), **parts), data, twin=do(run, **parts))


checkpointed(
    "mha-checkpointed",
    attended,
    sequences,
    one=linear(4, 4),
    head=linear(4, 3),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
)

# -- transformers of torch.nn ----------------------------------------------------------------------

for mode, drop in (("train", 0.0), ("eval", 0.3)):
    for batch_first in (True, False):
        put = glue if batch_first else first
        suffix = f"{mode}{'' if batch_first else '-sequence-first'}"
        options: dict[str, Any] = dict(
            d_model=4, nhead=2, dim_feedforward=3, dropout=drop, batch_first=batch_first
        )
        at = 1 if batch_first else 0

        def settled(make: Callable[[], nn.Module], mode: str = mode) -> Callable[[], nn.Module]:
            return lambda: make().train(mode == "train")

        def build(
            cls: Any, options: dict[str, Any] = options, **more: Any
        ) -> Callable[[], nn.Module]:
            return lambda: cls(**options, **more)

        put(
            f"encoder-{suffix}",
            lambda s, x, at=at: s.head(s.body(s.one(x)).mean(at)),
            one=linear(4, 4),
            head=linear(4, 3),
            body=settled(
                lambda build=build: nn.TransformerEncoder(
                    build(nn.TransformerEncoderLayer)(),
                    2,
                    norm=nn.LayerNorm(4),
                    enable_nested_tensor=False,
                )
            ),
        )
        put(
            f"encoder-layer-on-the-input-{suffix}",
            lambda s, x, at=at: s.head(s.body(x).mean(at)),
            head=linear(4, 3),
            body=settled(build(nn.TransformerEncoderLayer, norm_first=True, activation="gelu")),
        )
        put(
            f"decoder-{suffix}",
            lambda s, x, at=at: s.head(
                s.body(s.one(x), x.narrow(at, 0, 2), tgt_mask=CAUSAL).mean(at)
            ),
            one=linear(4, 4),
            head=linear(4, 3),
            body=settled(
                lambda build=build: nn.TransformerDecoder(build(nn.TransformerDecoderLayer)(), 2)
            ),
        )
        put(
            f"transformer-whole-{suffix}",
            lambda s, x, at=at: s.head(s.body(s.one(x), x.narrow(at, 0, 3)).mean(at)),
            one=linear(4, 4),
            head=linear(4, 3),
            body=settled(build(nn.Transformer, num_encoder_layers=1, num_decoder_layers=1)),
        )


def padded_encoder(nested: bool) -> Callable[[], nn.Module]:
    body = lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), 1, enable_nested_tensor=nested
    )
    return do(
        lambda s, x: s.head(s.body(s.one(x), src_key_padding_mask=PADDED)[:, 0]),
        one=linear(4, 4),
        head=linear(4, 3),
        body=lambda: body().eval(),
    )


case("encoder-eval-padded", padded_encoder(True), sequences, twin=padded_encoder(False))

# -- recurrence ------------------------------------------------------------------------------------

RECURRENT: dict[str, tuple[Any, dict[str, Any], int]] = {
    "rnn": (nn.RNN, {}, 3),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}, 3),
    "rnn-deep": (nn.RNN, {"num_layers": 2}, 3),
    "rnn-both-ways": (nn.RNN, {"bidirectional": True}, 6),
    "lstm": (nn.LSTM, {}, 3),
    "lstm-no-bias": (nn.LSTM, {"bias": False}, 3),
    "lstm-projected": (nn.LSTM, {"proj_size": 2}, 2),
    "lstm-deep-both-ways-projected": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "proj_size": 2},
        4,
    ),
    "gru": (nn.GRU, {"dropout": 0.0}, 3),
    "gru-deep-both-ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}, 6),
}
for name, (cls, more, width) in RECURRENT.items():
    make = lambda bf, cls=cls, more=more: lambda: cls(4, 3, batch_first=bf, **more)
    glue(
        f"sequence-{name}",
        lambda s, x: s.head(s.cell(torch.tanh(s.one(x)))[0].mean(1)),
        one=linear(4, 4),
        cell=make(True),
        head=linear(width, 3),
    )
    first(
        f"sequence-{name}-first",
        lambda s, x: s.head(s.cell(x)[0][-1]),
        cell=make(False),
        head=linear(width, 3),
    )


def packed(s: Any, x: Tensor) -> Tensor:
    rows = pack_padded_sequence(
        s.one(x), torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False
    )
    return s.head(pad_packed_sequence(s.cell(rows)[0], batch_first=True)[0].sum(1))


def ragged(s: Any, x: Tensor) -> Tensor:
    """What packed sequences mean, one by one."""
    found = [s.cell(row[None, :t])[0].sum(1) for row, t in zip(s.one(x), (2, 4, 3), strict=True)]
    return s.head(torch.cat(found))


for name, cls in (("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)):
    parts: dict[str, Any] = dict(
        one=linear(4, 4), head=linear(3, 3), cell=lambda cls=cls: cls(4, 3, batch_first=True)
    )
    case(f"packed-{name}", do(packed, **parts), sequences, twin=do(ragged, **parts))


def steps(s: Any, x: Tensor) -> Tensor:
    h = None
    for t in range(x.shape[1]):
        h = s.cell(x[:, t], h)
    return s.head(h[0] if isinstance(h, tuple) else h)


for name, cls in (("rnn", nn.RNNCell), ("gru", nn.GRUCell), ("lstm", nn.LSTMCell)):
    glue(f"cell-{name}", steps, cell=lambda cls=cls: cls(4, 3), head=linear(3, 3))

# -- bare weights ----------------------------------------------------------------------------------

W, B = lambda o, i: lambda: r(o, i), lambda o: lambda: r(o)
act = torch.tanh


def functional(s: Any, x: Tensor) -> Tensor:
    return F.linear(act(F.linear(act(F.linear(x, s.w1, s.b1)), s.w2)), s.w3, s.b3)


glue("bare-mlp", functional, vectors, w1=W(5, 4), b1=B(5), w2=W(4, 5), w3=W(3, 4), b3=B(3))
glue(
    "bare-mlp-on-sequences",
    lambda s, x: functional(s, x).mean(1),
    w1=W(5, 4),
    b1=B(5),
    w2=W(4, 5),
    w3=W(3, 4),
    b3=B(3),
)
glue(
    "bare-transposed",
    lambda s, x: torch.addmm(s.b, act(x @ s.w1), s.w2),
    vectors,
    w1=W(4, 5),
    w2=W(5, 3),
    b=B(3),
)
glue("bare-both-ways", lambda s, x: act(act(x @ s.w) @ s.w.T) @ s.w, vectors, w=W(4, 3))
glue(
    "bare-used-twice-transposed",
    lambda s, x: act(act(x @ s.w) @ s.w) @ s.w[:, :3],
    vectors,
    w=W(4, 4),
)
glue(
    "bare-matrix-transpose",
    lambda s, x: F.linear(act(x @ s.w.transpose(-1, -2)), s.v.mT.mT),
    vectors,
    w=W(5, 4),
    v=W(3, 5),
)
glue(
    "bare-chunks",
    lambda s, x: (lambda a, b: F.linear(x, *a) * act(F.linear(act(x), *b)))(
        *zip(s.w.chunk(2), s.b.chunk(2), strict=True)
    ),
    vectors,
    w=W(6, 4),
    b=B(6),
)
glue(
    "bare-slices",
    lambda s, x: F.linear(x, s.w[:3], s.b[-3:]) + F.linear(act(x), s.w[3:-1], s.b[:3]),
    vectors,
    w=W(7, 4),
    b=B(7),
)
glue(
    "bare-slices-that-overlap",
    lambda s, x: F.linear(act(F.linear(x, s.w[:4], s.b[1:])), s.w[1:4], s.b[:3]),
    vectors,
    w=W(5, 4),
    b=B(5),
)
glue(
    "bare-slice-and-whole",
    lambda s, x: F.linear(act(F.linear(x, s.w, s.b)), s.w[:3], s.b[:3]),
    vectors,
    w=W(4, 4),
    b=B(4),
)
glue("bare-step", lambda s, x: F.linear(x, s.w[::2], s.b[::2]), vectors, w=W(6, 4), b=B(6))
glue(
    "bare-columns",
    lambda s, x: F.linear(act(x[:, :2]), s.w[:, :2]) + x @ s.w.T[:, :3],
    vectors,
    w=W(3, 4),
)
glue(
    "bare-split-sizes",
    lambda s, x: (lambda a, b: F.linear(act(F.linear(x, a)), b))(*s.w.split([4, 3])),
    vectors,
    w=W(7, 4),
)
glue(
    "bare-scaled-product",
    lambda s, x: torch.addmm(s.b, act(s.one(x)), s.w, beta=0.5, alpha=2.0),
    vectors,
    one=linear(4, 4),
    w=W(4, 3),
    b=B(3),
)
glue(
    "bare-computed",
    lambda s, x: F.linear(act(F.linear(x, s.w * 2, s.b)), s.v, s.b.sum() * s.c),
    vectors,
    w=W(5, 4),
    b=B(5),
    v=W(3, 5),
    c=B(3),
)
glue(
    "bare-low-rank",
    lambda s, x: s.head(act(s.one(x) + x @ s.a.T @ s.b.T)),
    vectors,
    one=linear(4, 4),
    a=W(2, 4),
    b=W(4, 2),
    head=linear(4, 3),
)
glue(
    "bare-low-rank-merged",
    lambda s, x: F.linear(act(s.one(x)), s.w + s.b @ s.a),
    vectors,
    one=linear(4, 4),
    w=W(3, 4),
    a=W(2, 4),
    b=W(3, 2),
)
glue(
    "bare-on-bare",
    lambda s, x: act(s.one(x)) @ F.linear(s.table, s.w),
    vectors,
    one=linear(4, 4),
    table=W(4, 5),
    w=W(3, 5),
)
glue(
    "bare-on-a-constant",
    lambda s, x: s.head(act(s.one(x) + F.linear(torch.eye(4).to(x), s.w, s.b))).mean(1),
    one=linear(4, 4),
    w=W(4, 4),
    b=B(4),
    head=linear(4, 3),
)
glue(
    "bare-table-of-classes",
    lambda s, x: act(s.one(x)) * F.linear(s.table, s.w)[torch.tensor([0, 1, 1])],
    vectors,
    one=linear(4, 3),
    table=W(2, 4),
    w=W(3, 4),
)
glue(
    "bare-and-layer-share",
    lambda s, x: F.linear(act(s.one(act(x))), s.one.weight[:3], s.one.bias[:3]),
    vectors,
    one=linear(4, 4),
)
glue(
    "bare-frozen-bias",
    lambda s, x: F.linear(act(s.one(x)), s.w, s.b.detach()),
    vectors,
    one=linear(4, 4),
    w=W(3, 4),
    b=B(3),
)
glue(
    "bare-frozen-weight",
    lambda s, x: F.linear(act(s.one(x)), s.w.detach(), s.b),
    vectors,
    one=linear(4, 4),
    w=W(3, 4),
    b=B(3),
)
glue(
    "bare-vector",
    lambda s, x: torch.stack([act(x) @ s.v, x @ s.v, x @ s.u], 1),
    vectors,
    v=B(4),
    u=B(4),
)
glue(
    "bare-one-row",
    lambda s, x: torch.stack([F.linear(row, s.w, s.b) for row in act(s.one(x))]),
    vectors,
    one=linear(4, 4),
    w=W(3, 4),
    b=B(3),
)
glue(
    "bare-batched-product",
    lambda s, x: torch.bmm(act(s.one(x)), s.w.expand(len(x), -1, -1)).mean(1),
    one=linear(4, 4),
    w=W(4, 3),
)
checkpointed(
    "bare-checkpointed", functional, vectors, w1=W(5, 4), b1=B(5), w2=W(4, 5), w3=W(3, 4), b3=B(3)
)


def convolved(s: Any, x: Tensor) -> Tensor:
    z = torch.tanh(F.conv2d(x, s.w1, s.b1, stride=(2, 1), padding=(1, 2), dilation=(1, 2)))
    z = torch.tanh(F.conv2d(z, s.w2, None, padding=1, groups=2))
    return F.conv1d(
        F.conv1d(z.flatten(2), s.w3, s.b3, stride=2, padding=1, dilation=2), s.w3, s.b3
    ).mean(2)


def small_images() -> tuple[Any, ...]:
    return r(N, 2, 4, 4), classes(N, 2)


W4 = lambda *shape: lambda: r(*shape)
glue(
    "bare-convolutions",
    convolved,
    small_images,
    w1=W4(4, 2, 3, 2),
    b1=B(4),
    w2=W4(2, 2, 2, 3),
    w3=W4(2, 2, 3),
    b3=B(2),
)
glue(
    "bare-convolutions-behind-a-layer",
    lambda s, x: convolved(s, s.one(x)),
    small_images,
    one=linear(4, 4),
    w1=W4(4, 2, 3, 2),
    b1=B(4),
    w2=W4(2, 2, 2, 3),
    w3=W4(2, 2, 3),
    b3=B(2),
)
glue(
    "bare-convolution-computed",
    lambda s, x: F.conv2d(act(F.conv2d(s.one(x), s.w1 * 2, s.b1)), s.w2, s.b2 + 1).mean((2, 3)),
    small_images,
    one=linear(4, 4),
    w1=W4(2, 2, 2, 2),
    b1=B(2),
    w2=W4(2, 2, 1, 2),
    b2=B(2),
)
glue(
    "bare-convolution-in-three-axes",
    lambda s, x: F.conv3d(act(s.one(x))[:, :, None], s.w).mean((2, 3, 4)),
    small_images,
    one=linear(4, 4),
    w=W4(2, 2, 1, 2, 2),
)
glue(
    "bare-tied-with-an-embedding",
    lambda s, i: F.linear(act(s.table(i) @ s.w), s.table.weight).transpose(1, 2),
    tokens,
    table=lambda: nn.Embedding(5, 4),
    w=W(4, 4),
)
glue(
    "bare-rows-and-columns-of-an-embedding",
    lambda s, i: (F.linear(act(s.table(i)), s.table.weight[:4]) @ s.table.weight.T).transpose(1, 2),
    tokens,
    table=lambda: nn.Embedding(5, 4),
)
case(
    "bare-token-major",
    do(
        lambda s, x: F.linear(act(F.linear(x.transpose(0, 1), s.w, s.b)), s.v).mean(0),
        w=W(5, 4),
        b=B(5),
        v=W(3, 5),
    ),
    sequences,
)
case(
    "bare-rows-of-tokens",
    do(functional, w1=W(5, 4), b1=B(5), w2=W(4, 5), w3=W(3, 4), b3=B(3)),
    lambda: (r(N, 4, 4), classes(4 * N)),
    lambda m, l, x, y: l(m(x).view(-1, 3), y),
)
case(
    "bare-rows-of-tokens-token-major",
    do(
        lambda s, x: functional(s, x.transpose(0, 1).reshape(-1, 4)),
        w1=W(5, 4),
        b1=B(5),
        w2=W(4, 5),
        w3=W(3, 4),
        b3=B(3),
    ),
    lambda: (r(N, 4, 4), classes()),
    lambda m, l, x, y: l(m(x).view(4, N, 3).mean(0), y),
)

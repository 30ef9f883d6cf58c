"""Rows: architectures as people write them, operations between modules, bare parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases.table import (
    N,
    case,
    classes,
    distances,
    distances_by_hand,
    do,
    images,
    linear,
    r,
    sequences,
    settled,
    tokens,
    vectors,
)

# -- plain architectures ---------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, i: int = 4, h: int = 3, o: int = 3):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(i, h), nn.Linear(h, h), nn.Linear(h, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.sigmoid(self.two(torch.tanh(self.one(x)))))


class ResidualBlock(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = (
            nn.Conv2d(2, 2, 3, stride=2),
            nn.Sequential(ResidualBlock(2), ResidualBlock(2)),
        )
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c0, self.c1, self.c2 = (
            nn.Conv2d(2, 2, 1),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(3, 1, 3, padding=1),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.c0(x)]
        for layer in (self.c1, self.c2):
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.head(F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


class UNet(nn.Module):
    """For each pixel its class."""

    def __init__(self, mode: str = "nearest"):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode=mode)
        self.up1, self.out = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down1(x))
        b = torch.relu(self.down2(self.pool(a)))
        return self.out(torch.relu(self.up1(torch.cat([self.up(b), a], 1))))


class Attention(nn.Module):
    def __init__(
        self, d: int, heads: int, causal: bool = False, dropout: float = 0.0, by_hand: bool = False
    ):
        super().__init__()
        self.by_hand = by_hand
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads
        self.causal, self.dropout = causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(n, t, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        # with dropout, torch.func draws another mask in scaled_dot_product_attention
        if self.by_hand:
            a = F.dropout((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), self.dropout) @ v
        else:
            a = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, dropout_p=self.dropout
            )
        return self.out(a.transpose(1, 2).reshape(n, t, d))


class HandAttention(nn.Module):
    """The same in matmul and softmax, with weights that are dropped."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v, self.drop = (
            nn.Linear(d, d),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d),
            nn.Dropout(0.3),
        )

    def forward(self, x: Tensor) -> Tensor:
        w = self.q(x) @ self.k(x).transpose(-2, -1) / math.sqrt(x.shape[-1])
        return self.drop(w.softmax(-1)) @ self.v(x)


class Block(nn.Module):
    def __init__(self, d: int = 4, heads: int = 2, **options: Any):
        super().__init__()
        self.norm1, self.attention, self.norm2 = (
            nn.LayerNorm(d),
            Attention(d, heads, **options),
            nn.LayerNorm(d),
        )
        self.mlp = nn.Sequential(nn.Linear(d, 3), nn.GELU(), nn.Linear(3, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A class token, learned positions, a pre-norm block with a scale for each channel
    (layer scale).
    """

    def __init__(self, d: int = 4):
        super().__init__()
        self.patch = nn.Linear(d, d)
        self.token, self.places = (
            nn.Parameter(torch.zeros(1, 1, d)),
            nn.Parameter(torch.zeros(1, 5, d)),
        )
        self.gamma = nn.Parameter(torch.ones(d))
        self.norm, self.attention = nn.LayerNorm(d), Attention(d, 2)
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = x + self.gamma * self.attention(self.norm(x))
        return self.head(x[:, 0])


class ContiguousDropout(nn.Dropout):
    """torch draws another mask for other strides, which are others under torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def encoder_with_dropout() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.2, batch_first=True, norm_first=True)
    layer.self_attn.dropout = 0.0
    layer.dropout1, layer.dropout2 = ContiguousDropout(0.2), ContiguousDropout(0.2)
    return layer


class LM(nn.Module):
    """A language model with embedded positions and one table for embedding and head."""

    def __init__(self, tied: bool = True, v: int = 5, d: int = 4):
        super().__init__()
        self.wte, self.wpe, self.block = (
            nn.Embedding(v, d),
            nn.Embedding(4, d),
            Block(d, 2, causal=True),
        )
        self.head = nn.Linear(d, v, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.block(self.wte(i) + self.wpe(torch.arange(i.shape[1]))))


case("linear", linear(4, 3), vectors)
case("mlp", MLP, vectors)
case("mlp-one-sample", MLP, lambda: (r(1, 4), classes(1)))
case("mlp-many-samples", MLP, lambda: (r(9, 4), classes(9)))
case("mlp-batch-as-wide-as-layers", lambda: MLP(3, 3, 3), lambda: (r(3, 3), classes(3)))
case(
    "mlp-one-output",
    lambda: MLP(o=1),
    lambda: (r(N, 4), r(N)),
    lambda m, l, x, y: l(m(x).squeeze(-1), y),
    nn.MSELoss,
)
case("mlp-input-requires-grad", MLP, lambda: (r(N, 4).requires_grad_(), classes()))
case(
    "mlp-last-axes",
    MLP,
    lambda: (r(N, 2, 2, 4), classes(N, 3, 2, 2)),
    lambda m, l, x, y: l(m(x).movedim(-1, 1), y),
)
case(
    "cnn",
    lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    ),
    images,
)
case(
    "cnn-pooling",
    lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Tanh(),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(2, 2, 3, dilation=2, padding=2, groups=2),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(18, 3),
    ),
    images,
)
case(
    "cnn-padding-modes",
    lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"),
        nn.Softplus(),
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"),
        nn.Flatten(),
        nn.Linear(32, 2),
    ),
    lambda: (r(N, 2, 4, 4), classes(N, 2)),
)
case(
    "cnn-batch-as-many-as-channels",
    lambda: nn.Sequential(
        nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 2)
    ),
    lambda: (r(2, 2, 4, 4), classes(2, 2)),
)
case("residual-inplace", lambda: settled(ResNet()), images)
case(
    "batchnorm-eval",
    lambda: settled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))),
    vectors,
)
case(
    "batchnorm-eval-frozen-affine",
    lambda: settled(
        nn.Sequential(
            nn.Conv2d(2, 2, 2),
            nn.BatchNorm2d(2, affine=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(18, 3),
        )
    ),
    images,
)
case("densenet", DenseNet, images)
case("unet", UNet, lambda: (r(2, 1, 4, 4), classes(2, 2, 4, 4)))
case("unet-bilinear", lambda: UNet("bilinear"), lambda: (r(2, 1, 4, 4), classes(2, 2, 4, 4)))
case("transformer", Transformer, sequences)
case(
    "transformer-samples-as-many-as-tokens-and-channels",
    lambda: nn.Sequential(Block(), nn.Flatten(), nn.Linear(16, 3)),
    lambda: (r(4, 4, 4), classes(4)),
)
case(
    "attention-by-hand",
    do(
        lambda s, x: s.head(s.attention(x).mean(1)),
        attention=lambda: HandAttention(4),
        head=linear(4, 3),
    ),
    sequences,
)
case(
    "transformer-encoder-layer",
    lambda: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    sequences,
)
case(
    "transformer-encoder-norm-first-dropout",
    lambda: nn.Sequential(encoder_with_dropout(), nn.Flatten(), nn.Linear(16, 3)),
    sequences,
)
case(
    "attention-dropout",
    lambda: nn.Sequential(Attention(4, 2, dropout=0.4), nn.Flatten(), nn.Linear(16, 3)),
    sequences,
    twin=lambda: nn.Sequential(
        Attention(4, 2, dropout=0.4, by_hand=True), nn.Flatten(), nn.Linear(16, 3)
    ),
)
case(
    "transformer-decoder-layer",
    do(
        lambda s, x: s.head(s.layer(x, torch.tanh(x[:, :2])).flatten(1)),
        layer=lambda: nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0, batch_first=True),
        head=linear(16, 3),
    ),
    sequences,
)
case("lm-tied", LM, tokens, lambda m, l, x, y: l(m(x).view(-1, 5), y.view(-1)))
case("lm-untied", lambda: LM(False), tokens, lambda m, l, x, y: l(m(x).view(-1, 5), y.view(-1)))
case("lm-transposed", LM, tokens, lambda m, l, x, y: l(m(x).transpose(1, 2), y))
case(
    "lm-shifted",
    LM,
    tokens,
    lambda m, l, x, y: l(m(x)[:, :-1].reshape(-1, 5), x[:, 1:].reshape(-1)),
)
case(
    "lm-ignored",
    LM,
    lambda: (tokens()[0], torch.where(r(N, 4) < 0, -100, tokens()[1])),
    lambda m, l, x, y: l(m(x).flatten(0, 1), y.flatten()),
)
case(
    "embedding-bag",
    lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, 3)),
    lambda: (tokens()[0], classes()),
)


# -- operations between modules --------------------------------------------------------------------


def glue(
    name: str, run: Callable[..., Any], data: Any = sequences, **parts: Callable[[], Any]
) -> None:
    case(name, do(run, **parts), data)


def in_slices(s: Any, x: Tensor) -> Tensor:
    h = s.one(x)
    h[:, :2] += 1.0
    h[:, 1:3] = torch.tanh(h[:, 1:3])
    h[:, 0] *= 2.0
    h[:, 0] += h[:, 3].exp()
    return s.head(h)


def in_place(s: Any, x: Tensor) -> Tensor:
    h = s.one(x)
    h.mul_(2.0).add_(s.shift)
    h[h > 2.0] = 0.0
    F.relu_(h)
    return s.head(h)


def into_buffer(s: Any, x: Tensor) -> Tensor:
    z = x.new_zeros(x.shape[0], 5, x.shape[2])
    z[:, 0] = s.token
    z[:, 1:] = s.one(x)
    return s.head(z.flatten(1))


def windows(s: Any, x: Tensor) -> Tensor:
    """Swin: roll, cut into windows, a layer on each, put together again."""
    n, c, h, w = x.shape
    x = torch.roll(x, (1, 1), (2, 3)).permute(0, 2, 3, 1)
    x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = s.attention(x)
    x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return s.head(x.flatten(1))


def loop(s: Any, x: Tensor) -> Tensor:
    """Each sample for itself, and without a batch axis."""
    return s.head(torch.stack([torch.tanh(s.one(row)) for row in x]))


def state_space(s: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 3)
    for t in range(x.shape[1]):
        h = torch.tanh(s.cell(h) + s.drive(x[:, t]))
    return s.head(h)


def spatial(s: Any, x: Tensor) -> Tensor:
    theta = s.where(x.flatten(1)).view(-1, 2, 3)
    return s.head(
        F.grid_sample(
            x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False
        ).flatten(1)
    )


glue(
    "functional-gelu-softmax",
    lambda s, x: s.head(F.softmax(F.gelu(s.one(x)), -1)),
    vectors,
    one=linear(4, 3),
    head=linear(3, 3),
)
glue(
    "view-permute",
    lambda s, x: s.head(s.one(x).view(-1, 2, 2, 4).permute(0, 3, 2, 1).reshape(len(x), -1)),
    one=linear(4, 4),
    head=linear(16, 3),
)
glue(
    "first-token",
    lambda s, x: s.head(torch.tanh(s.one(x))[:, 0]),
    one=linear(4, 3),
    head=linear(3, 3),
)
glue(
    "cat-and-stack",
    lambda s, x: s.head(
        torch.stack([torch.cat([s.one(x), x], 1), torch.cat([x, s.one(x)], 1)], -1).amax(-1)
    ),
    vectors,
    one=linear(4, 2),
    head=linear(6, 3),
)
glue(
    "broadcasting-plus",
    lambda s, x: s.head((s.one(x)[:, :, None] + s.two(x)[:, None] + s.bias).flatten(1)),
    vectors,
    one=linear(4, 2),
    two=linear(4, 3),
    bias=lambda: torch.zeros(2, 1),
    head=linear(6, 3),
)
glue("inplace-slices", in_slices, vectors, one=linear(4, 4), head=linear(4, 3))
glue(
    "inplace-on-output",
    in_place,
    vectors,
    one=linear(4, 3),
    shift=lambda: torch.zeros(3),
    head=linear(3, 3),
)
glue("into-buffer", into_buffer, one=linear(4, 4), token=lambda: torch.zeros(4), head=linear(20, 3))
glue(
    "chunk",
    lambda s, x: s.head(torch.tanh(s.one(x).chunk(2, -1)[0]) * s.one(x).chunk(2, -1)[1]),
    vectors,
    one=linear(4, 6),
    head=linear(3, 3),
)
glue(
    "squeeze-excite",
    lambda s, x: s.head(
        (s.conv(x) * torch.sigmoid(s.gate(x.mean((2, 3))))[:, :, None, None]).flatten(1)
    ),
    images,
    conv=lambda: nn.Conv2d(2, 2, 2),
    gate=linear(2, 2),
    head=linear(18, 3),
)
glue("windows", windows, images, attention=lambda: HandAttention(2).eval(), head=linear(32, 3))
glue(
    "patches",
    lambda s, x: s.head(torch.relu(s.one(F.unfold(x, 2, stride=2).transpose(1, 2))).mean(1)),
    images,
    one=linear(8, 3),
    head=linear(3, 3),
)
glue(
    "pixel-shuffle",
    lambda s, x: s.head(F.pixel_shuffle(s.conv(x), 2).flatten(1)),
    images,
    conv=lambda: nn.Conv2d(2, 4, 3),
    head=linear(16, 3),
)
glue(
    "pad-flip-cumsum",
    lambda s, x: s.head(
        torch.cumsum(F.pad(torch.flip(s.one(x), (1,)), (1, 1, 0, 2)), 1).flatten(1)
    ),
    one=linear(4, 2),
    head=linear(24, 3),
)
glue(
    "max-sort-topk",
    lambda s, x: s.head(
        torch.cat([s.one(x).max(1)[0], s.one(x).sort(1)[0][:, 1], s.one(x).topk(2, 1)[0][:, 1]], 1)
    ),
    one=linear(4, 2),
    head=linear(6, 3),
)
glue(
    "where-clamp-logsumexp",
    lambda s, x: s.head(torch.where(x > 0, s.one(x), s.one(x).clamp(-0.5, 0.5)).logsumexp(1)),
    one=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "gather-scatter",
    lambda s, x: s.head(
        torch.zeros(len(x), 6)
        .to(x)
        .scatter_add(
            1,
            torch.arange(4).flip(0).expand(len(x), 4),
            s.one(x).gather(1, torch.tensor([[2, 0, 0, 1]]).expand(len(x), 4)),
        )
    ),
    vectors,
    one=linear(4, 3),
    head=linear(6, 3),
)
glue(
    "normalise",
    lambda s, x: s.head(F.normalize(s.one(x), dim=-1)),
    vectors,
    one=linear(4, 3),
    head=linear(3, 3),
)
CENTRES = dict(one=linear(4, 2), centres=lambda: r(3, 2), head=linear(3, 3))
case("distances", do(distances, **CENTRES), vectors, twin=do(distances_by_hand, **CENTRES))
case(
    "distances-of-points",
    do(
        lambda s, x: s.head(torch.cdist(s.one(x), s.two(x)).flatten(1)),
        one=linear(4, 2),
        two=linear(4, 2),
        head=linear(16, 3),
    ),
    sequences,
    twin=do(
        lambda s, x: s.head(
            (s.one(x)[:, :, None] - s.two(x)[:, None]).square().sum(-1).sqrt().flatten(1)
        ),
        one=linear(4, 2),
        two=linear(4, 2),
        head=linear(16, 3),
    ),
)
glue(
    "einsum-ensemble",
    lambda s, x: torch.einsum(
        "enh,eho->eno", torch.tanh(torch.einsum("nd,edh->enh", s.one(x), s.w1)), s.w2
    ).mean(0),
    vectors,
    one=linear(4, 2),
    w1=lambda: r(2, 2, 2),
    w2=lambda: r(2, 2, 3),
)
glue(
    "hypernetwork",
    lambda s, x: torch.bmm(s.hyper(x).view(-1, 3, 4), torch.tanh(s.one(x))[:, :, None]).squeeze(-1),
    vectors,
    hyper=linear(4, 12),
    one=linear(4, 4),
)
glue(
    "fft",
    lambda s, x: s.head(torch.fft.rfft(s.one(x)).abs()),
    vectors,
    one=linear(4, 4),
    head=linear(3, 3),
)
glue("grid-sample", spatial, images, where=linear(32, 6), head=linear(32, 3))
glue("loop-over-samples", loop, vectors, one=linear(4, 3), head=linear(3, 3))
glue(
    "loop-over-samples-square",
    loop,
    lambda: (r(3, 3), classes()),
    one=linear(3, 3),
    head=linear(3, 3),
)
glue(
    "loop-over-images",
    lambda s, x: s.head(torch.stack([s.conv(image).flatten() for image in x])),
    lambda: (r(2, 2, 3, 3), classes(2)),
    conv=lambda: nn.Conv2d(2, 2, 2),
    head=linear(8, 3),
)
glue(
    "loop-over-slices",
    lambda s, x: s.head(torch.cat([s.block(x[i : i + 1]) for i in range(len(x))]).flatten(1)),
    block=lambda: Block(),
    head=linear(16, 3),
)
glue(
    "recurrence-by-hand",
    state_space,
    cell=linear(3, 3),
    drive=linear(4, 3, bias=False),
    head=linear(3, 3),
)
glue(
    "graph-network",
    lambda s, x: s.head(
        (torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]]).to(x) @ torch.relu(s.one(x))).sum(1)
    ),
    lambda: (r(N, 3, 4), classes()),
    one=linear(4, 3),
    head=linear(3, 3),
)
glue(
    "lambda-scalars",
    lambda s, x: s.head(x * s.scale.exp()) / s.temperature + s.shift * s.scale,
    vectors,
    scale=lambda: torch.tensor(0.3),
    temperature=lambda: torch.tensor(1.7),
    shift=lambda: torch.tensor([0.2]),
    head=linear(4, 3),
)
glue(
    "vmap-inside",
    lambda s, x: s.head(torch.vmap(lambda row: torch.tanh(row @ s.w))(x)),
    vectors,
    w=lambda: r(4, 3),
    head=linear(3, 3),
)

# -- bare parameters -------------------------------------------------------------------------------

glue(
    "bare-alone",
    lambda s, x: torch.tanh(x @ s.w1 + s.b1) @ s.w2,
    vectors,
    w1=lambda: r(4, 3),
    b1=lambda: r(3),
    w2=lambda: r(3, 3),
)
glue(
    "class-token-and-places",
    lambda s, x: s.head(
        torch.tanh(s.one(torch.cat([s.token.expand(len(x), -1, -1), x], 1) + s.places)).mean(1)
    ),
    token=lambda: r(1, 1, 4),
    places=lambda: r(5, 4),
    one=linear(4, 3),
    head=linear(3, 3),
)
glue(
    "class-token-repeat",
    lambda s, x: s.block(torch.cat([s.token.repeat(len(x), 1, 1), x], 1))[:, 0, :3],
    block=Block,
    token=lambda: r(1, 1, 4),
)
glue(
    "layer-scale",
    lambda s, x: s.head(x + s.gamma * torch.tanh(s.one(x))),
    vectors,
    gamma=lambda: r(4),
    one=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "learned-queries",
    lambda s, x: s.head(
        F.scaled_dot_product_attention(
            s.q.expand(len(x), 1, 2, 4), s.k(x)[:, None], s.v(x)[:, None]
        ).flatten(1)
    ),
    q=lambda: r(1, 1, 2, 4),
    k=linear(4, 4),
    v=linear(4, 4),
    head=linear(8, 3),
)
glue(
    "learned-queries-through-a-layer",
    lambda s, x: s.head((s.q(s.queries) @ s.k(x).mT).softmax(-1) @ x).mean(1),
    queries=lambda: r(2, 4),
    q=linear(4, 4),
    k=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "parameter-through-layers",
    lambda s, x: s.head(s.two(torch.tanh(s.one(s.code))) + x),
    vectors,
    code=lambda: r(1, 3),
    one=linear(3, 3),
    two=linear(3, 4),
    head=linear(4, 3),
)
glue(
    "parameter-as-many-as-samples",
    lambda s, x: s.head((s.one(s.code) @ x.mT).mT) + s.one(x)[:, :3],
    vectors,
    code=lambda: r(3, 4),
    one=linear(4, 4),
    head=linear(3, 3),
)
glue(
    "functional-layers",
    lambda s, x: F.linear(
        F.layer_norm(F.conv1d(x, s.conv, padding=1), (4,), s.g, s.b).flatten(1), s.w
    ),
    conv=lambda: r(2, 4, 3),
    g=lambda: r(4),
    b=lambda: r(4),
    w=lambda: r(3, 8),
)
glue(
    "functional-conv-norm",
    lambda s, x: F.linear(
        F.prelu(F.group_norm(F.conv2d(x, s.conv, s.b), 2, s.g, s.g), s.a).flatten(1), s.w
    ),
    images,
    conv=lambda: r(2, 2, 3, 3),
    b=lambda: r(2),
    g=lambda: r(2),
    a=lambda: r(2).abs(),
    w=lambda: r(3, 8),
)
glue(
    "functional-embedding",
    lambda s, x: s.head(F.embedding(x, s.table).tanh().mean(1)),
    lambda: (tokens()[0], classes()),
    table=lambda: r(5, 3),
    head=linear(3, 3),
)
glue(
    "indexed-parameter",
    lambda s, x: s.head(torch.tanh(s.table[x]).sum(1) + s.table.mean(0)),
    lambda: (tokens()[0], classes()),
    table=lambda: r(5, 3),
    head=linear(3, 3),
)
glue(
    "lora",
    lambda s, x: s.one(x) + x @ s.a @ s.b,
    vectors,
    one=lambda: nn.Linear(4, 3).requires_grad_(False),
    a=lambda: r(4, 1),
    b=lambda: r(1, 3),
)
glue(
    "parameter-list",
    lambda s, x: s.head(sum(torch.tanh(x @ w) for w in s.ws)),
    vectors,
    ws=lambda: nn.ParameterList([nn.Parameter(r(4, 2)), nn.Parameter(r(4, 2))]),
    head=linear(2, 3),
)
glue(
    "parameter-dict",
    lambda s, x: x @ s.ws["w"] + s.ws["b"],
    vectors,
    ws=lambda: nn.ParameterDict({"w": nn.Parameter(r(4, 3)), "b": nn.Parameter(r(3))}),
)

"""One table of models, losses and ways to call them: (user code, data, loss). Everything is tiny; tests are products over it."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

N = 3
r = torch.randn


def classes(n: int = N, c: int = 3, *more: int) -> Tensor:
    return torch.randint(c, (n, *more))


def in_order(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """As many rows for each sample, one behind the other."""
    n = len(data[0])
    return [torch.arange(len(t)) // (len(t) // n) for t in outs]


def every(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Row r belongs to sample r modulo the number of samples (token-major rows, concatenated views)."""
    n = len(data[0])
    return [torch.arange(len(t)) % n for t in outs]


def one_behind_the_other(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Each call of the loss has samples of its own."""
    found, start = [], 0
    for t in outs:
        found.append(torch.arange(start, start + len(t)))
        start += len(t)
    return found


def by_loss(outs: list[Tensor], data: tuple[Any, ...]) -> list[Tensor]:
    """Rows of the loss are the samples."""
    return [torch.arange(len(t)) for t in outs]


def plain(m: Any, l: Any, x: Any, y: Any) -> Tensor:
    return l(m(x), y)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        make: the model.
        data: inputs and targets; the samples are in axis 0 of the first, unless `numbers` says otherwise.
        run: user code `run(model, loss, *data) -> scalar`; it may call both as often as it likes.
        loss: the loss, or a tuple of several, which `run` then gets as a tuple.
        twin: the same model with the same state dict, for torch.func, where it cannot take the model itself.
        numbers: for each output that a loss is given, in order, the number of the sample of each row.
        batch_axis: for nnj.extend.
        n: how many samples there are, where the last of them has no row.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Any, ...]]
    run: Callable[..., Tensor] = plain
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    twin: Callable[[], nn.Module] | None = None
    numbers: Callable[[list[Tensor], tuple[Any, ...]], list[Tensor]] = in_order
    batch_axis: int = 0
    n: int | None = None


CASES: dict[str, Case] = {}


EITHER: dict[str, Case] = {}  # to be exact, or to be refused


def case(name: str, make: Any, data: Any, *args: Any, table: dict[str, Case] = CASES, **kwargs: Any) -> None:
    assert name not in CASES and name not in EITHER, name
    table[name] = Case(name, make, data, *args, **kwargs)


class Do(nn.Module):
    """A model of named parts and a forward given as a function of (self, *inputs)."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            bare = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            setattr(self, name, nn.Parameter(part) if bare else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def do(run: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Do(run, **{name: part() for name, part in parts.items()})


def distances(s: Any, x: Tensor) -> Tensor:
    return s.head(torch.exp(-torch.cdist(s.one(x), s.centres)))


def distances_by_hand(s: Any, x: Tensor) -> Tensor:
    """torch.func of cdist is wrong: vmap of its backward."""
    return s.head(torch.exp(-(s.one(x)[:, None] - s.centres).square().sum(-1).sqrt()))


def linear(i: int, o: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, **options)


def vectors() -> tuple[Any, ...]:
    return r(N, 4), classes()


def images() -> tuple[Any, ...]:
    return r(N, 2, 4, 4), classes()


def sequences() -> tuple[Any, ...]:
    return r(N, 4, 4), classes()


def tokens() -> tuple[Any, ...]:
    return torch.randint(5, (N, 4)), torch.randint(5, (N, 4))


def settled(m: nn.Module) -> nn.Module:
    """Statistics of their own for norms, in eval mode."""
    for part in m.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return m.eval()


# -- plain architectures -----------------------------------------------------------------------------------------------

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
        self.stem, self.blocks = nn.Conv2d(2, 2, 3, stride=2), nn.Sequential(ResidualBlock(2), ResidualBlock(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c0, self.c1, self.c2 = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
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
    def __init__(self, d: int, heads: int, causal: bool = False, dropout: float = 0.0, by_hand: bool = False):
        super().__init__()
        self.by_hand = by_hand
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads
        self.causal, self.dropout = causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.by_hand:  # with dropout, torch.func draws another mask in scaled_dot_product_attention
            a = F.dropout((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), self.dropout) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout)
        return self.out(a.transpose(1, 2).reshape(n, t, d))


class HandAttention(nn.Module):
    """The same in matmul and softmax, with weights that are dropped."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v, self.drop = nn.Linear(d, d), nn.Linear(d, d, bias=False), nn.Linear(d, d), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.q(x) @ self.k(x).transpose(-2, -1) / math.sqrt(x.shape[-1])
        return self.drop(w.softmax(-1)) @ self.v(x)


class Block(nn.Module):
    def __init__(self, d: int = 4, heads: int = 2, **options: Any):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d, heads, **options), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 3), nn.GELU(), nn.Linear(3, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A class token, learned positions, a pre-norm block with a scale for each channel (layer scale)."""

    def __init__(self, d: int = 4):
        super().__init__()
        self.patch = nn.Linear(d, d)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 5, d))
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
        self.wte, self.wpe, self.block = nn.Embedding(v, d), nn.Embedding(4, d), Block(d, 2, causal=True)
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
case("mlp-one-output", lambda: MLP(o=1), lambda: (r(N, 4), r(N)), lambda m, l, x, y: l(m(x).squeeze(-1), y), nn.MSELoss)
case("mlp-input-requires-grad", MLP, lambda: (r(N, 4).requires_grad_(), classes()))
case("mlp-last-axes", MLP, lambda: (r(N, 2, 2, 4), classes(N, 3, 2, 2)), lambda m, l, x, y: l(m(x).movedim(-1, 1), y))
case("cnn", lambda: nn.Sequential(
    nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2, bias=False), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(), nn.Linear(3, 3)), images)
case("cnn-pooling", lambda: nn.Sequential(
    nn.Conv2d(2, 2, 3, padding="same"), nn.Tanh(), nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(2, 2, 3, dilation=2,
    padding=2, groups=2), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(18, 3)), images)
case("cnn-padding-modes", lambda: nn.Sequential(
    nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"),
    nn.Softplus(), nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"), nn.Flatten(), nn.Linear(32, 2)),
    lambda: (r(N, 2, 4, 4), classes(N, 2)))
case("cnn-batch-as-many-as-channels", lambda: nn.Sequential(
    nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 2)), lambda: (r(2, 2, 4, 4), classes(2, 2)))
case("residual-inplace", lambda: settled(ResNet()), images)
case("batchnorm-eval", lambda: settled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))), vectors)
case("batchnorm-eval-frozen-affine", lambda: settled(nn.Sequential(
    nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2, affine=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, 3))), images)
case("densenet", DenseNet, images)
case("unet", UNet, lambda: (r(2, 1, 4, 4), classes(2, 2, 4, 4)))
case("unet-bilinear", lambda: UNet("bilinear"), lambda: (r(2, 1, 4, 4), classes(2, 2, 4, 4)))
case("transformer", Transformer, sequences)
case("transformer-samples-as-many-as-tokens-and-channels", lambda: nn.Sequential(Block(), nn.Flatten(), nn.Linear(16, 3)),
     lambda: (r(4, 4, 4), classes(4)))
case("attention-by-hand", do(lambda s, x: s.head(s.attention(x).mean(1)), attention=lambda: HandAttention(4),
                             head=linear(4, 3)), sequences)
case("transformer-encoder-layer", lambda: nn.Sequential(
    nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(16, 3)), sequences)
case("transformer-encoder-norm-first-dropout", lambda: nn.Sequential(encoder_with_dropout(), nn.Flatten(), nn.Linear(16, 3)),
     sequences)
case("attention-dropout", lambda: nn.Sequential(Attention(4, 2, dropout=0.4), nn.Flatten(), nn.Linear(16, 3)), sequences,
     twin=lambda: nn.Sequential(Attention(4, 2, dropout=0.4, by_hand=True), nn.Flatten(), nn.Linear(16, 3)))
case("transformer-decoder-layer", do(lambda s, x: s.head(s.layer(x, torch.tanh(x[:, :2])).flatten(1)),
     layer=lambda: nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0, batch_first=True), head=linear(16, 3)), sequences)
case("lm-tied", LM, tokens, lambda m, l, x, y: l(m(x).view(-1, 5), y.view(-1)))
case("lm-untied", lambda: LM(False), tokens, lambda m, l, x, y: l(m(x).view(-1, 5), y.view(-1)))
case("lm-transposed", LM, tokens, lambda m, l, x, y: l(m(x).transpose(1, 2), y))
case("lm-shifted", LM, tokens, lambda m, l, x, y: l(m(x)[:, :-1].reshape(-1, 5), x[:, 1:].reshape(-1)))
case("lm-ignored", LM, lambda: (tokens()[0], torch.where(r(N, 4) < 0, -100, tokens()[1])),
     lambda m, l, x, y: l(m(x).flatten(0, 1), y.flatten()))
case("embedding-bag", lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, 3)),
     lambda: (tokens()[0], classes()))


# -- operations between modules ----------------------------------------------------------------------------------------

def glue(name: str, run: Callable[..., Any], data: Any = sequences, **parts: Callable[[], Any]) -> None:
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
    return s.head(F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False).flatten(1))


glue("functional-gelu-softmax", lambda s, x: s.head(F.softmax(F.gelu(s.one(x)), -1)), vectors,
     one=linear(4, 3), head=linear(3, 3))
glue("view-permute", lambda s, x: s.head(s.one(x).view(-1, 2, 2, 4).permute(0, 3, 2, 1).reshape(len(x), -1)),
     one=linear(4, 4), head=linear(16, 3))
glue("first-token", lambda s, x: s.head(torch.tanh(s.one(x))[:, 0]), one=linear(4, 3), head=linear(3, 3))
glue("cat-and-stack", lambda s, x: s.head(torch.stack([torch.cat([s.one(x), x], 1), torch.cat([x, s.one(x)], 1)], -1).amax(-1)),
     vectors, one=linear(4, 2), head=linear(6, 3))
glue("broadcasting-plus", lambda s, x: s.head((s.one(x)[:, :, None] + s.two(x)[:, None] + s.bias).flatten(1)), vectors,
     one=linear(4, 2), two=linear(4, 3), bias=lambda: torch.zeros(2, 1), head=linear(6, 3))
glue("inplace-slices", in_slices, vectors, one=linear(4, 4), head=linear(4, 3))
glue("inplace-on-output", in_place, vectors, one=linear(4, 3), shift=lambda: torch.zeros(3), head=linear(3, 3))
glue("into-buffer", into_buffer, one=linear(4, 4), token=lambda: torch.zeros(4), head=linear(20, 3))
glue("chunk", lambda s, x: s.head(torch.tanh(s.one(x).chunk(2, -1)[0]) * s.one(x).chunk(2, -1)[1]), vectors,
     one=linear(4, 6), head=linear(3, 3))
glue("squeeze-excite", lambda s, x: s.head((s.conv(x) * torch.sigmoid(s.gate(x.mean((2, 3))))[:, :, None, None]).flatten(1)),
     images, conv=lambda: nn.Conv2d(2, 2, 2), gate=linear(2, 2), head=linear(18, 3))
glue("windows", windows, images, attention=lambda: HandAttention(2).eval(), head=linear(32, 3))
glue("patches", lambda s, x: s.head(torch.relu(s.one(F.unfold(x, 2, stride=2).transpose(1, 2))).mean(1)), images,
     one=linear(8, 3), head=linear(3, 3))
glue("pixel-shuffle", lambda s, x: s.head(F.pixel_shuffle(s.conv(x), 2).flatten(1)), images,
     conv=lambda: nn.Conv2d(2, 4, 3), head=linear(16, 3))
glue("pad-flip-cumsum", lambda s, x: s.head(torch.cumsum(F.pad(torch.flip(s.one(x), (1,)), (1, 1, 0, 2)), 1).flatten(1)),
     one=linear(4, 2), head=linear(24, 3))
glue("max-sort-topk", lambda s, x: s.head(torch.cat([s.one(x).max(1)[0], s.one(x).sort(1)[0][:, 1], s.one(x).topk(2, 1)[0][:, 1]],
     1)), one=linear(4, 2), head=linear(6, 3))
glue("where-clamp-logsumexp", lambda s, x: s.head(torch.where(x > 0, s.one(x), s.one(x).clamp(-0.5, 0.5)).logsumexp(1)),
     one=linear(4, 4), head=linear(4, 3))
glue("gather-scatter", lambda s, x: s.head(torch.zeros(len(x), 6).to(x).scatter_add(
     1, torch.arange(4).flip(0).expand(len(x), 4), s.one(x).gather(1, torch.tensor([[2, 0, 0, 1]]).expand(len(x), 4)))),
     vectors, one=linear(4, 3), head=linear(6, 3))
glue("normalise", lambda s, x: s.head(F.normalize(s.one(x), dim=-1)), vectors, one=linear(4, 3), head=linear(3, 3))
CENTRES = dict(one=linear(4, 2), centres=lambda: r(3, 2), head=linear(3, 3))
case("distances", do(distances, **CENTRES), vectors, twin=do(distances_by_hand, **CENTRES))
case(
    "distances-of-points",
    do(lambda s, x: s.head(torch.cdist(s.one(x), s.two(x)).flatten(1)), one=linear(4, 2), two=linear(4, 2), head=linear(16, 3)),
    sequences,
    twin=do(
        lambda s, x: s.head((s.one(x)[:, :, None] - s.two(x)[:, None]).square().sum(-1).sqrt().flatten(1)),
        one=linear(4, 2),
        two=linear(4, 2),
        head=linear(16, 3),
    ),
)
glue("einsum-ensemble", lambda s, x: torch.einsum("enh,eho->eno", torch.tanh(torch.einsum("nd,edh->enh", s.one(x), s.w1)),
     s.w2).mean(0), vectors, one=linear(4, 2), w1=lambda: r(2, 2, 2), w2=lambda: r(2, 2, 3))
glue("hypernetwork", lambda s, x: torch.bmm(s.hyper(x).view(-1, 3, 4), torch.tanh(s.one(x))[:, :, None]).squeeze(-1), vectors,
     hyper=linear(4, 12), one=linear(4, 4))
glue("fft", lambda s, x: s.head(torch.fft.rfft(s.one(x)).abs()), vectors, one=linear(4, 4), head=linear(3, 3))
glue("grid-sample", spatial, images, where=linear(32, 6), head=linear(32, 3))
glue("loop-over-samples", loop, vectors, one=linear(4, 3), head=linear(3, 3))
glue("loop-over-samples-square", loop, lambda: (r(3, 3), classes()), one=linear(3, 3), head=linear(3, 3))
glue("loop-over-images", lambda s, x: s.head(torch.stack([s.conv(image).flatten() for image in x])),
     lambda: (r(2, 2, 3, 3), classes(2)), conv=lambda: nn.Conv2d(2, 2, 2), head=linear(8, 3))
glue("loop-over-slices", lambda s, x: s.head(torch.cat([s.block(x[i : i + 1]) for i in range(len(x))]).flatten(1)),
     block=lambda: Block(), head=linear(16, 3))
glue("recurrence-by-hand", state_space, cell=linear(3, 3), drive=linear(4, 3, bias=False), head=linear(3, 3))
glue(
    "graph-network",
    lambda s, x: s.head((torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]]).to(x) @ torch.relu(s.one(x))).sum(1)),
    lambda: (r(N, 3, 4), classes()),
    one=linear(4, 3),
    head=linear(3, 3),
)
glue("lambda-scalars", lambda s, x: s.head(x * s.scale.exp()) / s.temperature + s.shift * s.scale, vectors,
     scale=lambda: torch.tensor(0.3), temperature=lambda: torch.tensor(1.7), shift=lambda: torch.tensor([0.2]), head=linear(4, 3))
glue("vmap-inside", lambda s, x: s.head(torch.vmap(lambda row: torch.tanh(row @ s.w))(x)), vectors, w=lambda: r(4, 3),
     head=linear(3, 3))

# -- bare parameters ---------------------------------------------------------------------------------------------------

glue("bare-alone", lambda s, x: torch.tanh(x @ s.w1 + s.b1) @ s.w2, vectors, w1=lambda: r(4, 3), b1=lambda: r(3),
     w2=lambda: r(3, 3))
glue("class-token-and-places", lambda s, x: s.head(torch.tanh(s.one(torch.cat(
     [s.token.expand(len(x), -1, -1), x], 1) + s.places)).mean(1)), token=lambda: r(1, 1, 4), places=lambda: r(5, 4),
     one=linear(4, 3), head=linear(3, 3))
glue("class-token-repeat", lambda s, x: s.block(torch.cat([s.token.repeat(len(x), 1, 1), x], 1))[:, 0, :3], block=Block,
     token=lambda: r(1, 1, 4))
glue("layer-scale", lambda s, x: s.head(x + s.gamma * torch.tanh(s.one(x))), vectors, gamma=lambda: r(4), one=linear(4, 4),
     head=linear(4, 3))
glue("learned-queries", lambda s, x: s.head(F.scaled_dot_product_attention(
     s.q.expand(len(x), 1, 2, 4), s.k(x)[:, None], s.v(x)[:, None]).flatten(1)), q=lambda: r(1, 1, 2, 4), k=linear(4, 4),
     v=linear(4, 4), head=linear(8, 3))
glue("learned-queries-through-a-layer", lambda s, x: s.head((s.q(s.queries) @ s.k(x).mT).softmax(-1) @ x).mean(1),
     queries=lambda: r(2, 4), q=linear(4, 4), k=linear(4, 4), head=linear(4, 3))
glue("parameter-through-layers", lambda s, x: s.head(s.two(torch.tanh(s.one(s.code))) + x), vectors, code=lambda: r(1, 3),
     one=linear(3, 3), two=linear(3, 4), head=linear(4, 3))
glue("parameter-as-many-as-samples", lambda s, x: s.head((s.one(s.code) @ x.mT).mT) + s.one(x)[:, :3], vectors,
     code=lambda: r(3, 4), one=linear(4, 4), head=linear(3, 3))
glue("functional-layers", lambda s, x: F.linear(F.layer_norm(F.conv1d(x, s.conv, padding=1), (4,), s.g, s.b).flatten(1), s.w),
     conv=lambda: r(2, 4, 3), g=lambda: r(4), b=lambda: r(4), w=lambda: r(3, 8))
glue(
    "functional-conv-norm",
    lambda s, x: F.linear(F.prelu(F.group_norm(F.conv2d(x, s.conv, s.b), 2, s.g, s.g), s.a).flatten(1), s.w),
    images,
    conv=lambda: r(2, 2, 3, 3),
    b=lambda: r(2),
    g=lambda: r(2),
    a=lambda: r(2).abs(),
    w=lambda: r(3, 8),
)
glue("functional-embedding", lambda s, x: s.head(F.embedding(x, s.table).tanh().mean(1)), lambda: (tokens()[0], classes()),
     table=lambda: r(5, 3), head=linear(3, 3))
glue("indexed-parameter", lambda s, x: s.head(torch.tanh(s.table[x]).sum(1) + s.table.mean(0)), lambda: (tokens()[0], classes()),
     table=lambda: r(5, 3), head=linear(3, 3))
glue("lora", lambda s, x: s.one(x) + x @ s.a @ s.b, vectors, one=lambda: nn.Linear(4, 3).requires_grad_(False),
     a=lambda: r(4, 1), b=lambda: r(1, 3))
glue("parameter-list", lambda s, x: s.head(sum(torch.tanh(x @ w) for w in s.ws)), vectors,
     ws=lambda: nn.ParameterList([nn.Parameter(r(4, 2)), nn.Parameter(r(4, 2))]), head=linear(2, 3))
glue("parameter-dict", lambda s, x: x @ s.ws["w"] + s.ws["b"], vectors,
     ws=lambda: nn.ParameterDict({"w": nn.Parameter(r(4, 3)), "b": nn.Parameter(r(3))}))

# -- used more than once -----------------------------------------------------------------------------------------------

def tied_linears() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def shared_bias() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    model[3].bias = model[0].bias
    return model


glue("called-twice", lambda s, x: s.head(s.one(torch.tanh(s.one(x)))), vectors, one=linear(4, 4), head=linear(4, 3))
glue("called-twice-in-parallel", lambda s, x: s.head(s.one(x[:, :2]) * s.one(x[:, 2:])), vectors, one=linear(2, 3),
     head=linear(3, 3))
glue("called-on-several-lengths", lambda s, x: s.head(s.one(x).sum(1) + s.one(x[:, 0]) + s.one(x[:, 1:3]).prod(1)),
     one=linear(4, 3), head=linear(3, 3))
glue("block-called-twice", lambda s, x: s.head(s.block(s.block(x)).flatten(1)), block=Block, head=linear(16, 3))
glue("conv-called-twice", lambda s, x: s.head(s.conv(torch.tanh(s.conv(x))).flatten(1)), images,
     conv=lambda: nn.Conv2d(2, 2, 3, padding=1), head=linear(32, 3))
glue("batchnorm-called-twice", lambda s, x: s.head(s.bn(torch.tanh(s.bn(x)))), vectors,
     bn=lambda: settled(nn.BatchNorm1d(4)), head=linear(4, 3))
glue("module-and-its-weight", lambda s, x: s.one(x) @ s.one.weight + s.one.bias.sum(), lambda: (r(N, 3), classes()),
     one=linear(3, 3))
glue("autoencoder-tied", lambda s, x: F.linear(torch.tanh(s.one(x)), s.one.weight.t())[:, :3], vectors, one=linear(4, 2))
case("tied-linears", tied_linears, vectors)
case("shared-bias", shared_bias, lambda: (r(N, 2, 4, 4), classes(N, 2)))
case("siamese-in-loss", MLP, lambda: (r(N, 4), r(N, 4)), lambda m, l, a, b: l(m(a), m(b)), nn.MSELoss)
case("siamese-function", MLP, lambda: (r(N, 4), r(N, 4), r(N).abs()), lambda m, l, a, b, t: l(m(a), m(b), t),
     lambda: lambda a, b, t: (t * ((a - b) ** 2).sum(1)).mean())
glue("siamese-in-model", lambda s, x: s.head((s.net(x[:, :4]) - s.net(x[:, 4:])) ** 2), lambda: (r(N, 8), classes()), net=MLP,
     head=linear(3, 3))

# -- inputs and outputs ------------------------------------------------------------------------------------------------

glue("identity-and-eval-dropout", lambda s, x: s.head(s.id(s.drop(s.one(x)))), vectors, one=linear(4, 3), id=nn.Identity,
     drop=lambda: nn.Dropout().eval(), head=linear(3, 3))
case("two-inputs", do(lambda s, a, b: s.head(s.one(a) * s.two(b)), one=linear(4, 3), two=linear(2, 3), head=linear(3, 3)),
     lambda: (r(N, 4), r(N, 2), classes()), lambda m, l, a, b, y: l(m(a, b), y))
case("two-inputs-by-name", do(lambda s, a, b: s.head(torch.cat([s.one(a), s.two(b).flatten(1)], 1)), one=linear(4, 2),
     two=lambda: nn.Embedding(5, 2), head=linear(6, 3)), lambda: (r(N, 4), torch.randint(5, (N, 2)), classes()),
     lambda m, l, a, b, y: l(m(b=b, a=a), y))
case("bilinear", do(lambda s, a, b: s.head(s.both(a, b)), both=lambda: nn.Bilinear(3, 2, 2), head=linear(2, 3)),
     lambda: (r(N, 3), r(N, 2), classes()), lambda m, l, a, b, y: l(m(a, b), y))
case("dict-output", do(lambda s, x: {"hidden": s.one(x), "logits": s.head(torch.tanh(s.one(x)))}, one=linear(4, 3),
     head=linear(3, 3)), vectors, lambda m, l, x, y: l(m(x)["logits"], y))
case("object-output", do(lambda s, x: SimpleNamespace(logits=s.head(torch.tanh(s.one(x)))), one=linear(4, 3), head=linear(3, 3)),
     vectors, lambda m, l, x, y: l(m(x).logits, y))
case("loss-on-a-part", MLP, vectors, lambda m, l, x, y: l(m(x)[:, :2], y % 2))
case("unreached-branch", do(lambda s, x: (s.head(torch.tanh(s.one(x))), s.aside(s.one(x))), one=linear(4, 3), head=linear(3, 3),
     aside=linear(3, 2), never=linear(2, 2)), vectors, lambda m, l, x, y: l(m(x)[0], y))
case("detached-branch", do(lambda s, x: s.head(s.one(x) + s.two(x).detach()), one=linear(4, 3), two=linear(4, 3),
     head=linear(3, 3)), vectors)

# -- checkpoints, subclasses, parametrizations, autograd functions -----------------------------------------------------

class Checkpointed(nn.Module):
    """`how`: none, whole (each block), or sequential."""

    def __init__(self, how: str, drop: float = 0.0):
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(drop), nn.Linear(3, 4), nn.ReLU(inplace=True))
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            return self.body(t) * self.scale + t

        if self.how == "whole":
            h = checkpoint(part, checkpoint(part, x, use_reentrant=False), use_reentrant=False)
        elif self.how == "sequential":
            h = checkpoint_sequential(self.body, 2, checkpoint_sequential(self.body, 2, x, use_reentrant=False) * self.scale,
                                      use_reentrant=False)
        elif self.how == "plain-sequential":
            h = self.body(self.body(x) * self.scale)
        else:
            h = part(part(x))
        return self.head(h)


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(torch.tanh(x)) - x.sum(-1, keepdim=True)


class LoraLinear(nn.Linear):
    """A subclass with parameters and children of its own."""

    def __init__(self, i: int, o: int):
        super().__init__(i, o)
        self.down, self.up = nn.Linear(i, 1, bias=False), nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(x) * self.up


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias)


class GatedSigmoid(nn.Sigmoid):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gate)


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


class EqualisedLinear(nn.Linear):
    """A subclass whose weight is not its parameter of that name, under the forward of its parent."""

    def reset_parameters(self) -> None:
        for p in self._parameters.values():
            nn.init.normal_(p)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2.0 * self.__getattr__("weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight", value)


class EqualisedTwin(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2.0 * self.weight, self.bias)


class PositiveLinear(nn.Linear):
    """A subclass without the parameter of its parent."""

    def __init__(self, i: int, o: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = i, o
        self.raw, self.bias = nn.Parameter(r(o, i)), nn.Parameter(r(o))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw.exp()


def instance_forward() -> nn.Module:
    model = MLP()
    two = model.two
    two.forward = lambda x: F.linear(x, two.weight ** 2, two.bias) + x  # type: ignore[method-assign]
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


def spectral_normed() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).eval()


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def symmetric() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


class SquareFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * (x.sin() + x * x.cos())


class NumpyFunction(torch.autograd.Function):
    """It leaves torch, so that neither vmap nor torch.func can follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() * w.detach().numpy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        gx = torch.from_numpy(g.detach().numpy() * w.detach().numpy())
        gw = torch.from_numpy((g.detach().numpy() * x.detach().numpy()).sum(0))
        return gx, gw


class TwoFunction(torch.autograd.Function):
    """Two outputs, one of which may not be used; None arrives at `materialize_grads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), k * x.square()

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return a * x.cos() + b * 2 * 2 * x, None


class FunctionLayer(nn.Module):
    """A layer with a parameter around an autograd function, `call(x, w)`."""

    def __init__(self, call: Callable[..., Tensor], d: int = 3):
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.ones(d)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


def around(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 3), layer(), nn.Linear(3, 3))


case("checkpoint", lambda: Checkpointed("whole"), vectors, twin=lambda: Checkpointed("none"))
case("checkpoint-dropout", lambda: Checkpointed("whole", 0.4), vectors, twin=lambda: Checkpointed("none", 0.4))
case("checkpoint-sequential", lambda: Checkpointed("sequential"), vectors, twin=lambda: Checkpointed("plain-sequential"))
case("subclass-of-linear", around(lambda: ScaledLinear(3, 3)), vectors)
case("subclass-of-linear-sequence", do(lambda s, x: s.head(s.one(x).mean(1)), one=lambda: ScaledLinear(4, 3),
     head=lambda: ScaledLinear(3, 3)), sequences)
case("subclass-with-children", around(lambda: LoraLinear(3, 3)), vectors)
case("subclass-of-conv", lambda: nn.Sequential(StandardisedConv(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), images)
case("subclass-of-activation", around(GatedSigmoid), vectors)
case("subclass-that-changes-nothing", around(lambda: Renamed(3, 3)), vectors)
case("subclass-with-property", around(lambda: PositiveLinear(3, 3)), vectors)
case("subclass-with-property-of-the-same-name", around(lambda: EqualisedLinear(3, 3)), vectors,
     twin=around(lambda: EqualisedTwin(3, 3)))
case("instance-forward", instance_forward, vectors)
case("weight-norm", weight_normed, vectors)
case("weight-norm-conv", lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Flatten(), nn.Linear(8, 3)),
     images)
case("spectral-norm", spectral_normed, vectors)
case("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3)),
     lambda: (r(N, 3), classes()))
case("parametrization-of-ones-own", symmetric, vectors)
case("autograd-function", around(lambda: Do(lambda s, x: SquareFunction.apply(x))), vectors,
     twin=around(lambda: Do(lambda s, x: x * x.sin())))
case("autograd-function-with-parameter", around(lambda: FunctionLayer(lambda x, w: SquareFunction.apply(x * w))), vectors,
     twin=around(lambda: FunctionLayer(lambda x, w: (x * w) * (x * w).sin())))
case("autograd-function-numpy", around(lambda: FunctionLayer(lambda x, w: torch.sin(NumpyFunction.apply(x, w)))), vectors,
     twin=around(lambda: FunctionLayer(lambda x, w: torch.sin(x * w))))
case("autograd-function-two-outputs", around(lambda: FunctionLayer(lambda x, w: sum(TwoFunction.apply(x * w, 2)))), vectors,
     twin=around(lambda: FunctionLayer(lambda x, w: (x * w).sin() + 2 * (x * w) ** 2)))
case("autograd-function-one-output-unused", around(lambda: FunctionLayer(lambda x, w: TwoFunction.apply(x * w, 2)[1])), vectors,
     twin=around(lambda: FunctionLayer(lambda x, w: 2 * (x * w) ** 2)))

# -- dropout: the same masks, since the same seed is set before each run -----------------------------------------------

case(
    "dropout-train", lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)), vectors
)
case("dropout-inplace", lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4, inplace=True), nn.Linear(4, 3)), vectors)
case("dropout2d-train", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(12, 3)), images)
case("alpha-dropout-train", lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.4), nn.Linear(4, 3)), vectors)
case("rrelu-train", lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 3)), vectors)
glue("dropout-functional", lambda s, x: s.head(F.dropout(torch.tanh(s.one(x)), 0.4, s.training)), vectors, one=linear(4, 4),
     head=linear(4, 3))
glue("dropout-on-weights", lambda s, x: F.linear(s.one(x), F.dropout(s.head.weight, 0.4), s.head.bias), vectors, one=linear(4, 4),
     head=linear(4, 3))
glue("noise-added", lambda s, x: s.head(torch.tanh(s.one(x)) + 0.1 * torch.randn(len(x), 4).to(x)), vectors, one=linear(4, 4),
     head=linear(4, 3))

# -- layers of many kinds ----------------------------------------------------------------------------------------------

def packed(s: Any, x: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
    return s.head(pad_packed_sequence(s.cell(rows)[0], batch_first=True)[0].sum(1))


def scripted() -> nn.Module:
    """Called until the compiler has settled, since its first calls round otherwise."""
    part = torch.jit.script(MLP()).double()
    for _ in range(3):
        part(torch.zeros(N, 4, dtype=torch.float64)).sum().backward()
    part.zero_grad()
    return part


def attended(s: Any, x: Tensor) -> Tensor:
    return s.head(s.attention(x, x, x)[0].mean(1))


glue("multihead-attention", attended, attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True), head=linear(4, 3))
glue("multihead-attention-no-weights", lambda s, x: s.head(s.attention(x, x, x, need_weights=False)[0].flatten(1)),
     attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True), head=linear(16, 3))
glue(
    "multihead-attention-cross",
    lambda s, x: s.head(s.attention(x[:, :1], x[:, :, :3], x[:, :, :3], need_weights=False)[0][:, 0]),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3, add_bias_kv=True),
    head=linear(4, 3),
)
glue("multihead-attention-masked", lambda s, x: s.head(s.attention(x, x, x, key_padding_mask=torch.tensor(
     [[False, False, True, True], [False] * 4, [False, False, False, True]]))[0][:, 0]),
     attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True), head=linear(4, 3))
glue("multihead-attention-inside-batch-first", lambda s, x: s.head(s.attention(*[x.transpose(0, 1)] * 3)[0].mean(0)),
     attention=lambda: nn.MultiheadAttention(4, 2), head=linear(4, 3))
glue("lstm", lambda s, x: s.head(s.cell(x)[0][:, -1]), cell=lambda: nn.LSTM(4, 2, batch_first=True), head=linear(2, 3))
glue("lstm-two-layers-both-ways", lambda s, x: s.head(s.cell(x)[1][0].transpose(0, 1).flatten(1)), cell=lambda: nn.LSTM(
     4, 2, 2, batch_first=True, bidirectional=True), head=linear(8, 3))
glue("gru", lambda s, x: s.head(s.cell(x)[0].mean(1)), cell=lambda: nn.GRU(4, 2, batch_first=True), head=linear(2, 3))
glue("rnn-first-hidden", lambda s, x: s.head(s.cell(x, s.h0.expand(-1, len(x), -1).contiguous())[1][0]),
     cell=lambda: nn.RNN(4, 3, batch_first=True), h0=lambda: r(1, 1, 3), head=linear(3, 3))
glue(
    "gru-inside-batch-first", lambda s, x: s.head(s.cell(x.transpose(0, 1))[0][-1]), cell=lambda: nn.GRU(4, 3), head=linear(3, 3)
)
glue("lstm-cell", lambda s, x: s.head(s.cell(x[:, 1], s.cell(x[:, 0]))[0]), cell=lambda: nn.LSTMCell(4, 2), head=linear(2, 3))
case("lstm-packed", do(packed, cell=lambda: nn.LSTM(4, 2, batch_first=True), head=linear(2, 3)), sequences,
     twin=do(lambda s, x: s.head(torch.cat([s.cell(row[None, :t])[0].sum(1) for row, t in zip(x, (2, 4, 3), strict=True)])),
             cell=lambda: nn.LSTM(4, 2, batch_first=True), head=linear(2, 3)))
case(
    "conv1d",
    lambda: nn.Sequential(nn.Conv1d(4, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(6, 3)),
    sequences,
)
case("conv3d", lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)),
     lambda: (r(N, 2, 2, 2, 2), classes()))
case("transposed-conv", lambda: nn.Sequential(nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
     images)
case("norms", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.Flatten(),
                                    nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 3)), images)
case("activations", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.SiLU(inplace=True), nn.Linear(4, 4), nn.GLU(),
                                          nn.Softmax(-1), nn.Linear(2, 3), nn.LogSoftmax(-1)), vectors)
case("scripted-part", lambda: nn.Sequential(scripted(), nn.Tanh(), nn.Linear(3, 3)), vectors,
     twin=lambda: nn.Sequential(MLP(), nn.Tanh(), nn.Linear(3, 3)))

# -- which rows belong to which sample ---------------------------------------------------------------------------------

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


MASK = torch.tensor([[True, False, True, False], [False, False, False, True], [True, True, True, False]])
MASKED = rows_of(0, 0, 1, 2, 2, 2)
PERM = torch.tensor([2, 0, 1])


def flat_tokens() -> tuple[Any, ...]:
    return r(N, 4, 4), classes(4 * N)


case("token-major", do(token_major, one=linear(4, 3), head=linear(3, 3)), flat_tokens, numbers=every)
case("token-major-as-many-tokens", do(token_major, one=linear(4, 3), head=linear(3, 3)), lambda: (r(3, 3, 4), classes(9)),
     numbers=every)
case("token-major-mixed", do(token_major_mixed, block=Block, head=linear(4, 3)), flat_tokens, numbers=every)
case("token-major-extra-axis", do(lambda s, x: s.head(s.block(x)).permute(1, 2, 0), block=Block, head=linear(4, 3)),
     lambda: (r(N, 4, 4), classes(4, 3, N)), numbers=lambda outs, data: [torch.arange(N).expand(4, 3, N)], table=EITHER)
case("energy-of-the-batch", do(lambda s, x: s.head(torch.tanh(s.one(x))).sum(), one=linear(4, 3), head=linear(3, 1)),
     lambda: (r(N, 4), r(())), plain, nn.MSELoss, numbers=lambda outs, data: [torch.tensor(0)], table=EITHER)
case("token-major-reshaped", do(token_major, one=linear(4, 3), head=linear(3, 3)), lambda: (r(N, 4, 4), classes()),
     lambda m, l, x, y: l(m(x).view(4, N, 3).mean(0), y))
case("sequence-first-mean", do(lambda s, x: s.head(torch.tanh(s.one(x)).mean(0)), one=linear(4, 3), head=linear(3, 3)),
     lambda: (r(4, N, 4), classes()), numbers=by_loss, batch_axis=1)
case(
    "sequence-first-as-long-as-samples",
    do(lambda s, x: s.head(torch.tanh(s.one(x)).mean(0)), one=linear(4, 3), head=linear(3, 3)),
    lambda: (r(3, 3, 4), classes()),
    numbers=by_loss,
    batch_axis=1,
)
case("sequence-first-attention", do(lambda s, x: s.head(s.attention(x, x, x)[0]).mean(0),
     attention=lambda: nn.MultiheadAttention(4, 2), head=linear(4, 3)), lambda: (r(4, N, 4), classes()), numbers=by_loss,
     batch_axis=1)
case("sequence-first-lstm", do(lambda s, x: s.head(s.cell(x)[0][-1]), cell=lambda: nn.LSTM(4, 2), head=linear(2, 3)),
     lambda: (r(4, N, 4), classes()), numbers=by_loss, batch_axis=1)
case("sequence-first-tokens", do(lambda s, x: s.head(s.cell(s.table(x))[0]), table=lambda: nn.Embedding(5, 3),
     cell=lambda: nn.GRU(3, 3), head=linear(3, 3)), lambda: (torch.randint(5, (4, N)), classes(4 * N)),
     lambda m, l, x, y: l(m(x).view(-1, 3), y), numbers=lambda outs, data: [torch.arange(4 * N) % N], batch_axis=1)
case("masked-rows", do(lambda s, x: s.head(torch.tanh(s.one(x))), one=linear(4, 3), head=linear(3, 3)),
     lambda: (r(N, 4, 4), classes(6)), lambda m, l, x, y: l(m(x)[MASK], y), numbers=MASKED)
case("masked-rows-mixed", do(lambda s, x: s.head(s.block(x)), block=Block, head=linear(4, 3)),
     lambda: (r(N, 4, 4), classes(6)), lambda m, l, x, y: l(m(x)[MASK], y), numbers=MASKED)
case("masked-rows-before-head", do(lambda s, x: s.head(s.block(x)[MASK]), block=Block, head=linear(4, 3)),
     lambda: (r(N, 4, 4), classes(6)), numbers=MASKED)
case("masked-rows-an-odd-number", do(lambda s, x: s.head(s.block(x)), block=Block, head=linear(4, 3)),
     lambda: (r(N, 4, 4), classes(5)), lambda m, l, x, y: l(m(x)[MASK][:5], y), numbers=rows_of(0, 0, 1, 2, 2))
case("masked-tokens-lm", LM, tokens, lambda m, l, x, y: l(m(x)[MASK], y[MASK]), numbers=MASKED)
case("two-views-in-model", do(lambda s, a, b: s.net(torch.cat([a, b])), net=MLP), lambda: (r(N, 4), r(N, 4), classes(2 * N)),
     lambda m, l, a, b, y: l(m(a, b), y), numbers=every)
case("two-views-of-images", do(lambda s, a, b: s.net(torch.cat([a, b])), net=lambda: nn.Sequential(
     nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))), lambda: (r(N, 2, 4, 4), r(N, 2, 4, 4), classes(2 * N)),
     lambda m, l, a, b, y: l(m(a, b), y), numbers=every)
case("two-views-outside", MLP, lambda: (r(N, 4), r(N, 4), classes(2 * N)), lambda m, l, a, b, y: l(m(torch.cat([a, b])), y),
     numbers=by_loss)
case("two-views-compared-in-loss", MLP, lambda: (r(N, 4), r(N, 4)),
     lambda m, l, a, b: (lambda z: l(z[:N], z[N:]))(m(torch.cat([a, b]))), nn.MSELoss, numbers=by_loss)
case("two-views-compared-in-model", do(lambda s, a, b: (lambda z: s.head(z[:N] * z[N:]))(s.net(torch.cat([a, b]))), net=MLP,
     head=linear(3, 3)), lambda: (r(N, 4), r(N, 4), classes()), lambda m, l, a, b, y: l(m(a, b), y))
case("views-averaged", do(lambda s, a, b: s.net(torch.cat([a, b])).view(2, N, 3).mean(0), net=MLP),
     lambda: (r(N, 4), r(N, 4), classes()), lambda m, l, a, b, y: l(m(a, b), y))
case("repeated-inputs", do(lambda s, x: s.net(x.repeat(2, 1)), net=MLP), lambda: (r(N, 4), classes(2 * N)), numbers=every)
case(
    "repeated-inputs-with-a-parameter",
    do(lambda s, x: s.net(x.repeat(2, 1) * s.noise[:, None]), net=MLP, noise=lambda: r(2 * N)),
    lambda: (r(N, 4), classes(2 * N)),
    numbers=every,
    table=EITHER,
)
case("repeat-interleave", do(lambda s, x: s.net(x.repeat_interleave(2, 0)), net=MLP), lambda: (r(N, 4), classes(2 * N)))
case("experts", do(routed, one=linear(4, 3), experts=experts, head=linear(3, 3)),
     lambda: (r(4, 4), two_of_four(), classes(4)), lambda m, l, x, to, y: l(m(x, to), y))
case("experts-uneven", do(routed, one=linear(4, 3), experts=experts, head=linear(3, 3)),
     lambda: (r(4, 4), torch.tensor([1, 0, 0, 0]), classes(4)), lambda m, l, x, to, y: l(m(x, to), y))
case("experts-in-place", do(routed_in_place, one=linear(4, 3), experts=experts, head=linear(3, 3)),
     lambda: (r(4, 4), two_of_four(), classes(4)), lambda m, l, x, to, y: l(m(x, to), y))
case("experts-all-to-one-permuted", do(lambda s, x: s.head(s.one(x[PERM])[PERM.argsort()]), one=linear(4, 3), head=linear(3, 3)),
     vectors)
case("experts-for-tokens", do(sorted_experts, one=linear(4, 3), gate=linear(3, 2), experts=experts, head=linear(3, 3)),
     lambda: (r(N, 4, 4), torch.randint(2, (N, 4)), classes()), lambda m, l, x, to, y: l(m(x, to), y))
case("permuted-rows", MLP, vectors, lambda m, l, x, y: l(m(x)[PERM], y), numbers=by_loss)
case("permuted-rows-mixed", do(lambda s, x: s.head(s.block(x)).mean(1), block=Block, head=linear(4, 3)), sequences,
     lambda m, l, x, y: l(m(x)[PERM], y[PERM]), numbers=by_loss)
case("permuted-in-model", do(lambda s, x: s.head(torch.tanh(s.one(x))[PERM]), one=linear(4, 3), head=linear(3, 3)), vectors,
     numbers=by_loss)
case("subset-of-rows", MLP, lambda: (r(5, 4), classes(2)), lambda m, l, x, y: l(m(x)[1:3], y),
     numbers=rows_of(1, 2), n=5)
case("transposed-batch", do(lambda s, x: (s.w @ torch.tanh(s.one(x)).T).T, one=linear(4, 3), w=lambda: r(3, 3)), vectors)
case("batch-in-the-last-axis", do(lambda s, x: s.w2 @ torch.tanh(s.w1 @ x), w1=lambda: r(3, 4), w2=lambda: r(3, 3)),
     lambda: (r(4, N), classes()), lambda m, l, x, y: l(m(x).T, y), numbers=by_loss, batch_axis=1)

# -- what stands before the first layer hides the samples: right, or refused ------------------------------------------------

def either(
    name: str, run: Callable[..., Any], data: Any, numbers: Any = every, call: Any = plain, **parts: Callable[[], Any]
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
either("token-major-normalised", lambda s, x: token_major(s, F.layer_norm(x, (4,))), flat_tokens, **PARTS)
either("token-major-with-places", lambda s, x: token_major(s, x + s.places), flat_tokens, places=lambda: r(4, 4), **PARTS)
either("token-major-as-many-scaled", lambda s, x: token_major(s, 2 * x), lambda: (r(3, 3, 4), classes(9)), **PARTS)
either(
    "token-major-integers",
    lambda s, x: s.head(torch.tanh(s.table(x.T.reshape(-1)))),
    lambda: (torch.randint(5, (N, 4)), classes(4 * N)),
    table=lambda: nn.Embedding(5, 3),
    head=linear(3, 3),
)
either("token-major-integers-shifted", lambda s, x: s.head(torch.tanh(s.table((x + 1).T.reshape(-1)))),
       lambda: (torch.randint(5, (N, 4)), classes(4 * N)), table=lambda: nn.Embedding(6, 3), head=linear(3, 3))
either("token-major-one-hot", lambda s, x: s.head(torch.tanh(s.one(F.one_hot(x, 5).double().transpose(0, 1).reshape(-1, 5)))),
       lambda: (torch.randint(5, (N, 4)), classes(4 * N)), one=linear(5, 3), head=linear(3, 3))
either("token-major-patches", lambda s, x: s.head(torch.relu(s.one(F.unfold(x, 2, stride=2).permute(2, 0, 1).reshape(-1, 8)))),
       lambda: (r(N, 2, 4, 4), classes(4 * N)), one=linear(8, 3), head=linear(3, 3))
either("sample-major-scaled", lambda s, x: s.head(torch.tanh(s.one((2 * x).reshape(-1, 4)))), flat_tokens, in_order, **PARTS)
either("sample-major-patches", lambda s, x: s.head(torch.relu(s.one(F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, 8)))),
       lambda: (r(N, 2, 4, 4), classes(4 * N)), in_order, one=linear(8, 3), head=linear(3, 3))
either("two-views-scaled", lambda s, x: s.net(torch.cat([2 * x, -x])), lambda: (r(N, 4), classes(2 * N)), **NET)
either("two-views-flipped", lambda s, x: s.net(torch.cat([x, x.flip(1)])), lambda: (r(N, 4), classes(2 * N)), **NET)
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
either("shuffled-and-scaled-before-the-first-layer", lambda s, x: s.net(2 * x[PERM]), vectors, by_loss, **NET)
either("shuffled-and-back", lambda s, x: s.net(2 * x[PERM])[PERM.argsort()], vectors, in_order, **NET)
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

# -- losses ------------------------------------------------------------------------------------------------------------

class Total(nn.Module):
    """A module that contains losses."""

    def __init__(self) -> None:
        super().__init__()
        self.ce, self.mse = nn.CrossEntropyLoss(), nn.MSELoss()

    def forward(self, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return 2 * self.ce(z, y) + self.mse(z, t)


def loss_case(name: str, loss: Callable[[], Any], data: Any = vectors, run: Any = plain, make: Any = MLP, **options: Any) -> None:
    case(f"loss-{name}", make, data, run, loss, **options)


def ce(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.CrossEntropyLoss(**{k: v() if callable(v) else v for k, v in options.items()})


def weights() -> Tensor:
    return torch.tensor([0.3, 1.0, 2.0])


def ignored() -> tuple[Any, ...]:
    return r(4, 4), torch.tensor([0, -100, 2, 1])


def soft() -> tuple[Any, ...]:
    return r(N, 4), torch.softmax(r(N, 3), -1)


def real() -> tuple[Any, ...]:
    return r(N, 4), r(N, 3)


def binary() -> tuple[Any, ...]:
    return r(N, 4), torch.rand(N, 3)


def segmentation() -> tuple[Any, ...]:
    return r(2, 1, 3, 3), classes(2, 3, 3, 3)


def fully_convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))


loss_case("ce-sum", ce(reduction="sum"))
loss_case("ce-weights", ce(weight=weights))
loss_case("ce-weights-sum", ce(weight=weights, reduction="sum"))
loss_case("ce-ignore", ce(), ignored)
loss_case("ce-ignore-index", ce(ignore_index=2, weight=weights), lambda: (r(4, 4), torch.tensor([0, 2, 2, 1])))
loss_case("ce-smoothing", ce(label_smoothing=0.2))
loss_case("ce-smoothing-weights-ignore", ce(label_smoothing=0.2, weight=weights), ignored)
loss_case("ce-soft", ce(), soft)
loss_case("ce-soft-weights-smoothing", ce(weight=weights, label_smoothing=0.1, reduction="sum"), soft)
loss_case("ce-segmentation", ce(), segmentation, make=fully_convolutional)
loss_case("ce-segmentation-weights-ignore", ce(weight=weights, ignore_index=1, reduction="sum"), segmentation,
          make=fully_convolutional)
loss_case("ce-segmentation-soft", ce(), lambda: (r(2, 1, 3, 3), torch.rand(2, 3, 3, 3)), make=fully_convolutional)
loss_case("ce-none-weighted", ce(reduction="none"), lambda: (*vectors(), torch.rand(N)),
          lambda m, l, x, y, w: (w * l(m(x), y)).sum())
loss_case("ce-none-some", ce(reduction="none"), vectors, lambda m, l, x, y: l(m(x), y)[1:].mean())
loss_case("ce-none-masked", ce(reduction="none"), lambda: (r(N, 4, 4), classes(N, 3, 4)),
          lambda m, l, x, y: (l(m(x).transpose(1, 2), y) * MASK).sum() / MASK.sum())
loss_case("ce-half", ce(), vectors, lambda m, l, x, y: 0.5 * l(m(x), y))
loss_case("ce-accumulation", ce(), vectors, lambda m, l, x, y: l(m(x), y) / 4)
loss_case("ce-squashed-factor", ce(), vectors, lambda m, l, x, y: (3.0 * l(m(x), y) + 1.0) / 2 - 0.25)
loss_case("ce-saturated", ce(), vectors, lambda m, l, x, y: l(30 * m(x), y))
loss_case("ce-binary", ce(), lambda: (r(N, 4), classes(N, 2)), make=lambda: MLP(o=2))
loss_case("ce-one-class", ce(), lambda: (r(N, 4), classes(N, 1)), make=lambda: MLP(o=1))
loss_case("mse", nn.MSELoss, real)
loss_case("mse-sum", lambda: nn.MSELoss(reduction="sum"), real)
loss_case("mse-none", lambda: nn.MSELoss(reduction="none"), real, lambda m, l, x, y: (l(m(x), y) * torch.arange(3)).sum(1).mean())
loss_case("mse-images", nn.MSELoss, lambda: (r(2, 1, 3, 3), r(2, 3, 3, 3)), make=fully_convolutional)
loss_case("mse-target-first", nn.MSELoss, real, lambda m, l, x, y: l(y, m(x)))
loss_case("mse-by-name", nn.MSELoss, real, lambda m, l, x, y: l(target=y, input=m(x)))
loss_case("bce", nn.BCEWithLogitsLoss, binary)
loss_case("bce-sum", lambda: nn.BCEWithLogitsLoss(reduction="sum"), binary)
loss_case("bce-weight-pos-weight", lambda: nn.BCEWithLogitsLoss(weight=torch.rand(N, 3), pos_weight=weights()), binary)
loss_case("bce-one-output", nn.BCEWithLogitsLoss, lambda: (r(N, 4), torch.rand(N)), lambda m, l, x, y: l(m(x)[:, 0], y))
loss_case("huber", nn.HuberLoss, real)
loss_case("smooth-l1", nn.SmoothL1Loss, real)
loss_case("l1-has-no-curvature", nn.L1Loss, real)
loss_case("nll-of-log-softmax-has-no-curvature", nn.NLLLoss, vectors, lambda m, l, x, y: l(m(x).log_softmax(-1), y))
loss_case("poisson", nn.PoissonNLLLoss, lambda: (r(N, 4), torch.rand(N, 3)))
loss_case("soft-margin", nn.SoftMarginLoss, lambda: (r(N, 4), torch.rand(N, 3).round() * 2 - 1))
loss_case("multi-label", nn.MultiLabelSoftMarginLoss, lambda: (r(N, 4), torch.rand(N, 3).round()))
loss_case("function", lambda: lambda z, y: torch.log(torch.cosh(z - y)).sum(1).mean(), real)
loss_case("function-of-rows", lambda: lambda z, y: torch.logsumexp(z, -1).sum() - z.gather(1, y[:, None]).sum())
loss_case("functional-ce", lambda: F.cross_entropy)
loss_case("function-with-option", lambda: F.cross_entropy, vectors, lambda m, l, x, y: l(m(x), y, label_smoothing=0.1))
loss_case("function-convex", lambda: lambda z, y, w=None: (F.softplus(z) ** 2).mean(), real)
loss_case("two-on-one-output", lambda: (nn.CrossEntropyLoss(), nn.MSELoss()), lambda: (*vectors(), r(N, 3)),
          lambda m, l, x, y, t: (lambda z: l[0](z, y) + 0.3 * l[1](z, t))(m(x)))
loss_case("same-twice-on-one-output", ce(), lambda: (*vectors(), classes()),
          lambda m, l, x, y, t: (lambda z: l(z, y) + l(z, t))(m(x)))
loss_case("module-of-losses", Total, lambda: (*vectors(), r(N, 3)), lambda m, l, x, y, t: l(m(x), y, t))
loss_case("two-heads", lambda: (nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")), lambda: (*vectors(), r(N, 2)),
          lambda m, l, x, y, t: (lambda z: l[0](z[0], y) + l[1](z[1], t))(m(x)),
          make=do(lambda s, x: (s.a(torch.tanh(s.one(x))), s.b(s.one(x))), one=linear(4, 3), a=linear(3, 3), b=linear(3, 2)))
loss_case(
    "deep-supervision",
    ce(),
    vectors,
    lambda m, l, x, y: sum(l(z, y) * w for z, w in zip(m(x), (1.0, 0.5), strict=True)),
    make=do(
        lambda s, x: (lambda h: (s.head(h), s.head(torch.tanh(s.two(h)))))(s.one(x)),
        one=linear(4, 3),
        two=linear(3, 3),
        head=linear(3, 3),
    ),
)
loss_case("two-forward-passes", ce(), lambda: (*vectors(), r(2, 4), classes(2)), lambda m, l, x, y, a, b: l(m(x), y) + l(m(a), b),
          numbers=one_behind_the_other)
loss_case(
    "two-forward-passes-of-as-many",
    ce(),
    lambda: (*vectors(), *vectors()),
    lambda m, l, x, y, a, b: l(m(x), y) + 2 * l(m(a), b),
    numbers=one_behind_the_other,
)
loss_case("of-two-outputs", lambda: lambda a, b, y: ((a.sum(1) + b.sum(1) - y) ** 2).mean(), lambda: (r(N, 4), r(N)),
          lambda m, l, x, y: l(*m(x), y),
          make=do(lambda s, x: (s.one(x), s.two(torch.tanh(s.one(x)))), one=linear(4, 3), two=linear(3, 2)))
loss_case("of-a-dict", lambda: lambda out, y: F.cross_entropy(out["logits"], y), vectors,
          make=do(lambda s, x: {"logits": s.one(x)}, one=linear(4, 3)))


# -- frozen parts ------------------------------------------------------------------------------------------------------

def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = MLP()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(names))
        return model

    return make


case("frozen-prefix", frozen("one"), vectors)
case("frozen-middle", frozen("two"), vectors)
case("frozen-head", frozen("three"), vectors)
case("frozen-biases", frozen("one.bias", "two.bias", "three.bias"), vectors)
case("frozen-weight-of-head", frozen("three.weight", "one"), vectors)
case("frozen-token", do(lambda s, x: s.head(s.block(torch.cat([s.token.detach().expand(len(x), -1, -1), x], 1))[:, 0]),
     token=lambda: r(1, 1, 4), block=Block, head=linear(4, 3)), sequences)
case("positions-of-arange", do(lambda s, x: s.head(torch.tanh(x + s.wpe(torch.arange(4))).mean(1)),
     wpe=lambda: nn.Embedding(4, 4), head=linear(4, 3)), sequences)
case("positions-as-many-as-samples", do(lambda s, x: s.head(torch.tanh(x + s.wpe(torch.arange(3))).mean(1)),
     wpe=lambda: nn.Embedding(3, 4), head=linear(4, 3)), lambda: (r(3, 3, 4), classes()))


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.ce = MLP(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ce(self.net(x), y)

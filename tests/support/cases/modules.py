"""Rows: repeated use, checkpoints, subclasses, parametrizations, layers of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.support.cases.models import MLP, Block, glue
from tests.support.cases.table import (
    Do,
    N,
    case,
    classes,
    do,
    images,
    linear,
    r,
    sequences,
    settled,
    vectors,
)

# -- used more than once ---------------------------------------------------------------------------


def tied_linears() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)
    )
    model[2].weight = model[0].weight
    return model


def shared_bias() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    model[3].bias = model[0].bias
    return model


glue(
    "called-twice",
    lambda s, x: s.head(s.one(torch.tanh(s.one(x)))),
    vectors,
    one=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "called-twice-in-parallel",
    lambda s, x: s.head(s.one(x[:, :2]) * s.one(x[:, 2:])),
    vectors,
    one=linear(2, 3),
    head=linear(3, 3),
)
glue(
    "called-on-several-lengths",
    lambda s, x: s.head(s.one(x).sum(1) + s.one(x[:, 0]) + s.one(x[:, 1:3]).prod(1)),
    one=linear(4, 3),
    head=linear(3, 3),
)
glue(
    "block-called-twice",
    lambda s, x: s.head(s.block(s.block(x)).flatten(1)),
    block=Block,
    head=linear(16, 3),
)
glue(
    "conv-called-twice",
    lambda s, x: s.head(s.conv(torch.tanh(s.conv(x))).flatten(1)),
    images,
    conv=lambda: nn.Conv2d(2, 2, 3, padding=1),
    head=linear(32, 3),
)
glue(
    "batchnorm-called-twice",
    lambda s, x: s.head(s.bn(torch.tanh(s.bn(x)))),
    vectors,
    bn=lambda: settled(nn.BatchNorm1d(4)),
    head=linear(4, 3),
)
glue(
    "module-and-its-weight",
    lambda s, x: s.one(x) @ s.one.weight + s.one.bias.sum(),
    lambda: (r(N, 3), classes()),
    one=linear(3, 3),
)
glue(
    "autoencoder-tied",
    lambda s, x: F.linear(torch.tanh(s.one(x)), s.one.weight.t())[:, :3],
    vectors,
    one=linear(4, 2),
)
case("tied-linears", tied_linears, vectors)
case("shared-bias", shared_bias, lambda: (r(N, 2, 4, 4), classes(N, 2)))
glue(
    "siamese-in-model",
    lambda s, x: s.head((s.net(x[:, :4]) - s.net(x[:, 4:])) ** 2),
    lambda: (r(N, 8), classes()),
    net=MLP,
    head=linear(3, 3),
)

# -- inputs and outputs ----------------------------------------------------------------------------

glue(
    "identity-and-eval-dropout",
    lambda s, x: s.head(s.id(s.drop(s.one(x)))),
    vectors,
    one=linear(4, 3),
    id=nn.Identity,
    drop=lambda: nn.Dropout().eval(),
    head=linear(3, 3),
)
case(
    "two-inputs",
    do(
        lambda s, a, b: s.head(s.one(a) * s.two(b)),
        one=linear(4, 3),
        two=linear(2, 3),
        head=linear(3, 3),
    ),
    lambda: (r(N, 4), r(N, 2), classes()),
    lambda m, l, a, b, y: l(m(a, b), y),
)
case(
    "two-inputs-by-name",
    do(
        lambda s, a, b: s.head(torch.cat([s.one(a), s.two(b).flatten(1)], 1)),
        one=linear(4, 2),
        two=lambda: nn.Embedding(5, 2),
        head=linear(6, 3),
    ),
    lambda: (r(N, 4), torch.randint(5, (N, 2)), classes()),
    lambda m, l, a, b, y: l(m(b=b, a=a), y),
)
case(
    "bilinear",
    do(lambda s, a, b: s.head(s.both(a, b)), both=lambda: nn.Bilinear(3, 2, 2), head=linear(2, 3)),
    lambda: (r(N, 3), r(N, 2), classes()),
    lambda m, l, a, b, y: l(m(a, b), y),
)
case(
    "dict-output",
    do(
        lambda s, x: {"hidden": s.one(x), "logits": s.head(torch.tanh(s.one(x)))},
        one=linear(4, 3),
        head=linear(3, 3),
    ),
    vectors,
    lambda m, l, x, y: l(m(x)["logits"], y),
)
case(
    "object-output",
    do(
        lambda s, x: SimpleNamespace(logits=s.head(torch.tanh(s.one(x)))),
        one=linear(4, 3),
        head=linear(3, 3),
    ),
    vectors,
    lambda m, l, x, y: l(m(x).logits, y),
)
case("loss-on-a-part", MLP, vectors, lambda m, l, x, y: l(m(x)[:, :2], y % 2))
case(
    "unreached-branch",
    do(
        lambda s, x: (s.head(torch.tanh(s.one(x))), s.aside(s.one(x))),
        one=linear(4, 3),
        head=linear(3, 3),
        aside=linear(3, 2),
        never=linear(2, 2),
    ),
    vectors,
    lambda m, l, x, y: l(m(x)[0], y),
)
case(
    "detached-branch",
    do(
        lambda s, x: s.head(s.one(x) + s.two(x).detach()),
        one=linear(4, 3),
        two=linear(4, 3),
        head=linear(3, 3),
    ),
    vectors,
)

# -- checkpoints, subclasses, parametrizations, autograd functions ---------------------------------


class Checkpointed(nn.Module):
    """`how`: none, whole (each block), or sequential."""

    def __init__(self, how: str, drop: float = 0.0):
        super().__init__()
        self.how = how
        self.body = nn.Sequential(
            nn.Linear(4, 3), nn.Tanh(), nn.Dropout(drop), nn.Linear(3, 4), nn.ReLU(inplace=True)
        )
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            return self.body(t) * self.scale + t

        if self.how == "whole":
            h = checkpoint(part, checkpoint(part, x, use_reentrant=False), use_reentrant=False)
        elif self.how == "sequential":
            h = checkpoint_sequential(
                self.body,
                2,
                checkpoint_sequential(self.body, 2, x, use_reentrant=False) * self.scale,
                use_reentrant=False,
            )
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
    """A subclass whose weight is not its parameter of that name, under the forward of its
    parent.
    """

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
    two.forward = lambda x: F.linear(x, two.weight**2, two.bias) + x  # type: ignore[method-assign]
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


def spectral_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)
    ).eval()


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
case(
    "checkpoint-dropout",
    lambda: Checkpointed("whole", 0.4),
    vectors,
    twin=lambda: Checkpointed("none", 0.4),
)
case(
    "checkpoint-sequential",
    lambda: Checkpointed("sequential"),
    vectors,
    twin=lambda: Checkpointed("plain-sequential"),
)
case("subclass-of-linear", around(lambda: ScaledLinear(3, 3)), vectors)
case(
    "subclass-of-linear-sequence",
    do(
        lambda s, x: s.head(s.one(x).mean(1)),
        one=lambda: ScaledLinear(4, 3),
        head=lambda: ScaledLinear(3, 3),
    ),
    sequences,
)
case("subclass-with-children", around(lambda: LoraLinear(3, 3)), vectors)
case(
    "subclass-of-conv",
    lambda: nn.Sequential(StandardisedConv(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
    images,
)
case("subclass-of-activation", around(GatedSigmoid), vectors)
case("subclass-that-changes-nothing", around(lambda: Renamed(3, 3)), vectors)
case("subclass-with-property", around(lambda: PositiveLinear(3, 3)), vectors)
case(
    "subclass-with-property-of-the-same-name",
    around(lambda: EqualisedLinear(3, 3)),
    vectors,
    twin=around(lambda: EqualisedTwin(3, 3)),
)
case("instance-forward", instance_forward, vectors)
case("weight-norm", weight_normed, vectors)
case(
    "weight-norm-conv",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Flatten(), nn.Linear(8, 3)
    ),
    images,
)
case("spectral-norm", spectral_normed, vectors)
case(
    "orthogonal",
    lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3)),
    lambda: (r(N, 3), classes()),
)
case("parametrization-of-ones-own", symmetric, vectors)
case(
    "autograd-function",
    around(lambda: Do(lambda s, x: SquareFunction.apply(x))),
    vectors,
    twin=around(lambda: Do(lambda s, x: x * x.sin())),
)
case(
    "autograd-function-with-parameter",
    around(lambda: FunctionLayer(lambda x, w: SquareFunction.apply(x * w))),
    vectors,
    twin=around(lambda: FunctionLayer(lambda x, w: (x * w) * (x * w).sin())),
)
case(
    "autograd-function-numpy",
    around(lambda: FunctionLayer(lambda x, w: torch.sin(NumpyFunction.apply(x, w)))),
    vectors,
    twin=around(lambda: FunctionLayer(lambda x, w: torch.sin(x * w))),
)
case(
    "autograd-function-two-outputs",
    around(lambda: FunctionLayer(lambda x, w: sum(TwoFunction.apply(x * w, 2)))),
    vectors,
    twin=around(lambda: FunctionLayer(lambda x, w: (x * w).sin() + 2 * (x * w) ** 2)),
)
case(
    "autograd-function-one-output-unused",
    around(lambda: FunctionLayer(lambda x, w: TwoFunction.apply(x * w, 2)[1])),
    vectors,
    twin=around(lambda: FunctionLayer(lambda x, w: 2 * (x * w) ** 2)),
)

# -- dropout: the same masks, since the same seed is set before each run ---------------------------

case(
    "dropout-train",
    lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    ),
    vectors,
)
case(
    "dropout-inplace",
    lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4, inplace=True), nn.Linear(4, 3)),
    vectors,
)
case(
    "dropout2d-train",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(12, 3)),
    images,
)
case(
    "alpha-dropout-train",
    lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.4), nn.Linear(4, 3)),
    vectors,
)
case("rrelu-train", lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 3)), vectors)
glue(
    "dropout-functional",
    lambda s, x: s.head(F.dropout(torch.tanh(s.one(x)), 0.4, s.training)),
    vectors,
    one=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "dropout-on-weights",
    lambda s, x: F.linear(s.one(x), F.dropout(s.head.weight, 0.4), s.head.bias),
    vectors,
    one=linear(4, 4),
    head=linear(4, 3),
)
glue(
    "noise-added",
    lambda s, x: s.head(torch.tanh(s.one(x)) + 0.1 * torch.randn(len(x), 4).to(x)),
    vectors,
    one=linear(4, 4),
    head=linear(4, 3),
)

# -- layers of many kinds --------------------------------------------------------------------------


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


glue(
    "multihead-attention",
    attended,
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(4, 3),
)
glue(
    "multihead-attention-no-weights",
    lambda s, x: s.head(s.attention(x, x, x, need_weights=False)[0].flatten(1)),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(16, 3),
)
glue(
    "multihead-attention-cross",
    lambda s, x: s.head(
        s.attention(x[:, :1], x[:, :, :3], x[:, :, :3], need_weights=False)[0][:, 0]
    ),
    attention=lambda: nn.MultiheadAttention(
        4, 2, batch_first=True, kdim=3, vdim=3, add_bias_kv=True
    ),
    head=linear(4, 3),
)
glue(
    "multihead-attention-masked",
    lambda s, x: s.head(
        s.attention(
            x,
            x,
            x,
            key_padding_mask=torch.tensor(
                [[False, False, True, True], [False] * 4, [False, False, False, True]]
            ),
        )[0][:, 0]
    ),
    attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    head=linear(4, 3),
)
glue(
    "multihead-attention-inside-batch-first",
    lambda s, x: s.head(s.attention(*[x.transpose(0, 1)] * 3)[0].mean(0)),
    attention=lambda: nn.MultiheadAttention(4, 2),
    head=linear(4, 3),
)
glue(
    "lstm",
    lambda s, x: s.head(s.cell(x)[0][:, -1]),
    cell=lambda: nn.LSTM(4, 2, batch_first=True),
    head=linear(2, 3),
)
glue(
    "lstm-two-layers-both-ways",
    lambda s, x: s.head(s.cell(x)[1][0].transpose(0, 1).flatten(1)),
    cell=lambda: nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True),
    head=linear(8, 3),
)
glue(
    "gru",
    lambda s, x: s.head(s.cell(x)[0].mean(1)),
    cell=lambda: nn.GRU(4, 2, batch_first=True),
    head=linear(2, 3),
)
glue(
    "rnn-first-hidden",
    lambda s, x: s.head(s.cell(x, s.h0.expand(-1, len(x), -1).contiguous())[1][0]),
    cell=lambda: nn.RNN(4, 3, batch_first=True),
    h0=lambda: r(1, 1, 3),
    head=linear(3, 3),
)
glue(
    "gru-inside-batch-first",
    lambda s, x: s.head(s.cell(x.transpose(0, 1))[0][-1]),
    cell=lambda: nn.GRU(4, 3),
    head=linear(3, 3),
)
glue(
    "lstm-cell",
    lambda s, x: s.head(s.cell(x[:, 1], s.cell(x[:, 0]))[0]),
    cell=lambda: nn.LSTMCell(4, 2),
    head=linear(2, 3),
)
case(
    "lstm-packed",
    do(packed, cell=lambda: nn.LSTM(4, 2, batch_first=True), head=linear(2, 3)),
    sequences,
    twin=do(
        lambda s, x: s.head(
            torch.cat(
                [s.cell(row[None, :t])[0].sum(1) for row, t in zip(x, (2, 4, 3), strict=True)]
            )
        ),
        cell=lambda: nn.LSTM(4, 2, batch_first=True),
        head=linear(2, 3),
    ),
)
case(
    "conv1d",
    lambda: nn.Sequential(
        nn.Conv1d(4, 3, 2, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(2),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    sequences,
)
case(
    "conv3d",
    lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)),
    lambda: (r(N, 2, 2, 2, 2), classes()),
)
case(
    "transposed-conv",
    lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    ),
    images,
)
case(
    "norms",
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.RMSNorm(16),
        nn.Linear(16, 3),
    ),
    images,
)
case(
    "activations",
    lambda: nn.Sequential(
        nn.Linear(4, 4),
        nn.PReLU(4),
        nn.SiLU(inplace=True),
        nn.Linear(4, 4),
        nn.GLU(),
        nn.Softmax(-1),
        nn.Linear(2, 3),
        nn.LogSoftmax(-1),
    ),
    vectors,
)
case(
    "scripted-part",
    lambda: nn.Sequential(scripted(), nn.Tanh(), nn.Linear(3, 3)),
    vectors,
    twin=lambda: nn.Sequential(MLP(), nn.Tanh(), nn.Linear(3, 3)),
)

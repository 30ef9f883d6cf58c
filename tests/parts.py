"""The parts of the zoo: models given by a forward function, as people write them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

T, D = 3, 4


class Net(nn.Module):
    """A model given by its parts and its forward."""

    def __init__(self, forward: Callable[..., Any], **parts: Any):
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


P = lambda *shape: nn.Parameter(torch.randn(*shape))
conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1)


def residual(s, x):
    h = s.relu(s.a(x))
    identity = h
    out = s.b(h)
    out += identity
    return s.head(F.adaptive_avg_pool2d(s.relu(out), 1).flatten(1))


def dense_net(s, x):
    h = torch.cat([x, s.a(x).relu()], 1)
    h = torch.cat([h, s.b(h).tanh()], 1)
    return s.head(h.mean((2, 3)))


def u_net(s, x):
    down = s.pool(s.a(x).relu())
    up = F.interpolate(s.b(down), scale_factor=2, mode="nearest")
    return s.head(torch.cat([up, x], 1))


def attend(s, h):
    n, t, d = h.shape
    q, k, v = s.qkv(s.norm(h)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=s.causal).transpose(1, 2).reshape(n, t, d)
    h = h + s.scale * s.out(a)
    return h + s.down(F.gelu(s.up(s.norm2(h))))


def transformer(s, x):
    h = torch.cat([s.token.expand(len(x), 1, D), s.inner(x)], 1) + s.place
    return s.head(attend(s, h)[:, 0])


def block(causal: bool = False) -> dict[str, Any]:
    return dict(
        norm=nn.LayerNorm(D),
        qkv=nn.Linear(D, 3 * D),
        out=nn.Linear(D, D),
        norm2=nn.LayerNorm(D),
        up=nn.Linear(D, 2 * D),
        down=nn.Linear(2 * D, D),
        scale=P(D),
        causal=causal,
    )


def language(s, x):
    h = s.embed(x) + s.place(torch.arange(x.shape[1]))
    return s.head(attend(s, h))


def language_model(tied: bool) -> nn.Module:
    m = Net(
        lambda s, x: language(s, x).view(-1, 5),
        embed=nn.Embedding(5, D),
        place=nn.Embedding(T, D),
        head=nn.Linear(D, 5, bias=False),
        **block(True),
    )
    if tied:
        m.head.weight = m.embed.weight
    return m


def between(s, x):
    h = F.gelu(s.a(x)).view(len(x), 2, D).permute(0, 2, 1).softmax(-1)
    h = torch.cat([h[:, 0], h[..., 1]], -1) * s.gain + s.shift
    return s.b(h)


def slices(s, x):
    h = s.a(x) * 1
    h[:, 0] = h[:, 1].clone() * s.gain[0]
    h[:, 2:] += s.gain[2:]
    return s.b(h)


class Sine(torch.autograd.Function):
    """Old style: torch.func cannot take it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Scaled(nn.Linear):
    """A subclass that must not be taken for its parent."""

    def forward(self, x):
        return super().forward(x) * 2 + x.mean(-1, keepdim=True)


def segment(s, x):
    return s.b(s.a(x).relu())


def gated(s, x):
    route = (x.sum(-1) > 0).long()
    out = torch.zeros(len(x), D, dtype=x.dtype)
    for i, expert in enumerate((s.e0, s.e1)):
        rows = (route == i).nonzero()[:, 0]
        out = out.index_put((rows,), expert(x[rows]))
    return s.head(out + x)


def time_major(s, x, mix):
    h = s.a(x).tanh()
    h = h + h.mean(1, keepdim=True) * mix
    return s.b(h.permute(1, 0, 2).reshape(-1, D))


def masked(s, x):
    h = s.a(x).tanh()
    h = h + h.mean(1, keepdim=True)
    return s.b(h[MASK])


MASK = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()


def sequence_first(s, x):
    h = s.a(x).tanh()
    return s.b((h + h.mean(0, keepdim=True)).mean(0))

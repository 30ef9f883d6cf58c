"""Rows: losses with their options, frozen parts, modules that hold a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases.models import LM, MLP, Block
from tests.support.cases.samples import MASK
from tests.support.cases.table import (
    EITHER,
    N,
    case,
    classes,
    do,
    every,
    linear,
    one_behind_the_other,
    plain,
    r,
    sequences,
    tokens,
    vectors,
)

# -- losses ----------------------------------------------------------------------------------------


class Total(nn.Module):
    """A module that contains losses."""

    def __init__(self) -> None:
        super().__init__()
        self.ce, self.mse = nn.CrossEntropyLoss(), nn.MSELoss()

    def forward(self, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return 2 * self.ce(z, y) + self.mse(z, t)


def loss_case(
    name: str,
    loss: Callable[[], Any],
    data: Any = vectors,
    run: Any = plain,
    make: Any = MLP,
    **options: Any,
) -> None:
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
loss_case(
    "ce-ignore-index",
    ce(ignore_index=2, weight=weights),
    lambda: (r(4, 4), torch.tensor([0, 2, 2, 1])),
)
loss_case("ce-smoothing", ce(label_smoothing=0.2))
loss_case("ce-smoothing-weights-ignore", ce(label_smoothing=0.2, weight=weights), ignored)
loss_case("ce-soft", ce(), soft)
loss_case(
    "ce-soft-weights-smoothing", ce(weight=weights, label_smoothing=0.1, reduction="sum"), soft
)
loss_case("ce-segmentation", ce(), segmentation, make=fully_convolutional)
loss_case(
    "ce-segmentation-weights-ignore",
    ce(weight=weights, ignore_index=1, reduction="sum"),
    segmentation,
    make=fully_convolutional,
)
loss_case(
    "ce-segmentation-soft",
    ce(),
    lambda: (r(2, 1, 3, 3), torch.rand(2, 3, 3, 3)),
    make=fully_convolutional,
)
loss_case(
    "ce-none-weighted",
    ce(reduction="none"),
    lambda: (*vectors(), torch.rand(N)),
    lambda m, l, x, y, w: (w * l(m(x), y)).sum(),
)
loss_case("ce-none-some", ce(reduction="none"), vectors, lambda m, l, x, y: l(m(x), y)[1:].mean())
loss_case(
    "ce-none-masked",
    ce(reduction="none"),
    lambda: (r(N, 4, 4), classes(N, 3, 4)),
    lambda m, l, x, y: (l(m(x).transpose(1, 2), y) * MASK).sum() / MASK.sum(),
)
loss_case("ce-half", ce(), vectors, lambda m, l, x, y: 0.5 * l(m(x), y))
loss_case("ce-accumulation", ce(), vectors, lambda m, l, x, y: l(m(x), y) / 4)
loss_case(
    "ce-squashed-factor", ce(), vectors, lambda m, l, x, y: (3.0 * l(m(x), y) + 1.0) / 2 - 0.25
)
loss_case("ce-saturated", ce(), vectors, lambda m, l, x, y: l(30 * m(x), y))
loss_case("ce-binary", ce(), lambda: (r(N, 4), classes(N, 2)), make=lambda: MLP(o=2))
loss_case("ce-one-class", ce(), lambda: (r(N, 4), classes(N, 1)), make=lambda: MLP(o=1))
loss_case("mse", nn.MSELoss, real)
loss_case("mse-sum", lambda: nn.MSELoss(reduction="sum"), real)
loss_case(
    "mse-none",
    lambda: nn.MSELoss(reduction="none"),
    real,
    lambda m, l, x, y: (l(m(x), y) * torch.arange(3)).sum(1).mean(),
)
loss_case(
    "mse-images", nn.MSELoss, lambda: (r(2, 1, 3, 3), r(2, 3, 3, 3)), make=fully_convolutional
)
loss_case("mse-target-first", nn.MSELoss, real, lambda m, l, x, y: l(y, m(x)))
loss_case("mse-by-name", nn.MSELoss, real, lambda m, l, x, y: l(target=y, input=m(x)))
loss_case("bce", nn.BCEWithLogitsLoss, binary)
loss_case("bce-sum", lambda: nn.BCEWithLogitsLoss(reduction="sum"), binary)
loss_case(
    "bce-weight-pos-weight",
    lambda: nn.BCEWithLogitsLoss(weight=torch.rand(N, 3), pos_weight=weights()),
    binary,
)
loss_case(
    "bce-one-output",
    nn.BCEWithLogitsLoss,
    lambda: (r(N, 4), torch.rand(N)),
    lambda m, l, x, y: l(m(x)[:, 0], y),
)
loss_case("huber", nn.HuberLoss, real)
loss_case("smooth-l1", nn.SmoothL1Loss, real)
loss_case("l1-has-no-curvature", nn.L1Loss, real)
loss_case(
    "huber-none",
    lambda: nn.HuberLoss(reduction="none", delta=0.5),
    real,
    lambda m, l, x, y: (l(m(x), y) * weights()).sum(),
)
loss_case("bce-of-probabilities", nn.BCELoss, binary, lambda m, l, x, y: l(m(x).sigmoid(), y))
loss_case(
    "gaussian",
    nn.GaussianNLLLoss,
    lambda: (*real(), torch.rand(N, 1) + 0.1),
    lambda m, l, x, y, v: l(m(x), y, v),
)
loss_case(
    "functional-gaussian",
    lambda: F.gaussian_nll_loss,
    lambda: (*real(), torch.rand(N, 3) + 0.1),
    lambda m, l, x, y, v: l(m(x), target=y, var=v, reduction="sum"),
)
loss_case(
    "functional-mse-weighted",
    lambda: F.mse_loss,
    real,
    lambda m, l, x, y: l(m(x), y, weight=torch.rand(N, 3) + 0.1),
)
loss_case(
    "functional-huber", lambda: functools.partial(F.huber_loss, delta=0.5, reduction="sum"), real
)
loss_case("poisson", nn.PoissonNLLLoss, lambda: (r(N, 4), torch.rand(N, 3)))
loss_case("soft-margin", nn.SoftMarginLoss, lambda: (r(N, 4), torch.rand(N, 3).round() * 2 - 1))
loss_case(
    "soft-margin-none",
    lambda: nn.SoftMarginLoss(reduction="none"),
    lambda: (r(N, 4), torch.rand(N, 3).round() * 2 - 1),
    lambda m, l, x, y: (l(m(x), y) * weights()).sum(),
)
loss_case(
    "poisson-rates",
    lambda: nn.PoissonNLLLoss(log_input=False),
    lambda: (r(N, 4), torch.rand(N, 3)),
    lambda m, l, x, y: l(F.softplus(m(x)), y),
)
loss_case(
    "multi-label-none",
    lambda: nn.MultiLabelSoftMarginLoss(weights(), reduction="none"),
    lambda: (r(N, 4), torch.rand(N, 3).round()),
    lambda m, l, x, y: l(m(x), y)[1:].sum(),
)
loss_case("multi-label", nn.MultiLabelSoftMarginLoss, lambda: (r(N, 4), torch.rand(N, 3).round()))
loss_case("function", lambda: lambda z, y: torch.log(torch.cosh(z - y)).sum(1).mean(), real)
loss_case(
    "function-of-rows",
    lambda: lambda z, y: torch.logsumexp(z, -1).sum() - z.gather(1, y[:, None]).sum(),
)
loss_case("functional-ce", lambda: F.cross_entropy)
loss_case(
    "function-with-option",
    lambda: F.cross_entropy,
    vectors,
    lambda m, l, x, y: l(m(x), y, label_smoothing=0.1),
)
loss_case("function-convex", lambda: lambda z, y, w=None: (F.softplus(z) ** 2).mean(), real)
loss_case(
    "two-on-one-output",
    lambda: (nn.CrossEntropyLoss(), nn.MSELoss()),
    lambda: (*vectors(), r(N, 3)),
    lambda m, l, x, y, t: (lambda z: l[0](z, y) + 0.3 * l[1](z, t))(m(x)),
)
loss_case(
    "same-twice-on-one-output",
    ce(),
    lambda: (*vectors(), classes()),
    lambda m, l, x, y, t: (lambda z: l(z, y) + l(z, t))(m(x)),
)
loss_case(
    "module-of-losses", Total, lambda: (*vectors(), r(N, 3)), lambda m, l, x, y, t: l(m(x), y, t)
)
loss_case(
    "two-heads",
    lambda: (nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")),
    lambda: (*vectors(), r(N, 2)),
    lambda m, l, x, y, t: (lambda z: l[0](z[0], y) + l[1](z[1], t))(m(x)),
    make=do(
        lambda s, x: (s.a(torch.tanh(s.one(x))), s.b(s.one(x))),
        one=linear(4, 3),
        a=linear(3, 3),
        b=linear(3, 2),
    ),
)
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
loss_case(
    "two-forward-passes",
    ce(),
    lambda: (*vectors(), r(2, 4), classes(2)),
    lambda m, l, x, y, a, b: l(m(x), y) + l(m(a), b),
    numbers=one_behind_the_other,
)
loss_case(
    "two-forward-passes-of-as-many",
    ce(),
    lambda: (*vectors(), *vectors()),
    lambda m, l, x, y, a, b: l(m(x), y) + 2 * l(m(a), b),
    numbers=one_behind_the_other,
)
loss_case(
    "of-two-outputs",
    lambda: lambda a, b, y: ((a.sum(1) + b.sum(1) - y) ** 2).mean(),
    lambda: (r(N, 4), r(N)),
    lambda m, l, x, y: l(*m(x), y),
    make=do(
        lambda s, x: (s.one(x), s.two(torch.tanh(s.one(x)))), one=linear(4, 3), two=linear(3, 2)
    ),
)
loss_case(
    "of-a-dict",
    lambda: lambda out, y: F.cross_entropy(out["logits"], y),
    vectors,
    make=do(lambda s, x: {"logits": s.one(x)}, one=linear(4, 3)),
)


# -- frozen parts ----------------------------------------------------------------------------------


def frozen(*names: str, of: Callable[[], nn.Module] = MLP) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = of()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(names))
        return model

    return make


case("frozen-prefix", frozen("one"), vectors)
case("frozen-middle", frozen("two"), vectors)
case("frozen-head", frozen("three"), vectors)
case("frozen-biases", frozen("one.bias", "two.bias", "three.bias"), vectors)
case("frozen-weight-of-head", frozen("three.weight", "one"), vectors)
case(
    "frozen-token",
    do(
        lambda s, x: s.head(
            s.block(torch.cat([s.token.detach().expand(len(x), -1, -1), x], 1))[:, 0]
        ),
        token=lambda: r(1, 1, 4),
        block=Block,
        head=linear(4, 3),
    ),
    sequences,
)
case(
    "frozen-words",
    frozen("wte", "wpe", of=lambda: LM(False)),
    tokens,
    lambda m, l, x, y: l(m(x).view(-1, 5), y.view(-1)),
)
case(
    "frozen-words-token-major",
    frozen("wte", "wpe", of=lambda: LM(False)),
    tokens,
    lambda m, l, x, y: l(m(x).transpose(0, 1).reshape(-1, 5), y.T.reshape(-1)),
    numbers=every,
)
case(
    "frozen-words-alone",
    do(
        lambda s, x: s.head(s.wte.weight.detach()[x]).flatten(0, 1),
        wte=lambda: nn.Embedding(5, 4),
        head=linear(4, 3),
    ),
    lambda: (torch.randint(5, (N, 4)), classes(4 * N)),
    table=EITHER,
)
case(
    "positions-of-arange",
    do(
        lambda s, x: s.head(torch.tanh(x + s.wpe(torch.arange(4))).mean(1)),
        wpe=lambda: nn.Embedding(4, 4),
        head=linear(4, 3),
    ),
    sequences,
)
case(
    "positions-as-many-as-samples",
    do(
        lambda s, x: s.head(torch.tanh(x + s.wpe(torch.arange(3))).mean(1)),
        wpe=lambda: nn.Embedding(3, 4),
        head=linear(4, 3),
    ),
    lambda: (r(3, 3, 4), classes()),
)


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.ce = MLP(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ce(self.net(x), y)

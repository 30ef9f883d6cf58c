"""Rows: a loss on rearranged, repeated, masked outputs, and on outputs whose samples are not in
axis 0. A sample is a row of the batch axis of the model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases.models import MLP, Block
from tests.support.cases.samples import MASK, PERM
from tests.support.cases.table import Case, N, case, classes, do, linear, plain, r

WHOSE: dict[str, Case] = {}  # right, all of them
SUMS: dict[str, Case] = {}  # sums over samples are right, batch_grad is refused


def ids(*found: Tensor) -> Callable[..., list[Tensor]]:
    """The samples of what the losses are given."""
    return lambda outs, data: list(found)


def frozen_first(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        model.one.requires_grad_(False)
        return model

    return made


def bare(s: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, s.w, s.b)), s.v)


BARE = do(bare, w=lambda: r(5, 4), b=lambda: r(5), v=lambda: r(3, 5))
TOKENS = do(lambda s, x: s.head(torch.tanh(s.one(x))), one=linear(4, 4), head=linear(4, 3))
MIXED = do(lambda s, x: s.head(s.block(s.one(x))), one=linear(4, 4), block=Block, head=linear(4, 3))
# models of (N, 4) -> (N, 3), and of (N, T, 4) -> (N, T, 3), that begin in different ways
VECTORS: dict[str, Any] = {
    "layers": MLP,
    "frozen-first": frozen_first(MLP),
    "bare": BARE,
    "scaled": do(lambda s, x: s.net(2 * x + 1), net=MLP),
}
SEQUENCES: dict[str, Any] = {
    "layers": TOKENS,
    "frozen-first": frozen_first(TOKENS),
    "bare": BARE,
    "mixed": MIXED,
    "mixed-frozen-first": frozen_first(MIXED),
}
AGAIN = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
ROUND = torch.cat([torch.arange(4), torch.arange(4).flip(0)])
EACH = torch.arange(N)

# -- glue between the output and the loss, (N, C) --------------------------------------------------

GLUE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {  # on four samples, and whose rows
    "there-and-back": (lambda z: torch.cat([z, z.flip(0)]), ROUND),
    "again": (lambda z: z[AGAIN], AGAIN),
    "permuted": (lambda z: z[[2, 0, 3, 1]], torch.tensor([2, 0, 3, 1])),
    "as-many-picked": (lambda z: z[[1, 1, 3, 0]], torch.tensor([1, 1, 3, 0])),
    "flipped": (lambda z: z.flip(0), torch.tensor([3, 2, 1, 0])),
    "rolled": (lambda z: z.roll(1, 0), torch.tensor([3, 0, 1, 2])),
    "sorted": (lambda z: z[z.detach()[:, 0].argsort()], torch.empty(0)),
    "repeated": (lambda z: z.repeat(3, 1), torch.arange(12) % 4),
    "interleaved": (lambda z: z.repeat_interleave(3, 0), torch.arange(12) // 3),
    "softened": (lambda z: z[[3, 2, 1, 0]].log_softmax(-1) / 2, torch.tensor([3, 2, 1, 0])),
    "without-one": (lambda z: z[[0, 3]], torch.tensor([0, 3])),
    "strided": (lambda z: z[::2], torch.tensor([0, 2])),
    "in-pieces": (lambda z: torch.cat(z.split([1, 3])[::-1]), torch.tensor([1, 2, 3, 0])),
    "stacked": (
        lambda z: torch.stack([z, z.flip(0)], 1).flatten(0, 1),
        torch.tensor([0, 3, 1, 2, 2, 1, 3, 0]),
    ),
}
for glue, (through, whose) in GLUE.items():
    for first, make in VECTORS.items():
        if glue == "sorted":
            continue
        case(
            f"whose-{glue}-{first}",
            make,
            lambda whose=whose: (r(4, 4), classes(len(whose))),
            lambda m, l, x, y, through=through: l(through(m(x)), y),
            numbers=ids(whose),
            n=4,
            table=WHOSE,
        )
for first, make in VECTORS.items():
    case(
        f"whose-two-losses-{first}",
        make,
        lambda: (r(N, 4), classes(), r(N, 3)),
        lambda m, l, x, y, t: (lambda z: l[0](z, y) + 0.5 * l[1](z[PERM], t))(m(x)),
        lambda: (nn.CrossEntropyLoss(), nn.MSELoss()),
        numbers=ids(EACH, PERM),
        table=WHOSE,
    )
    case(
        f"whose-two-losses-on-parts-{first}",
        make,
        lambda: (r(N, 4), classes(), r(2, 3)),
        lambda m, l, x, y, t: (lambda z: l[0](z, y) + l[1](z[1:], t))(m(x)),
        lambda: (nn.CrossEntropyLoss(), nn.MSELoss()),
        numbers=ids(EACH, torch.tensor([1, 2])),
        table=WHOSE,
    )

# -- glue between the output and the loss, (N, T, C) -----------------------------------------------

FULL = torch.arange(N)[:, None].expand(N, 4)
for first, make in SEQUENCES.items():
    for name, how, whose, c in (
        ("masked", lambda z: z[MASK], FULL[MASK], 6),
        ("as-many-masked", lambda z: z[MASK][:3], FULL[MASK][:3], 3),
        ("rows", lambda z: z.flatten(0, 1), FULL.flatten(), 12),
        ("token-major", lambda z: z.transpose(0, 1).reshape(-1, 3), FULL.T.flatten(), 12),
        ("last-of-each", lambda z: z[EACH, [3, 0, 2]], EACH, 3),
        ("turned-round", lambda z: z.flip(0, 1).flatten(0, 1), FULL.flip(0).flatten(), 12),
    ):
        case(
            f"whose-{name}-{first}",
            make,
            lambda c=c: (r(N, 4, 4), classes(c)),
            lambda m, l, x, y, how=how: l(how(m(x)), y),
            numbers=ids(whose),
            n=N,
            table=WHOSE,
        )
        case(
            f"whose-{name}-mse-{first}",
            make,
            lambda c=c: (r(N, 4, 4), r(c, 3)),
            lambda m, l, x, y, how=how: l(how(m(x)), y),
            nn.MSELoss,
            numbers=ids(whose),
            n=N,
            table=WHOSE,
        )
    # as many tokens as samples
    square = torch.arange(3)[:, None].expand(3, 3)
    for name, how, whose in (
        ("class-axis", lambda z: z.permute(1, 2, 0), square[None, 0].T[None].expand(3, 3, 3)),
        ("rows", lambda z: z.flatten(0, 1), square.flatten()),
        ("token-major", lambda z: z.transpose(0, 1).flatten(0, 1), square.T.flatten()),
    ):
        # of (T, C, N) the last axis is that of the samples
        whose = torch.arange(3).expand(3, 3, 3) if name == "class-axis" else whose
        case(
            f"whose-as-many-tokens-{name}-{first}",
            make,
            lambda name=name: (
                r(3, 3, 4),
                classes(3, 3, 3) if name == "class-axis" else classes(9),
            ),
            lambda m, l, x, y, how=how: l(how(m(x)), y),
            numbers=ids(whose),
            table=WHOSE,
        )

# -- samples in another axis of the output ---------------------------------------------------------


def squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y, reduction="sum")


def entropies(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


AXIS1: dict[str, Any] = {
    "layers": TOKENS,
    "frozen-first": frozen_first(TOKENS),
    "bare": BARE,
    "recurrent": do(
        lambda s, x: s.head(s.cell(x)[0]), cell=lambda: nn.GRU(4, 3), head=linear(3, 3)
    ),
}
for first, make in AXIS1.items():
    for t in (4, 3):  # as many tokens as samples, too
        whose = torch.arange(N).expand(t, N)
        for name, how, at, y in (
            ("rows", lambda z: z.flatten(0, 1), whose.flatten(), lambda t=t: classes(t * N)),
            (
                "class-axis",
                lambda z: z.permute(1, 2, 0),
                whose.T[:, None].expand(N, 3, t),
                lambda t=t: classes(N, 3, t),
            ),
        ):
            case(
                f"whose-axis-1-{name}-{t}-{first}",
                make,
                lambda t=t, y=y: (r(t, N, 4), y()),
                lambda m, l, x, y, how=how: l(how(m(x)), y),
                numbers=ids(at),
                batch_axis=1,
                table=WHOSE,
            )
        for name, loss in (
            ("mse", nn.MSELoss),
            ("function", lambda: squares),
        ):
            case(
                f"whose-axis-1-{name}-{t}-{first}",
                make,
                lambda t=t: (r(t, N, 4), r(t, N, 3)),
                plain,
                loss,
                numbers=ids(whose),
                batch_axis=1,
                table=WHOSE,
            )
        case(
            f"whose-axis-1-entropy-{t}-{first}",
            make,
            lambda t=t: (r(t, N, 4), classes(t, 3, N)),
            plain,
            lambda: entropies,
            numbers=ids(whose),
            batch_axis=1,
            table=WHOSE,
        )


def hidden(layers: int) -> Callable[[], nn.Module]:
    return do(
        lambda s, x: s.cell(x)[1], cell=lambda: nn.GRU(4, 2, num_layers=layers, batch_first=True)
    )


for layers in (1, 2, 3):
    case(
        f"whose-hidden-states-{layers}",
        hidden(layers),
        lambda layers=layers: (r(N, 4, 4), r(layers, N, 2)),
        plain,
        nn.MSELoss,
        numbers=ids(torch.arange(N).expand(layers, N)),
        table=WHOSE,
    )
    case(  # as many layers as samples: there are two ways of reading it
        f"whose-hidden-states-joined-{layers}",
        hidden(layers),
        lambda layers=layers: (r(N, 4, 4), classes(N, 2)),
        lambda m, l, x, y: l(m(x)[-1], y),
        numbers=ids(EACH),
        table=SUMS if layers == N else WHOSE,
    )
for first, make in VECTORS.items():
    one_more = do(lambda s, x: s.net(x)[None], net=make)
    case(
        f"whose-first-axis-of-one-{first}",
        one_more,
        lambda: (r(N, 4), r(1, N, 3)),
        plain,
        nn.MSELoss,
        numbers=ids(EACH[None]),
        table=WHOSE,
    )
    case(
        f"whose-first-axis-of-one-taken-{first}",
        one_more,
        lambda: (r(N, 4), classes()),
        lambda m, l, x, y: l(m(x)[0], y),
        numbers=ids(EACH),
        table=WHOSE,
    )
case(
    "whose-no-batch-axis",
    MLP,
    lambda: (r(4), r(3)),
    plain,
    nn.MSELoss,
    numbers=ids(torch.zeros(3, dtype=torch.long)),
    table=WHOSE,
)
case(
    "whose-no-batch-axis-classes",
    MLP,
    lambda: (r(4), torch.tensor(1)),
    numbers=ids(torch.zeros(3, dtype=torch.long)),
    table=WHOSE,
)
case(
    "whose-all-nodes-as-one-sample",
    do(
        lambda s, x: s.head(
            torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]]).to(x) @ s.one(x[0])
        )[None],
        one=linear(4, 3),
        head=linear(3, 3),
    ),
    lambda: (r(1, 3, 4), classes()),
    lambda m, l, x, y: l(m(x)[0], y),
    numbers=ids(torch.zeros(3, dtype=torch.long)),
    table=WHOSE,
)

# -- called on parts of a batch --------------------------------------------------------------------


def in_parts(*sizes: int) -> Callable[..., Tensor]:
    return lambda m, l, x, y: l(torch.cat([m(part) for part in x.split(list(sizes))]), y)


for first, make in VECTORS.items():
    for sizes in ((6, 2), (3, 3, 2), (1, 7)):
        case(
            f"whose-parts-{'-'.join(map(str, sizes))}-{first}",
            make,
            lambda: (r(8, 4), classes(8)),
            in_parts(*sizes),
            numbers=ids(torch.arange(8)),
            table=WHOSE,
        )
    case(
        f"whose-parts-in-two-arguments-{first}",
        make,
        lambda: (r(5, 4), r(5, 3)),
        lambda m, l, x, y: l(m(x[:2]), m(x[2:]), y),
        lambda: lambda a, b, y: F.mse_loss(torch.cat([a, b]), y),
        numbers=ids(torch.tensor([0, 1]), torch.tensor([2, 3, 4])),
        table=WHOSE,
    )
    case(
        f"whose-twice-the-same-input-{first}",
        make,
        lambda: (r(N, 4), classes()),
        lambda m, l, x, y: l(m(x) + 2 * m(x), y),
        numbers=ids(EACH),
        table=WHOSE,
    )
    case(
        f"whose-equal-parts-{first}",
        make,
        lambda: (r(8, 4), classes(8)),
        in_parts(4, 4),
        numbers=ids(torch.arange(8)),
        table=SUMS,
    )
    case(
        f"whose-two-towers-{first}",
        make,
        lambda: (r(N, 4), r(N, 4)),
        lambda m, l, a, b: l(m(a), m(b)),
        nn.MSELoss,
        numbers=ids(EACH, EACH),
        table=SUMS,
    )
    case(
        f"whose-differences-{first}",
        make,
        lambda: (r(4, 4), r(2, 3)),
        lambda m, l, x, y: (lambda z: l(z[:2] - z[2:], y))(m(x)),
        nn.MSELoss,
        numbers=ids(torch.arange(2)),
        table=SUMS,
    )
case(
    "whose-siamese-function",
    MLP,
    lambda: (r(N, 4), r(N, 4), r(N).abs()),
    lambda m, l, a, b, t: l(m(a), m(b), t),
    lambda: lambda a, b, t: (t * ((a - b) ** 2).sum(1)).mean(),
    numbers=ids(EACH, EACH),
    table=SUMS,
)

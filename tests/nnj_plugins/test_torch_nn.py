"""Every class of torch.nn: a rule, or a fallback that is known and exact, or a refusal; none is
forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.registry.manager import manager
from nnj.testing import check_model

N = 3
Y = torch.tensor([0, 2, 1])
NAMES = [name for name in torch.nn.modules.__all__ if issubclass(getattr(nn, name), nn.Module)]
NO_LAYERS = {
    "Module",
    "Container",
    "Sequential",
    "ModuleList",
    "ModuleDict",
    "ParameterList",
    "ParameterDict",
    "RNNBase",
    "RNNCellBase",
}


class Net(nn.Module):
    """`call(self, x)`, with parts by name."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **parts: nn.Module):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def pair(m: nn.Module) -> Any:
    """A module of two arguments, both made by layers."""
    model = Net(
        lambda s, x: s.m(s.a(x)[:, None], s.b(x).view(-1, 3, 2)),
        m=m,
        a=nn.Linear(4, 2),
        b=nn.Linear(4, 6),
    )
    return model, torch.randn(N, 4)


def sequence(m: nn.Module, width: int, call: Any = lambda s, x: s.m(x)[0]) -> Any:
    return Net(lambda s, x: s.head(call(s, x).mean(1)), m=m, head=nn.Linear(width, 3)), torch.randn(
        N, 5, 4
    )


def cell(m: nn.Module, call: Any) -> Any:
    return Net(call, m=m, a=nn.Linear(4, 3)), torch.randn(N, 4)


def unpool(axes: int) -> Any:
    conv, pool, back = (getattr(nn, f"{name}{axes}d") for name in ("Conv", "MaxPool", "MaxUnpool"))
    x = torch.randn(N, 1, *[4] * axes)
    return Net(
        lambda s, x: s.head(s.m(*s.pool(s.conv(x))).flatten(1)),
        conv=conv(1, 2, 1),
        pool=pool(2, return_indices=True),
        m=back(2),
        head=nn.Linear(2 * 4**axes, 3),
    ), x


def fractional(axes: int) -> Any:
    """Its windows are drawn at random, so it is given the draws: it must do the same when it is
    called again.
    """
    conv, pool = getattr(nn, f"Conv{axes}d"), getattr(nn, f"FractionalMaxPool{axes}d")
    m = pool(2, output_size=2, _random_samples=torch.rand(N, 2, axes).double())
    return Net(
        lambda s, x: s.head(s.m(s.conv(x)).flatten(1)),
        conv=conv(1, 2, 1),
        m=m,
        head=nn.Linear(2 * 2**axes, 3),
    ), torch.randn(N, 1, *[5] * axes)


# Why there is no rule of the class, and a model in which it is tried. Its operations go by what
# autograd says of them; a matrix product with one of its parameters has the structure of a linear
# layer.
SEVERAL, CELLS = "it takes several tensors", "its products with weights are those of linear layers"
FALLBACKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Bilinear": (
        SEVERAL,
        lambda: (
            Net(
                lambda s, x: s.head(s.m(s.a(x), x)),
                m=nn.Bilinear(3, 4, 2),
                a=nn.Linear(4, 3),
                head=nn.Linear(2, 3),
            ),
            torch.randn(N, 4),
        ),
    ),
    "CosineSimilarity": (SEVERAL, lambda: pair(nn.CosineSimilarity(2))),
    "PairwiseDistance": (SEVERAL, lambda: pair(nn.PairwiseDistance())),
    "RNN": (CELLS, lambda: sequence(nn.RNN(4, 3, 2, batch_first=True, bidirectional=True), 6)),
    "LSTM": (CELLS, lambda: sequence(nn.LSTM(4, 3, proj_size=2, batch_first=True), 2)),
    "GRU": (CELLS, lambda: sequence(nn.GRU(4, 3, batch_first=True), 3)),
    "RNNCell": (CELLS, lambda: cell(nn.RNNCell(4, 3), lambda s, x: s.m(x, s.a(x)))),
    "LSTMCell": (CELLS, lambda: cell(nn.LSTMCell(4, 3), lambda s, x: s.m(x, (s.a(x), s.a(x)))[0])),
    "GRUCell": (CELLS, lambda: cell(nn.GRUCell(4, 3), lambda s, x: s.m(x, s.a(x)))),
    "MultiheadAttention": (
        CELLS,
        lambda: sequence(
            nn.MultiheadAttention(4, 2, batch_first=True), 4, lambda s, x: s.m(x, x, x)[0]
        ),
    ),
    "TransformerEncoderLayer": (
        "its parts have rules",
        lambda: sequence(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), 4, lambda s, x: s.m(x)
        ),
    ),
    "TransformerDecoderLayer": (
        "its parts have rules",
        lambda: sequence(
            nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).eval(),
            4,
            lambda s, x: s.m(x, x.flip(1)),
        ),
    ),
    "TransformerEncoder": (
        "its parts have rules",
        lambda: sequence(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval(),
            4,
            lambda s, x: s.m(x),
        ),
    ),
    "TransformerDecoder": (
        "its parts have rules",
        lambda: sequence(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 2).eval(),
            4,
            lambda s, x: s.m(x, x.flip(1)),
        ),
    ),
    "Transformer": (
        "its parts have rules",
        lambda: sequence(
            nn.Transformer(4, 2, 1, 1, 8, batch_first=True).eval(),
            4,
            lambda s, x: s.m(x, x.flip(1)),
        ),
    ),
    **{f"MaxUnpool{axes}d": (SEVERAL, lambda a=axes: unpool(a)) for axes in (1, 2, 3)},
    **{
        f"FractionalMaxPool{axes}d": (
            "its windows are drawn by the call",
            lambda a=axes: fractional(a),
        )
        for axes in (2, 3)
    },
    "CrossMapLRN2d": (
        "an old form of LocalResponseNorm, a function of its own",
        lambda: (
            Net(
                lambda s, x: s.head(s.m(s.conv(x)).flatten(1)),
                conv=nn.Conv2d(1, 3, 3),
                m=nn.CrossMapLRN2d(3),
                head=nn.Linear(12, 3),
            ),
            torch.randn(N, 1, 4, 4),
        ),
    ),
}
OPTIONS: dict[str, Callable[[], Any]] = {  # classes with a rule, called with what the rule declines
    "max pooling with indices": lambda: (
        Net(
            lambda s, x: s.head(s.m(s.conv(x))[0].flatten(1)),
            conv=nn.Conv2d(1, 2, 1),
            m=nn.MaxPool2d(2, return_indices=True),
            head=nn.Linear(8, 3),
        ),
        torch.randn(N, 1, 4, 4),
    ),
    "adaptive max pooling with indices": lambda: (
        Net(
            lambda s, x: s.head(s.m(s.conv(x))[0].flatten(1)),
            conv=nn.Conv2d(1, 2, 1),
            m=nn.AdaptiveMaxPool2d(2, return_indices=True),
            head=nn.Linear(8, 3),
        ),
        torch.randn(N, 1, 4, 4),
    ),
    "the largest of a bag": lambda: (
        nn.Sequential(nn.EmbeddingBag(5, 4, mode="max"), nn.Linear(4, 3)),
        torch.randint(5, (N, 3)),
    ),
    "a bag by offsets": lambda: (
        Net(
            lambda s, x: s.head(s.m(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))),
            m=nn.EmbeddingBag(5, 4),
            head=nn.Linear(4, 3),
        ),
        torch.randint(5, (N, 3)),
    ),
    "a weighted bag": lambda: (
        Net(
            lambda s, x: s.head(s.m(x, per_sample_weights=torch.full(x.shape, 0.3).double())),
            m=nn.EmbeddingBag(5, 4, mode="sum"),
            head=nn.Linear(4, 3),
        ),
        torch.randint(5, (N, 3)),
    ),
    "a table with max_norm": lambda: (
        Net(
            lambda s, x: s.head(s.m(x).mean(1)),
            m=nn.Embedding(5, 4, max_norm=0.5),
            head=nn.Linear(4, 3),
        ),
        torch.randint(5, (N, 3)),
    ),
    "a transposed convolution of a given size": lambda: (
        Net(
            lambda s, x: s.head(s.m(s.conv(x), output_size=[6, 7]).flatten(1)),
            conv=nn.Conv2d(1, 2, 1),
            m=nn.ConvTranspose2d(2, 1, 2, stride=3),
            head=nn.Linear(42, 3),
        ),
        torch.randn(N, 1, 2, 2),
    ),
    "cross-attention with a mask and weights": lambda: (
        Net(
            lambda s, x: s.head(
                (lambda y, w: y.mean(1) + w.sum(1)[:, :4])(
                    *s.m(s.a(x), x, x, key_padding_mask=torch.arange(5).expand(len(x), 5) > 3)
                )
            ),
            a=nn.Linear(4, 4),
            m=nn.MultiheadAttention(4, 2, batch_first=True),
            head=nn.Linear(4, 3),
        ),
        torch.randn(N, 5, 4),
    ),
}
LAZY = {
    "LazyBatchNorm1d": (4, 2),
    "LazyBatchNorm2d": (4, 2, 2, 2),
    "LazyBatchNorm3d": (4, 2, 1, 2, 2),
    "LazyInstanceNorm1d": (4, 2, 3),
    "LazyInstanceNorm2d": (4, 2, 2, 2),
    "LazyInstanceNorm3d": (4, 2, 2, 1, 2),
}


def has_rule(name: str, kind: str = "layer") -> bool:
    entry = manager().find(kind, getattr(nn, name))
    return entry is not None and not entry.is_fallback


def test_no_class_is_forgotten() -> None:
    losses = set(vars(nn.modules.loss))
    known = NO_LAYERS | set(FALLBACKS) | set(LAZY) | losses | {"AdaptiveLogSoftmaxWithLoss"}
    lost = [name for name in NAMES if name not in known and not has_rule(name)]
    assert lost == []


def test_no_class_is_named_for_nothing() -> None:
    assert [name for name in (*FALLBACKS, *NO_LAYERS, *LAZY) if has_rule(name)] == []
    assert {*FALLBACKS, *LAZY} <= set(NAMES)


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model, x = FALLBACKS[name][1]()
    assert any(type(m).__name__ == name for m in model.modules())
    report = check_model(model, nn.CrossEntropyLoss(), x, Y)
    assert report.refused == {} and "autograd" in {
        line.rule for line in report.rules if line.kind == name
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_a_rule_declines_are_exact(name: str) -> None:
    torch.manual_seed(0)
    assert (
        check_model(
            *(lambda model, x: (model, nn.CrossEntropyLoss(), x, Y))(*OPTIONS[name]())
        ).refused
        == {}
    )


@pytest.mark.parametrize("name", LAZY)
def test_lazy_classes_become_others(name: str) -> None:
    module, x = getattr(nn, name)().eval(), torch.randn(LAZY[name])
    module(x)
    assert type(module).__name__ == name.removeprefix("Lazy") and has_rule(type(module).__name__)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_a_gradient_that_is_none_is_refused(cls: Any) -> None:
    model = nnj.extend(
        nn.Sequential(cls(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.LazyLinear(3))
    )
    with (
        pytest.raises(nnj.NNJError, match="scale_grad_by_freq=True divides"),
        nnj.collect("ggn_diag"),
    ):
        nnj.extend(nn.CrossEntropyLoss())(model(torch.randint(5, (N, 4))), Y).backward()


def test_a_sparse_table_has_what_a_dense_one_has() -> None:
    """Its gradient is sparse, its curvature is not."""
    ids, found = torch.randint(5, (N, 4)), []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nnj.extend(
            Net(
                lambda s, x: s.head(s.m(x).mean(1) + s.bag(x)),
                head=nn.Linear(4, 3),
                m=nn.Embedding(5, 4, sparse=sparse),
                bag=nn.EmbeddingBag(5, 4, sparse=sparse),
            )
        )
        with nnj.collect("ggn_diag", "batch_grad"):
            nnj.extend(nn.CrossEntropyLoss())(model(ids), Y).backward()
        assert model.m.weight.grad.is_sparse == sparse
        found.append([t for p in model.parameters() for t in (p.ggn_diag, p.batch_grad)])
    torch.testing.assert_close(*found)

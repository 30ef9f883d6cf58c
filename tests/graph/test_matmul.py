"""Parameters without a layer: that they are pulled back as fast as a layer's, and dropout with the
masks of the call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.graph.builder import Graph
from nnj.graph.lstm import ROWS
from nnj.graph.nodes import edge_shape
from nnj.jacobians.factor import DenseFactor
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.views import ViewFactor
from nnj.propagation.linearize import linearization
from nnj.propagation.plan_search import plan
from nnj.recording.records import edge_of
from nnj.testing import check_model

N, T, D = 4, 3, 4


class Around(nn.Module):
    """A layer between two that have rules, and the mean over the sequence."""

    def __init__(self, body: nn.Module, call: Any, width: int = D, axis: int = 1):
        super().__init__()
        self.one, self.body, self.head, self.call, self.axis = (
            nn.Linear(D, D),
            body,
            nn.Linear(width, 3),
            call,
            axis,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.body, self.one(x)).mean(self.axis))


def alone(m: Any, x: Tensor) -> Tensor:
    return m(x)


def same(m: Any, x: Tensor) -> Tensor:
    return m(x, x)


def attended(m: Any, x: Tensor) -> Tensor:
    return m(x, x, x)[0]


def half(m: Any, x: Tensor) -> Tensor:
    return m(x[:, :2], x, x)[0]


def first(m: Any, x: Tensor) -> Tensor:
    return m(x)[0]


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(D, 2, batch_first=True, **options)


MODELS = {
    "self-attention": (lambda: Around(attention(), attended), {OuterProduct}),
    "cross-attention": (lambda: Around(attention(), half), {OuterProduct, ViewFactor}),
    "kdim": (lambda: Around(attention(kdim=D, vdim=D), half), {OuterProduct, ViewFactor}),
    "encoder": (
        lambda: Around(nn.TransformerEncoderLayer(D, 2, 3, 0.0, batch_first=True), alone),
        {OuterProduct},
    ),
    "linear": (
        lambda: Around(nn.Linear(D, D), lambda m, x: F.linear(x, m.weight, m.bias)),
        {OuterProduct},
    ),
    "transposed": (
        lambda: Around(nn.Linear(D, D), lambda m, x: x @ m.weight + m.bias),
        {OuterProduct, ViewFactor},
    ),
    "convolution": (
        lambda: Around(nn.Conv1d(T, T, 3), lambda m, x: F.conv1d(x, m.weight, m.bias, padding=1)),
        {OuterProduct},
    ),
    "rnn": (lambda: Around(nn.RNN(D, 3, batch_first=True).double(), first, 3), {OuterProduct}),
    "gru": (lambda: Around(nn.GRU(D, 3, batch_first=True).double(), first, 3), {OuterProduct}),
}


@pytest.mark.parametrize("name", MODELS)
def test_matrices_never_stand_in_explicit_columns(name):
    make, kinds = MODELS[name]
    model = nnj.extend(make().double())
    y = model(torch.randn(N, T, D, dtype=torch.float64))
    params = {id(p): name for name, p in model.named_parameters()}
    graph = Graph([edge_of(y)], lambda p: id(p) in params, {})
    sweep = plan(graph, lambda: N, per_sample=False).sweep
    assert any(step.bare for step in graph.steps)
    # biases that were added
    assert all(len(edge_shape(edge)) == 1 for step in sweep.by_column for edge in step.into)
    found: dict[str, Any] = {}
    sweep.run(
        {edge_of(y): torch.randn(2, *y.shape, dtype=y.dtype)},
        2,
        lambda p, factor: found.setdefault(params[id(p)], factor),
    )
    assert set(found) == set(params.values())
    matrices = {type(factor) for factor in found.values() if len(factor.shape) > 1}
    assert matrices <= kinds and DenseFactor not in matrices


def dense(model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and Jacobian by autograd itself, one output after the other, with the masks that the
    seed gives.
    """
    torch.manual_seed(seed)
    y = model(x)
    named = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(out, list(named.values()), retain_graph=True) for out in y.flatten()
    ]
    return y.detach(), {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)}


OPTIONS: dict[str, Any] = dict(d_model=D, nhead=2, dim_feedforward=3, dropout=0.3)
DROPOUT = {
    "attention": (lambda bf: attention(dropout=0.4), attended),
    "attention-fused": (
        lambda bf: attention(dropout=0.4),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "encoder-layer": (lambda bf: nn.TransformerEncoderLayer(**OPTIONS, batch_first=bf), alone),
    "encoder": (
        lambda bf: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**OPTIONS, batch_first=bf, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        alone,
    ),
    "decoder-layer": (lambda bf: nn.TransformerDecoderLayer(**OPTIONS, batch_first=bf), same),
    "decoder": (
        lambda bf: nn.TransformerDecoder(nn.TransformerDecoderLayer(**OPTIONS, batch_first=bf), 2),
        same,
    ),
    "transformer": (
        lambda bf: nn.Transformer(
            **OPTIONS, batch_first=bf, num_encoder_layers=1, num_decoder_layers=1
        ),
        same,
    ),
    "lstm": (lambda bf: nn.LSTM(D, D, 2, dropout=0.3, batch_first=bf), first),
    "gru": (lambda bf: nn.GRU(D, D, 2, dropout=0.3, batch_first=bf), first),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_has_the_masks_of_the_call(name, batch_first):
    torch.manual_seed(0)
    make, call = DROPOUT[name]
    if name.startswith("attention") and not batch_first:
        body = nn.MultiheadAttention(D, 2, dropout=0.4)
    else:
        body = make(batch_first)
    model = Around(body, call, axis=1 if batch_first else 0).double()
    x, t = torch.randn(N, T, D, dtype=torch.float64), torch.randint(3, (N,))
    x = x if batch_first else x.transpose(0, 1).contiguous()
    y, j = dense(model, x, 5)
    assert not torch.equal(y, dense(model, x, 6)[0])
    h = torch.func.hessian(lambda z: F.cross_entropy(z.view_as(y), t))(y.flatten())
    g = torch.func.grad(lambda z: F.cross_entropy(z, t))(y)
    nnj.extend(model, batch_axis=0 if batch_first else 1)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        torch.manual_seed(5)
        nnj.extend(nn.CrossEntropyLoss())(model(x), t).backward()
    for name, p in model.named_parameters():
        expected = torch.einsum("ab,a...,b...->...", h, j[name], j[name])
        torch.testing.assert_close(p.ggn_diag, expected, rtol=1e-9, atol=1e-12)
        each = torch.einsum("na,na...->n...", g, j[name].unflatten(0, y.shape))
        torch.testing.assert_close(p.batch_grad, each, rtol=1e-9, atol=1e-12)
    rows = [j[f"body.{name}"].flatten(1) for name, _ in model.body.named_parameters(recurse=False)]
    if rows:
        rows = torch.cat(rows, 1)
        torch.testing.assert_close(model.body.ggn_block, rows.T @ h @ rows, rtol=1e-9, atol=1e-12)


class Frozen(nn.Module):
    """A frozen encoder in eval mode, behind a trained layer if there is one: its fused fast path
    would hide the way there.
    """

    def __init__(self, behind: bool):
        super().__init__()
        self.one, self.head = nn.Linear(D, D) if behind else nn.Identity(), nn.Linear(D, 3)
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, 3, batch_first=True), 2
        ).requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(self.one(x)).mean(1))


@pytest.mark.parametrize("behind", [True, False])
def test_the_fast_path_of_a_frozen_encoder(behind):
    torch.manual_seed(0)
    model = Frozen(behind).eval().double()
    check_model(model, nn.CrossEntropyLoss(), torch.randn(N, T, D), torch.randint(3, (N,)))


@pytest.mark.parametrize("n", [N, 2 * ROWS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrence_in_single_precision(cls, bias, n):
    """In float32 the LSTM is one node of oneDNN's, in float64 many: they agree. With many samples
    it is taken apart.
    """
    torch.manual_seed(0)
    model = Around(cls(D, 3, 2, batch_first=True, bidirectional=True, bias=bias), first, 6)
    x, t = torch.randn(n, T, D), torch.randint(3, (n,))
    found = []
    for dtype in (torch.float32, torch.float64):
        nnj.extend(model.to(dtype))
        with nnj.collect("ggn_diag", "batch_grad"):
            nnj.extend(nn.CrossEntropyLoss())(model(x.to(dtype)), t).backward()
        found.append([(p.ggn_diag.double(), p.batch_grad.double()) for p in model.parameters()])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=2e-3, atol=1e-6)


def last_states(m: Any, x: Tensor) -> Tensor:
    """All that an LSTM gives, from a first state that depends on the input."""
    h = torch.tanh(x[:, :1, :3]).transpose(0, 1)
    y, (h, c) = m(x, (h.contiguous(), 2 * h.contiguous()))
    return torch.stack([y[:, 0], h[0], c[0]], 1)


@pytest.mark.parametrize("normed", [False, True])
def test_an_lstm_that_is_taken_apart(normed):
    """Its states, a computed weight, and a call inside a checkpoint; its bits are torch's own."""
    torch.manual_seed(0)
    n, cell = 2 * ROWS, nn.LSTM(D, 3, batch_first=True)
    if normed:
        torch.nn.utils.parametrizations.weight_norm(cell, "weight_ih_l0")
    model = Around(
        cell,
        lambda m, x: torch.utils.checkpoint.checkpoint(last_states, m, x, use_reentrant=False),
        3,
    )
    x, t, found = torch.randn(n, T, D), torch.randint(3, (n,)), []
    for dtype in (torch.float32, torch.float64):
        nnj.extend(model.to(dtype))
        model.zero_grad()
        with nnj.collect("ggn_diag", "batch_grad"):
            nnj.extend(nn.CrossEntropyLoss())(model(x.to(dtype)), t).backward()
        found.append([(p.ggn_diag.double(), p.batch_grad.double()) for p in model.parameters()])
        for p in model.parameters():
            torch.testing.assert_close(p.batch_grad.sum(0), p.grad, rtol=1e-3, atol=1e-6)
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=2e-3, atol=1e-6)


def test_autocast_converts_a_bare_weight_on_the_way():
    torch.manual_seed(0)
    model, x, t = (
        Around(attention(), attended).float(),
        torch.randn(N, T, D),
        torch.randint(3, (N,)),
    )
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.CrossEntropyLoss())(model(x), t).backward()
    expected = [p.ggn_diag for p in model.parameters()]
    with nnj.collect("ggn_diag"), torch.autocast("cpu", torch.bfloat16):
        nnj.extend(nn.CrossEntropyLoss())(model(x), t).backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert p.ggn_diag.dtype == torch.float32
        torch.testing.assert_close(p.ggn_diag, e, rtol=0.1, atol=0.05 * float(e.max()))


def test_weights_of_a_graph_that_is_gone():
    w = nn.Parameter(torch.randn(3, D))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.last = w, nn.Linear(3, 3)

        def forward(self, x):
            return self.last(torch.tanh(x @ self.w.T))

    model, loss = nnj.extend(Bare()), nnj.extend(nn.CrossEntropyLoss())
    y = model(torch.randn(N, D))
    y.sum().backward()
    with (
        pytest.raises(RuntimeError, match="second time|retain_graph=True"),
        nnj.collect("ggn_diag"),
    ):
        loss(y, torch.randint(3, (N,))).backward()


EINSUMS = {  # the equation with the weight w, and the shape of w
    "btd,do->bto": (4, 5),
    "btd,od->bto": (5, 4),
    "wd,btd->btw": (5, 4),
    "btd,dhe->bhte": (4, 2, 3),
    "btd,hde->bhte": (1, 4, 3),
    "btd,hde->bthe": (2, 4, 3),
    "btd,tk->bkd": (6, 2),
    "btd,tdo->bo": (6, 4, 2),
}


class Einsum(nn.Module):
    def __init__(self, equation: str):
        super().__init__()
        self.one, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(EINSUMS[equation]))
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        h, first = torch.tanh(self.one(x)), self.equation.startswith("wd")
        return torch.einsum(self.equation, *((self.w, h) if first else (h, self.w))).flatten(1)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("equation", EINSUMS)
def test_a_weight_in_einsum_is_as_thin_as_a_layers(equation: str, n: int) -> None:
    """It becomes a product in a batch of one."""
    torch.manual_seed(0)
    model, x = Einsum(equation).double(), torch.randn(n, 6, 4).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    j = torch.cat([rows[name].flatten(2) for name in params], 2)
    torch.testing.assert_close(nnj.jacobian(model, x, "weight"), j)
    shared, each = torch.randn(j.shape[2]).double(), torch.randn(n, j.shape[2]).double()
    torch.testing.assert_close(nnj.jvp(model, x, shared, "weight"), j @ shared)
    found = nnj.jvp(model, x, each, "weight")
    torch.testing.assert_close(found, torch.einsum("ncp,np->nc", j, each))
    factors: dict[Tensor, Any] = {}
    at = linearization(model, x, "weight")
    at.factors(at.basis(), factors.__setitem__)
    ((_, thin),) = factors[model.w].parts
    assert isinstance(thin, OuterProduct)


def test_a_transpose_by_an_attribute_is_thin() -> None:
    """`x @ w.T`, of which torch makes a permutation."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(D, D).double())
    model = Around(nn.Identity(), lambda m, x: x @ w.T).double()
    model.register_parameter("w", w)
    at = linearization(model, torch.randn(N, T, D).double(), "weight")
    factors: dict[Tensor, Any] = {}
    at.factors(at.basis(), factors.__setitem__)
    assert isinstance(factors[w], OuterProduct)

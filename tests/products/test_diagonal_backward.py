"""diag_backprop against references written here layer by layer with dense Jacobians: only what
passes between layers is cut.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.cases import CASES
from tests.support.oracle import build, data_of
from tests.support.products import (
    MODELS,
    N,
    bare,
    block_index,
    case,
    dense_jacobian,
    metrics,
    r,
    same,
)

CHAINS = {
    "mlp": (
        lambda: [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)],
        (3,),
    ),
    "ends-in-softmax": (
        lambda: [nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), nn.Softmax(-1)],
        (3,),
    ),
    "cnn": (
        lambda: [
            nn.Conv2d(1, 2, 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 2, 2, padding=1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2, 2),
        ],
        (1, 5, 5),
    ),
    "sequence": (
        lambda: [
            nn.LayerNorm(3),
            nn.Linear(3, 2, bias=False),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4, 2),
        ],
        (2, 3),
    ),
    "linear": (lambda: [nn.Linear(3, 2)], (3,)),
    "flatten-last": (lambda: [nn.Conv1d(2, 2, 2), nn.Flatten()], (2, 3)),
}


def chain(name):
    torch.manual_seed(0)
    make, shape = CHAINS[name]
    layers = [layer.double() for layer in make()]
    return layers, nn.Sequential(*layers), r(N, *shape), r(N, *shape)


def points(layers, x):
    """The input of each layer."""
    found = [x]
    for layer in layers[:-1]:
        found.append(layer(found[-1]).detach())
    return found


def cut(m):
    return m.diagonal(dim1=1, dim2=2).diag_embed()


def reference(layers, x1, x2, m, wrt):
    """J1^T M J2 with the diagonal alone between layers: the blocks of the layers, or the matrix on
    the input.
    """
    xs, zs = points(layers, x1), points(layers, x2)
    blocks = []
    for k in reversed(range(len(layers))):
        if any(p.requires_grad for p in layers[k].parameters()):
            blocks.insert(
                0,
                dense_jacobian(layers[k], xs[k], "weight").mT
                @ m
                @ dense_jacobian(layers[k], zs[k], "weight"),
            )
        m = (
            dense_jacobian(layers[k], xs[k], "input").mT
            @ m
            @ dense_jacobian(layers[k], zs[k], "input")
        )
        m = cut(m) if k else m
    return blocks if wrt == "weight" else m


on_chains = pytest.mark.parametrize("name", CHAINS)
on_slots = pytest.mark.parametrize("wrt", ("input", "weight"))


def diagonals(found):
    parts = found if isinstance(found, list) else [found]
    return torch.cat([t.diagonal(dim1=1, dim2=2) for t in parts], 1)


@on_chains
@on_slots
def test_backward_on_chains(name, wrt):
    layers, model, x, _ = chain(name)
    for given, m in metrics(model(x).shape[1]):
        expected = reference(layers, x, x, m, wrt)
        same(
            nnj.jTmjp(model, x, wrt=wrt, to_diag=True, diag_backprop=True, **given),
            diagonals(expected),
        )
        expected = bare(expected) if wrt == "weight" else expected
        same(nnj.jTmjp(model, x, wrt=wrt, diag_backprop=True, **given), expected)


@on_chains
@on_slots
def test_pairs_on_chains(name, wrt):
    layers, model, x1, x2 = chain(name)
    out = model(x1).shape[1]
    for options in zip(*[metrics(out) for _ in range(3)], strict=True):
        flags = {key: value for key, value in options[0][0].items() if key != "matrix"}
        matrices = tuple(o["matrix"] for o, _ in options) if "matrix" in options[0][0] else None
        expected = [
            reference(layers, a, b, m, wrt)
            for (a, b), (_, m) in zip(((x1, x1), (x1, x2), (x2, x2)), options, strict=True)
        ]
        found = nnj.jTmjp_pair(
            model, x1, x2, matrices, wrt, to_diag=True, diag_backprop=True, **flags
        )
        same(list(found), [diagonals(e) for e in expected])
        found = nnj.jTmjp_pair(model, x1, x2, matrices, wrt, diag_backprop=True, **flags)
        same(list(found), [bare(e) if wrt == "weight" else e for e in expected])


class Add(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_a_residual_neglects_how_its_two_ways_vary_together():
    torch.manual_seed(0)
    first, inner, last = (nn.Linear(3, 3).double() for _ in range(3))
    model = nn.Sequential(first, Add(nn.Sequential(inner, nn.Tanh())), last)
    x, m = r(N, 3), r(N, 3, 3)
    h = first(x).detach()
    a = (inner(h)).detach()
    slope = 1 - torch.tanh(a).square()
    diagonal = (last.weight.T @ m @ last.weight).diagonal(dim1=1, dim2=2)
    back = diagonal * slope.square()
    at_first = diagonal + back @ inner.weight.square()
    expected = [
        torch.cat([(at_first[:, :, None] * x.square()[:, None]).flatten(1), at_first], 1),
        torch.cat([(back[:, :, None] * h.square()[:, None]).flatten(1), back], 1),
    ]
    j = dense_jacobian(last, h + torch.tanh(a).detach(), "weight")
    expected.append((j.mT @ m @ j).diagonal(dim1=1, dim2=2))
    same(
        nnj.jTmjp(model, x, m, "weight", to_diag=True, diag_backprop=True),
        torch.cat(expected, 1).detach(),
    )


class Heads(nn.Module):
    """softmax(q k^T) v of its own making, or fused, behind three linear layers."""

    def __init__(self, fused):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 3).double() for _ in range(3))
        self.fused = fused

    def attend(self, q, k, v):
        if self.fused:
            return nn.functional.scaled_dot_product_attention(
                q[:, None], k[:, None], v[:, None], scale=0.5
            )[:, 0]
        return torch.softmax(0.5 * (q @ k.mT), -1) @ v

    def forward(self, x):
        return self.attend(self.q(x), self.k(x), self.v(x))


@pytest.mark.parametrize("fused", (False, True))
def test_attention(fused):
    """Fused attention is one layer; written out, its three operations are, so that more is cut."""
    torch.manual_seed(0)
    model, x, m = Heads(fused), r(2, 4, 2), r(2, 12).abs()
    q, k, v = (t.detach() for t in (model.q(x), model.k(x), model.v(x)))
    jacobians = lambda f, *ts: [
        j.flatten(-t.dim()).flatten(0, -2).square()
        for t, j in zip(ts, torch.autograd.functional.jacobian(f, ts), strict=True)
    ]
    expected = []
    for n in range(2):
        one = [t[n : n + 1] for t in (q, k, v)]
        if fused:
            squares = jacobians(Heads(False).attend, *one)
            mq, mk, mv = (m[n] @ s.reshape(12, -1) for s in squares)
        else:
            scores = 0.5 * (one[0] @ one[1].mT)
            p = torch.softmax(scores, -1)
            jp, jv = jacobians(lambda p, v: p @ v, p, one[2])
            (js,) = jacobians(lambda s: torch.softmax(s, -1), scores)
            jq, jk = jacobians(lambda q, k: 0.5 * (q @ k.mT), one[0], one[1])
            ms = m[n] @ jp.reshape(12, -1) @ js.reshape(16, 16)
            mq, mk, mv = ms @ jq.reshape(16, -1), ms @ jk.reshape(16, -1), m[n] @ jv.reshape(12, -1)
        parts = []
        for t in (mq, mk, mv):
            t = t.reshape(4, 3)
            parts += [(t.T @ x[n].square()).flatten(), t.sum(0)]
        expected.append(torch.cat(parts))
    # metric is given on the diagonal, so nothing of it is taken exactly at the last layer
    found = nnj.jTmjp(model, x, m, "weight", from_diag=True, to_diag=True, diag_backprop=True)
    same(found, torch.stack(expected))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gru", "lstm")])
def test_every_model_passes_or_names_the_operation(name):
    """The diagonal of blocks is what to_diag gives, and the pair at one point is three times the
    same.
    """
    for wrt in ("input", "weight"):
        model, x, j = case(name, wrt)
        _, x2, _ = case(name, wrt, 1)
        m = r(N, j.shape[1], j.shape[1])
        diagonal = nnj.jTmjp(model, x, m, wrt, to_diag=True, diag_backprop=True)
        assert diagonal.shape == (N, j.shape[2])
        for t in nnj.jTmjp_pair(model, x, x, (m, m, m), wrt, to_diag=True, diag_backprop=True):
            same(t, diagonal)
        assert (
            nnj.jTmjp_pair(model, x, x2, None, wrt, to_diag=True, diag_backprop=True)[1].shape
            == diagonal.shape
        )


def pushed(layers, x, m, wrt):
    """J M J^T with the diagonal alone between layers; m on the input, or the list of the blocks of
    layers.
    """
    xs = points(layers, x)
    blocks = iter(m if wrt == "weight" else [])
    now = m if wrt == "input" else None
    for k, layer in enumerate(layers):
        j = dense_jacobian(layer, xs[k], "input")
        now = None if now is None else j @ (cut(now) if k else now) @ j.mT
        if wrt == "weight" and any(p.requires_grad for p in layer.parameters()):
            j = dense_jacobian(layer, xs[k], "weight")
            own = j @ next(blocks) @ j.mT
            now = own if now is None else now + own
    return now


@on_chains
def test_forward_on_chains_from_the_input(name):
    layers, model, x, _ = chain(name)
    for given, m in metrics(x[0].numel()):
        expected = pushed(layers, x, m, "input")
        same(nnj.jmjTp(model, x, diag_backprop=True, **given), expected)
        same(
            nnj.jmjTp(model, x, diag_backprop=True, to_diag=True, **given),
            expected.diagonal(dim1=1, dim2=2),
        )


@on_chains
def test_forward_on_chains_from_the_weights(name):
    layers, model, x, _ = chain(name)
    index = block_index(model)
    given = metrics(sum(map(len, index)))
    blocks = [r(N, len(i), len(i)) for i in index]
    whole = torch.zeros_like(given[0][1])
    for i, block in zip(index, blocks, strict=True):
        whole[:, torch.tensor(i)[:, None], i] = block
    for options, m in [*given, ({"matrix": blocks}, whole)]:
        expected = pushed(layers, x, [m[:, torch.tensor(i)[:, None], i] for i in index], "weight")
        same(nnj.jmjTp(model, x, wrt="weight", diag_backprop=True, **options), expected)
        same(
            nnj.jmjTp(model, x, wrt="weight", diag_backprop=True, to_diag=True, **options),
            expected.diagonal(dim1=1, dim2=2),
        )


class Functional(nn.Module):
    """x appears in a product of autograd's own, and in a sum."""

    def __init__(self, residual):
        super().__init__()
        self.register_buffer("w", torch.randn(3, 3, dtype=torch.float64))
        self.residual, self.last = residual, nn.Linear(3, 2).double()

    def forward(self, x):
        h = torch.tanh(x @ self.w)
        return self.last(h + x if self.residual else h)


@pytest.mark.parametrize("residual", (False, True))
def test_the_first_operation_is_exact_without_a_rule(residual):
    torch.manual_seed(0)
    model, x = Functional(residual), r(N, 3)
    w, last = model.w.T.expand(N, 3, 3), model.last.weight.detach()
    slope = (1 - torch.tanh(x @ model.w).square()).diag_embed()
    for given, m in metrics(2):
        d = cut(last.T @ m @ last)
        back = cut(slope @ d @ slope)
        expected = w.mT @ back @ w + (d if residual else 0)
        same(nnj.jTmjp(model, x, diag_backprop=True, **given), expected)
        same(
            nnj.jTmjp(model, x, diag_backprop=True, to_diag=True, **given),
            expected.diagonal(dim1=1, dim2=2),
        )
    for given, m in metrics(3):
        d = slope @ cut(w @ m @ w.mT) @ slope + (cut(m) if residual else 0)
        expected = last @ d @ last.T
        same(nnj.jmjTp(model, x, diag_backprop=True, **given), expected)


@pytest.mark.parametrize("name", ("softmax", "linear"))
def test_one_layer_neglects_nothing(name):
    for wrt in ("input", "weight"):
        model, x, j = case(name, wrt)
        m, n = r(N, j.shape[1], j.shape[1]), r(N, j.shape[2], j.shape[2])
        same(nnj.jTmjp(model, x, m, wrt, diag_backprop=True), j.mT @ m @ j if j.shape[2] else [])
        same(nnj.jmjTp(model, x, n, wrt, diag_backprop=True), j @ n @ j.mT)


@pytest.mark.parametrize(
    "name",
    ["residual", "densenet", "transformer", "bare-parameters", "called-twice", "tied", "frozen"],
)
def test_forward_through_any_model(name):
    """With diagonals the way forward is the transpose of the way back: m . (J M J^T) = (J^T m J) .
    M.
    """
    for wrt in ("input", "weight"):
        model, x, j = case(name, wrt)
        m, v = r(N, j.shape[1]), r(N, j.shape[2])
        there = nnj.jmjTp(model, x, v, wrt, from_diag=True, to_diag=True, diag_backprop=True)
        back = nnj.jTmjp(model, x, m, wrt, from_diag=True, to_diag=True, diag_backprop=True)
        same((there * m).sum(1), (back * v).sum(1))


class Cumulative(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)


def test_refusals_name_the_operation():
    model, x = nn.Sequential(nn.Linear(2, 3), Cumulative(), nn.Linear(3, 2)).double(), r(N, 2)
    for run in (
        lambda: nnj.jTmjp(model, x, None, "weight", to_diag=True, diag_backprop=True),
        lambda: nnj.jmjTp(model, x, diag_backprop=True, to_diag=True),
    ):
        with pytest.raises(
            nnj.NNJError,
            match=r"diag_backprop cannot go on at .*Cumsum.*: no rule says what the squares",
        ):
            run()
    with pytest.raises(
        nnj.NNJError, match=r"no full matrix on all parameters\. Leave out joint, or diag_backprop"
    ):
        nnj.jTmjp(model, x, None, "weight", diag_backprop=True, joint=True)
    with pytest.raises(
        nnj.NNJError, match="keeps only the diagonal at a parameter that no layer with a rule owns"
    ):
        nnj.jTmjp(
            case("bare-parameters", "weight")[0],
            case("bare-parameters", "weight")[1],
            None,
            "weight",
            diag_backprop=True,
        )


class Fork(nn.Module):
    """Another way for large inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.one(x) if x.sum() > 0 else torch.tanh(self.two(x))


def test_pairs_on_other_ways_are_refused():
    model, x = Fork(), r(N, 2).abs()
    with pytest.raises(nnj.NNJError, match="the model does other operations at x1 than at x2"):
        nnj.jTmjp_pair(model, x, -x, None, "input", to_diag=True, diag_backprop=True)


class Sine(nn.Module):
    """An operation without a layer stands at the input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.sin())


def test_pairs_behind_an_operation_on_the_input():
    model, x1, x2, m = Sine().double(), r(N, 3), r(N, 3), r(N, 2, 2)
    w = model.head.weight.detach()
    middle = (w.T @ m @ w).diagonal(dim1=1, dim2=2)
    found = nnj.jTmjp_pair(model, x1, x2, (m, m, m), diag_backprop=True)
    for (a, b), matrix in zip(((x1, x1), (x1, x2), (x2, x2)), found, strict=True):
        same(matrix, (a.cos() * middle * b.cos()).diag_embed())


class Probabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return torch.softmax(self.head(x), -1)


@on_slots
@pytest.mark.parametrize("to_diag", (True, False))
def test_one_sample_is_what_it_is_among_others(wrt, to_diag):
    """A full metric goes exactly through operations behind the last layer, and comes so from
    them.
    """
    model, x, m = Probabilities().double(), r(N, 3), r(N, 4, 4)
    flags = {"wrt": wrt, "to_diag": to_diag, "diag_backprop": True}
    same(nnj.jTmjp(model, x[:1], m[:1], **flags), nnj.jTmjp(model, x, m, **flags)[:1])
    same(nnj.jmjTp(model, x[:1], **flags), nnj.jmjTp(model, x, **flags)[:1])


def test_refused_where_a_layer_stands_for_each_sample_by_itself():
    case = CASES["loop-over-slices"]
    with pytest.raises(nnj.NNJError, match="only where a layer has one row for each sample"):
        nnj.jTmjp(build(case), data_of(case)[0], None, "weight", diag_backprop=True)


@pytest.mark.parametrize("product", (nnj.jTmjp, nnj.jmjTp))
def test_refused_at_a_checkpoint(product):
    case = CASES["mha-checkpointed"]
    with pytest.raises(nnj.NNJError, match="cannot go on at torch.utils.checkpoint"):
        product(build(case), data_of(case)[0], None, "input", to_diag=True, diag_backprop=True)


@pytest.mark.parametrize("name", ("einsum-ensemble", "transposed-batch"))
def test_a_full_metric_where_nothing_has_to_know_whose_rows_are(name):
    """The last layer has no wanted parameters, so that no probe has looked at its output."""
    model, x = build(CASES[name]), data_of(CASES[name])[0]
    eye = torch.eye(nnj.jacobian(model, x).shape[1], dtype=x.dtype)
    flags = {"to_diag": True, "diag_backprop": True}
    found, expected = nnj.jTmjp(model, x, eye, **flags), nnj.jTmjp(model, x, **flags)
    assert found.shape == expected.shape and bool(found.isfinite().all())

"""A sample is a row of the batch axis of the model's output, whatever rows the loss is given: every
quantity is right for it, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.propagation.backward import Sweep
from nnj.propagation.glue import Glue
from tests.support.cases import MLP, Do, do, linear
from tests.support.whose_rows import (
    BARE,
    EACH,
    GRU,
    MIXED,
    Model,
    Run,
    classes,
    entropy,
    entropy_in_the_last_axis,
    frozen_first,
    numbers,
    r,
    squares,
)

ALL = ("ggn_diag", "ggn_block", "batch_grad")
REFUSED = r"batch_grad: .*\. .*([Gg]ive|Call|Let|Extend).*; sums over samples"


WAYS: dict[str, Any] = {
    "layers": EACH,
    "frozen-first": frozen_first(EACH),
    "bare": BARE,
    "scaled": do(lambda s, x: s.net(2 * x + 1), net=EACH),
}
VECTORS = {f"{name}": Model(make, lambda: r(4, 4)) for name, make in WAYS.items()}
SEQUENCES = {
    f"{name}-{t}": Model(make, lambda t=t: r(3, t, 4))
    for name, make in {**WAYS, "mixed": MIXED, "mixed-frozen": frozen_first(MIXED)}.items()
    for t in (2, 3)
}
AXIS_1 = {
    f"{name}-{t}": Model(make, lambda t=t: r(t, 3, 4), 1, 1)
    for name, make in {**WAYS, "recurrent": GRU}.items()
    for t in (2, 3)
}

# -- (N, C) ----------------------------------------------------------------------------------------

GLUE: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda z: z,
    "there-and-back": lambda z: torch.cat([z, z.flip(0)]),
    "again": lambda z: z[[0, 0, 0, 1, 1, 2, 3, 3]],
    "permuted": lambda z: z[[2, 0, 3, 1]],
    "as-many-picked": lambda z: z[[1, 1, 3, 0]],
    "flipped": lambda z: z.flip(0),
    "rolled": lambda z: z.roll(1, 0),
    "repeated": lambda z: z.repeat(3, 1),
    "interleaved": lambda z: z.repeat_interleave(3, 0),
    "softened": lambda z: z[[3, 2, 1, 0]].log_softmax(-1) / 2,
    "some": lambda z: z[[0, 3]],
    "strided": lambda z: z[::2],
    "in-pieces": lambda z: torch.cat(z.split([1, 3])[::-1]),
    "stacked": lambda z: torch.stack([z, z.flip(0)], 1).flatten(0, 1),
}


@pytest.mark.parametrize("model", VECTORS)
@pytest.mark.parametrize("glue", GLUE)
def test_rearranged(glue, model):
    run = lambda m, x, ext: entropy(GLUE[glue](m(x)), ext)
    assert VECTORS[model].wrong(run, *ALL) == []


@pytest.mark.parametrize("model", VECTORS)
def test_two_losses_on_rows_in_other_orders(model):
    """They are added up sample by sample."""

    def run(m, x, ext):
        z = m(x)
        return entropy(z, ext) + 0.5 * squares(z[[2, 0, 3, 1]], ext) + squares(z[1:3], ext)

    assert VECTORS[model].wrong(run, *ALL) == []


@pytest.mark.parametrize("model", VECTORS)
def test_a_loss_on_pairs_of_samples(model):
    """Each by itself has a share of the gradient; curvature is that of the pair."""
    run = lambda m, x, ext: (lambda z: ext(nn.MSELoss())(z[:2], z[2:]))(m(x))
    assert VECTORS[model].wrong(run, *ALL) == []
    assert VECTORS[model].wrong(run, *ALL, memory=1) == []


@pytest.mark.parametrize("model", VECTORS)
def test_differences_have_sums_alone(model):
    run = lambda m, x, ext: (lambda z: squares(z[:2] - z[2:], ext))(m(x))
    assert VECTORS[model].wrong(run, "ggn_diag", "ggn_block") == []
    with pytest.raises(nnj.NNJError, match=REFUSED):
        VECTORS[model].collected(run, "batch_grad")


# -- (N, T, C) -------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda z: z.flatten(0, 1),
    "token-major": lambda z: z.transpose(0, 1).flatten(0, 1),
    "class-axis": lambda z: z.transpose(1, 2),
    "samples-last": lambda z: z.permute(1, 2, 0),
    "masked": lambda z: z[torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]]).bool()[:, : z.shape[1]]],
    "as-many-masked": lambda z: z[[0, 0, 2], [1, 0, 1]],
    "last-of-each": lambda z: z[[0, 1, 2], [1, 0, 1]],
    "turned-round": lambda z: z.flip(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("model", SEQUENCES)
def test_sequences(model):
    """As many tokens as samples, too."""
    for glue in PLACES.values():
        run = lambda m, x, ext, glue=glue: entropy(glue(m(x)), ext)
        assert SEQUENCES[model].wrong(run, *ALL) == []
    for glue in (PLACES["masked"], PLACES["as-many-masked"], PLACES["samples-last"]):
        run = lambda m, x, ext, glue=glue: squares(glue(m(x)), ext)
        assert SEQUENCES[model].wrong(run, *ALL) == []


@pytest.mark.parametrize("model", ["layers-3", "frozen-first-3", "bare-3"])
def test_a_mean_over_samples_does_not_make_samples_of_tokens(model):
    """As many tokens as samples: sums are exact by tokens, where nothing is known to the
    contrary.
    """
    run = lambda m, x, ext: squares(m(x).mean(0), ext)
    with pytest.raises(nnj.NNJError, match=f"{REFUSED}|seen at what the loss is given"):
        SEQUENCES[model].collected(run, "batch_grad")
    if model == "frozen-first-3":
        assert SEQUENCES[model].wrong(run, "ggn_diag", "ggn_block") == []


# -- (T, N, C), and other axes ---------------------------------------------------------------------


@pytest.mark.parametrize("model", AXIS_1)
def test_batch_axis_1(model):
    """As many tokens as samples, too."""
    for glue in (PLACES["rows"], PLACES["token-major"], lambda z: z.permute(1, 2, 0)):
        run = lambda m, x, ext, glue=glue: entropy(glue(m(x)), ext)
        assert AXIS_1[model].wrong(run, *ALL) == []
    for loss in (squares, entropy_in_the_last_axis):
        run = lambda m, x, ext, loss=loss: loss(m(x), ext)
        assert AXIS_1[model].wrong(run, *ALL) == []


def hidden(layers: int, frozen: int = 0) -> Model:
    def make() -> nn.Module:
        cell = nn.GRU(4, 2, num_layers=layers, batch_first=True)
        for name, p in cell.named_parameters():
            p.requires_grad_(int(name[-1]) >= frozen)
        return Do(lambda s, x: s.cell(x)[1], cell=cell)

    return Model(make, lambda: r(3, 2, 4), 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_hidden_states(layers):
    """(layers, N, C), with as many layers as samples, too."""
    assert hidden(layers).wrong(lambda m, x, ext: squares(m(x), ext), *ALL) == []
    assert hidden(layers).wrong(lambda m, x, ext: squares(m(x)[-2:], ext), *ALL) == []


@pytest.mark.parametrize(
    "model, run",
    [
        (hidden(3), lambda m, x, ext: squares(m(x)[-1], ext)),
        (hidden(3, frozen=2), lambda m, x, ext: squares(m(x), ext)),
    ],
)
def test_two_ways_of_reading(model, run):
    """Nothing tells whether layers or samples are in the axis that was declared."""
    assert model.wrong(run, "ggn_diag", "ggn_block") == []
    with pytest.raises(nnj.NNJError, match=REFUSED):
        model.collected(run, "batch_grad")


@pytest.mark.parametrize("way", WAYS)
def test_an_axis_of_one_before_the_samples(way):
    model = Model(do(lambda s, x: s.net(x)[None], net=WAYS[way]), lambda: r(3, 4), 1)
    for glue in (lambda z: z, lambda z: z[0], lambda z: z[0, [2, 0, 0]]):
        run = lambda m, x, ext, glue=glue: squares(glue(m(x)), ext)
        assert model.wrong(run, *ALL) == []


def test_no_batch_axis():
    """One sample."""
    for make in (MLP, BARE, lambda: nn.Linear(4, 3)):
        model = Model(make, lambda: r(4))
        model.dense  # noqa: B018
        z, j, samples = model.dense
        model.__dict__["dense"] = z, j, torch.zeros_like(samples)
        for loss in (squares, lambda z, ext: ext(nn.CrossEntropyLoss())(z, torch.tensor(1))):
            assert model.wrong(lambda m, x, ext, loss=loss: loss(m(x), ext), *ALL) == []


# -- parts of a batch ------------------------------------------------------------------------------

EIGHT = {name: Model(make, lambda: r(8, 4)) for name, make in WAYS.items()}


def in_parts(*sizes: int) -> Run:
    return lambda m, x, ext: entropy(torch.cat([m(part) for part in x.split(list(sizes))]), ext)


@pytest.mark.parametrize("model", EIGHT)
def test_parts_of_a_batch(model):
    """Samples number on through the calls."""
    for sizes in ((6, 2), (3, 3, 2), (1, 7)):
        assert EIGHT[model].wrong(in_parts(*sizes), *ALL) == []

    def together(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.cat([a, b]), y)

    run = lambda m, x, ext: ext(in_two)(m(x[:2]), m(x[2:]), numbers(8, 3))
    in_two = together
    assert EIGHT[model].wrong(run, *ALL) == []


@pytest.mark.parametrize("model", EIGHT)
def test_equal_parts(model):
    """They may be the same samples, or others: sums over samples are the same."""
    pair = lambda m, x, ext: ext(nn.MSELoss())(m(x[:4]), m(x[4:]))
    for run in (in_parts(4, 4), in_parts(2, 2, 2, 2), pair):
        assert EIGHT[model].wrong(run, "ggn_diag", "ggn_block") == []
        with pytest.raises(nnj.NNJError, match=r"called several times.*torch\.cat"):
            EIGHT[model].collected(run, "batch_grad")


@pytest.mark.parametrize("model", EIGHT)
def test_the_same_samples_twice(model):
    """By the same tensor, and by what another call has made of it."""
    run = lambda m, x, ext: entropy(m(x) + 2 * m(x), ext)
    assert EIGHT[model].wrong(run, *ALL) == []


def test_a_loss_on_one_part_and_one_on_all():
    """Rows of samples would be there twice."""

    def run(m, x, ext):
        a, b = m(x[:6]), m(x[6:])
        return squares(a, ext) + entropy(torch.cat([a, b]), ext)

    model = EIGHT["layers"]
    assert model.wrong(run, "ggn_diag", "ggn_block") == []
    with pytest.raises(nnj.NNJError, match=r"more calls.*torch\.cat"):
        model.collected(run, "batch_grad")


def test_parts_behind_a_model_that_is_called_once():
    """What the parts have in common tells that they are parts."""
    torch.manual_seed(0)
    body, head = nnj.extend(nn.Linear(4, 3).double()), nnj.extend(nn.Linear(3, 3).double())
    loss, x, y = nnj.extend(nn.CrossEntropyLoss(reduction="sum")), r(8, 4), classes(8)

    def outputs() -> Tensor:
        h = torch.tanh(body(x))
        return torch.cat([head(h[:4]), head(h[4:])])

    for run in (
        lambda: loss(outputs(), y),
        lambda: (lambda h: loss(head(h[:6]), y[:6]) + loss(head(h[6:]), y[6:]))(body(x).tanh()),
    ):
        with nnj.collect("batch_grad"):
            run().backward()
        for i in range(8):
            (g,) = torch.autograd.grad(F.cross_entropy(outputs()[i], y[i]), body.weight)
            torch.testing.assert_close(body.weight.batch_grad[i], g)


def test_a_state_that_goes_from_call_to_call():
    torch.manual_seed(0)
    cell = nnj.extend(nn.Linear(3, 3).double())
    x = r(4, 3)

    def states() -> Tensor:
        h, found = x, []
        for _ in range(3):
            h = torch.tanh(cell(h))
            found.append(h)
        return torch.stack(found).sum(0)

    loss, y = nnj.extend(nn.CrossEntropyLoss(reduction="sum")), classes(4)
    with nnj.collect("batch_grad"):
        loss(states(), y).backward()
    for i in range(4):
        (g,) = torch.autograd.grad(F.cross_entropy(states()[i], y[i]), cell.weight)
        torch.testing.assert_close(cell.weight.batch_grad[i], g)


# -- losses without a curvature --------------------------------------------------------------------


@pytest.mark.parametrize("t", [4, 3])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layer", ["recurrent", "each"])
def test_ctc(t, inside, layer):
    """(T, N, C), where the model or the user has put the samples there, with T = N, too."""
    torch.manual_seed(0)
    part: Any = nn.GRU(4, 3, batch_first=True) if layer == "recurrent" else nn.Linear(4, 3)
    turned = (lambda z: z.transpose(0, 1)) if inside else (lambda z: z)
    after = (lambda z: z) if inside else (lambda z: z.transpose(0, 1))
    taken = (lambda z: z[0]) if layer == "recurrent" else (lambda z: z)
    model = nnj.extend(
        Do(lambda s, x: turned(s.head(taken(s.part(x)))), part=part, head=nn.Linear(3, 5)).double()
    )
    x, y = r(3, t, 4), torch.randint(1, 5, (3, 2))
    lengths, targets = torch.full((3,), t), torch.full((3,), 2)
    loss = nn.CTCLoss(reduction="sum")
    run = lambda x, y, a, b, loss: loss(after(model(x)).log_softmax(-1), y, a, b)
    with nnj.collect("batch_grad"):
        run(x, y, lengths, targets, nnj.extend(loss)).backward()
    for i in range(3):
        alone = run(
            x[i : i + 1], y[i : i + 1], lengths[:1], targets[:1], nn.CTCLoss(reduction="sum")
        )
        grads = torch.autograd.grad(alone, list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.batch_grad[i], g, rtol=1e-9, atol=1e-12)


# -- refusals --------------------------------------------------------------------------------------


def test_true_reasons():
    """What was said is not asked for; where the samples were looked for; remedies."""
    coupled = do(lambda s, x: s.one(x) - s.one(x).mean(1, keepdim=True), one=linear(4, 3))
    sequence = Model(coupled, lambda: r(5, 3, 4), 1, 1)
    with pytest.raises(nnj.NNJError, match=r"axis 1 of the output \(5, 3, 3\).*as batch_axis=1"):
        sequence.collected(lambda m, x, ext: entropy(m(x).flatten(0, 1), ext), "ggn_diag")
    run = lambda m, x, ext: (lambda z: squares(z - z.mean(0), ext))(m(x))
    with pytest.raises(nnj.NNJError, match="seen at what the loss is given"):
        VECTORS["layers"].collected(run, "ggn_diag")
    coupling = lambda z, y: (z.logsumexp(1).square().sum() - y.sum()).square()
    run = lambda m, x, ext: ext(coupling)(m(x), numbers(2, 3, 3))
    with pytest.raises(nnj.NNJError, match="couples"):
        AXIS_1["layers-2"].collected(run, "ggn_diag")


def test_all_nodes_of_a_graph_as_one_sample():
    """The remedy of the sentence."""
    graph = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]], dtype=torch.float64)
    net = do(lambda s, x: s.head(graph @ s.one(x)), one=linear(4, 3), head=linear(3, 3))
    nodes = Model(net, lambda: r(3, 4))
    with pytest.raises(nnj.NNJError, match=r"nodes of a graph.*x\[None\].*model\(x\[0\]\)\[None\]"):
        nodes.collected(lambda m, x, ext: entropy(m(x), ext), "ggn_diag")
    whole = Model(do(lambda s, x: s.net(x[0])[None], net=net), lambda: r(1, 3, 4))
    assert whole.wrong(lambda m, x, ext: entropy(m(x)[0], ext), *ALL) == []


def test_what_the_loss_is_given_is_not_asked_where_names_tell(monkeypatch):
    def refuse(*args):
        raise AssertionError("probed")

    monkeypatch.setattr(Glue, "_asked", refuse)
    AXIS_1["layers-3"].collected(lambda m, x, ext: entropy(m(x).permute(1, 2, 0), ext), *ALL)
    monkeypatch.setattr(Sweep, "_find_sample_indices", refuse)
    for model in (VECTORS["layers"], SEQUENCES["mixed-2"]):
        model.collected(lambda m, x, ext: squares(m(x), ext), *ALL)
    for glue in ("rows", "token-major", "class-axis", "samples-last"):
        SEQUENCES["mixed-2"].collected(
            lambda m, x, ext, glue=glue: entropy(PLACES[glue](m(x)), ext), *ALL
        )


# -- products --------------------------------------------------------------------------------------

CONSTANT = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "cat-of-split": lambda q: torch.cat([CONSTANT[:1] * p for p in q.split(1)]),
    "cat": lambda q: torch.cat(q.split(1)),
    "stack": lambda q: torch.stack([p * 2 for p in q]),
    "itself": lambda q: q,
}


@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("how", HIDDEN)
def test_coupled_in_columns_of_single_samples(how, verify, monkeypatch):
    monkeypatch.setenv("NNJ_VERIFY", verify)
    x = r(3, 3)
    for centred in (
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: CONSTANT - x.mean(0, keepdim=True),
        lambda x: CONSTANT * x.sum(0),
    ):
        model = Do(lambda s, x, centred=centred: HIDDEN[how](centred(x)))
        for product in (
            lambda model=model: nnj.jacobian(model, x),
            lambda model=model: nnj.jvp(model, x, x),
            lambda model=model: nnj.vjp(model, x, x),
            lambda model=model: nnj.jTmjp(model, x, diag_backprop=True),
        ):
            with pytest.raises(nnj.NNJError, match="samples influence one another"):
                product()

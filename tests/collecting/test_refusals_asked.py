"""What collect and extend do not take, and what a collect has not found, is said in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.collecting.request import Request
from tests.collecting.test_cases import QUANTITIES, collected, extended
from tests.support.cases import MLP, Case, vectors
from tests.support.oracle import build, data_of
from tests.whole.test_refusals import intact


@pytest.mark.parametrize(
    "names, options, words",
    [
        (
            ("ggn_diagonal",),
            {},
            (
                r"unknown quantity 'ggn_diagonal'.*did you mean 'ggn_diag'.*Known: batch_grad, "
                r"ggn_block, ggn_diag, "
            ),
        ),
        (("diag",), {}, "unknown quantity 'diag'.*Known"),
        ((), {}, "name of a quantity"),
        ((3,), {}, "unknown quantity 3"),
        (("ggn_diag",), {"samples": 2}, "unknown option 'samples'"),
        (("ggn_diag_mc",), {"sample": 2}, "unknown option 'sample'.*did you mean 'samples'"),
        (("ggn_diag_mc",), {"samples": 0}, "samples=0"),
        (("ggn_diag_mc",), {"samples": 1.5}, "samples=1.5"),
        (("ggn_diag",), {"modules": ["head"]}, "modules="),
    ],
)
def test_what_collect_does_not_know(names, options, words):
    with pytest.raises(nnj.NNJError, match=words):
        nnj.collect(*names, **options)


def test_a_source_of_columns_that_there_is_not():
    class Odd(nnj.Quantity):
        source = "hessian"

        def parameter(self, factor, total_columns):
            return factor.square_sum()

    with pytest.raises(
        nnj.PluginError,
        match=r"^the quantity 'odd' has source='hessian', expected 'exact', 'signs' or 'gradient'$",
    ):
        Request({"odd": Odd()})


def test_nothing_collected_is_said_at_the_end_of_the_with():
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    with (
        pytest.raises(
            nnj.NNJError, match=r"nothing was collected for ggn_diag, ggn_block.*nnj\.extend"
        ),
        nnj.collect("ggn_diag", "ggn_block"),
    ):
        pass
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        loss(model(x), y)
    with (
        pytest.raises(nnj.NNJError, match="nothing was collected"),
        nnj.collect("ggn_diag"),
        torch.no_grad(),
    ):
        loss(model(x), y)
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []


def test_an_extended_loss_on_a_model_that_is_not():
    """It must not end silently with nothing collected."""
    model, loss = build(Case("", MLP, vectors)), nnj.extend(nn.CrossEntropyLoss())
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"extend"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()


def test_modules_that_the_pass_does_not_reach():
    """As with .grad: None."""
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    other = nn.Linear(2, 2)
    with nnj.collect("ggn_diag", modules=[other]):
        loss(model(x), y).backward()
    assert other.weight.ggn_diag is None and not hasattr(model.one.weight, "ggn_diag")


def test_everything_frozen():
    """A loss without a graph raises torch's own error; nnj adds no other."""
    model, (loss,) = extended(Case("", MLP, vectors))
    model.requires_grad_(False)
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(RuntimeError, match="does not require grad"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    with nnj.collect("ggn_diag"):
        loss(model(x.requires_grad_()), y).backward()
    intact(model)


@pytest.mark.parametrize("wrong", [3, "model", nn.Linear, [nn.Linear(1, 1)], None])
def test_what_extend_does_not_take(wrong):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or a function"):
        nnj.extend(wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "order", ["extend the compiled", "compile the extended", "compile in place", "compile a part"]
)
def test_compiled(backend, order):
    torch._dynamo.reset()
    model, loss = build(Case("", MLP, vectors)), nnj.extend(nn.CrossEntropyLoss())
    alone = build(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    F.cross_entropy(alone(x), y).backward()
    if order == "extend the compiled":
        with pytest.raises(nnj.NNJError, match=r"compile.*_orig_mod"):
            nnj.extend(torch.compile(model, backend=backend))
        return
    called: Any = nnj.extend(model)
    if order == "compile the extended":
        called = torch.compile(model, backend=backend)
    elif order == "compile in place":
        model.compile(backend=backend)
    else:
        model.two.compile(backend=backend)
    try:
        with nnj.collect("ggn_diag"):
            loss(called(x), y).backward()
    except nnj.NNJError as error:
        assert "compile" in str(error)
        intact(model)
    else:  # a backend that leaves autograd's own nodes may be exact
        from tests.support.oracle import Truth, close

        truth = Truth(Case("", MLP, vectors))
        assert all(close(p.ggn_diag, truth.diag(n)) == "" for n, p in model.named_parameters())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch._dynamo.reset()

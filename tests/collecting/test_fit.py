"""nnj.fit in batches of any size: what one pass over the data set gives; its bar, its refusals."""

from __future__ import annotations

import copy
import functools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nnj
from nnj.registry.manager import manager, use
from tests.support.fitting import (
    BITS,
    CLASSES,
    HOLES,
    IMAGE,
    LOADER,
    PLACES,
    REAL,
    SHARES,
    C,
    N,
    W,
    X,
    agree,
    batches,
    dense,
    expected,
    mlp,
)


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, C, 1)).double()


# the model, the loss under a reduction, inputs and targets
LOSSES: dict[str, tuple[Any, Any, Any, Tensor]] = {
    "cross entropy": (mlp, nn.CrossEntropyLoss, X, CLASSES),
    "class weights": (mlp, functools.partial(nn.CrossEntropyLoss, weight=W), X, CLASSES),
    "ignored": (mlp, nn.CrossEntropyLoss, X, HOLES),
    "weights, ignored, smoothed": (
        mlp,
        functools.partial(nn.CrossEntropyLoss, weight=W, label_smoothing=0.2),
        X,
        HOLES,
    ),
    "ignored class": (
        mlp,
        functools.partial(nn.CrossEntropyLoss, weight=W, ignore_index=1),
        X,
        CLASSES,
    ),
    "soft targets": (mlp, functools.partial(nn.CrossEntropyLoss, weight=W), X, SHARES),
    "places": (
        convolution,
        functools.partial(nn.CrossEntropyLoss, weight=W, ignore_index=2),
        IMAGE,
        PLACES,
    ),
    "nll": (
        functools.partial(mlp, nn.LogSoftmax(1)),
        functools.partial(nn.NLLLoss, weight=W),
        X,
        HOLES,
    ),
    "mse": (mlp, nn.MSELoss, X, REAL),
    "bits": (mlp, functools.partial(nn.BCEWithLogitsLoss, pos_weight=W, weight=W.flip(0)), X, BITS),
    "smooth l1": (mlp, nn.SmoothL1Loss, X, 3 * REAL),
    "huber": (mlp, nn.HuberLoss, X, 3 * REAL),
    "poisson": (mlp, nn.PoissonNLLLoss, X, SHARES),
    "soft margin": (mlp, nn.SoftMarginLoss, X, 2 * BITS - 1),
    "multi-label": (mlp, functools.partial(nn.MultiLabelSoftMarginLoss, weight=W), X, BITS),
    "kl": (functools.partial(mlp, nn.LogSoftmax(1)), nn.KLDivLoss, X, SHARES),
}


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_batch_or_many(name, scale, size):
    make, loss, x, y = LOSSES[name]
    model = make()
    diag, block, gradient = dense(model, loss(reduction=scale), x, y)
    for own in ("mean", "sum", "none"):  # the loss's own reduction is of no account
        fit = nnj.fit(
            model,
            loss(reduction=own),
            batches(x, y, size),
            "ggn_diag",
            "ggn_block",
            "batch_grad",
            scale=scale,
        )
        agree(fit["ggn_diag"], diag)
        agree(fit["ggn_block"], block)
        agree({path: t.sum(0) for path, t in fit["batch_grad"].items()}, gradient)
        assert (
            fit.samples == N
            and fit.scale == scale
            and all(len(t) == N for t in fit["batch_grad"].values())
        )


def test_batch_grad_is_in_the_order_of_the_loader():
    model = mlp().eval()
    fit = nnj.fit(model, nn.CrossEntropyLoss(), batches(X, CLASSES, 3), "batch_grad")
    for i in range(N):
        _, _, gradient = dense(model, nn.CrossEntropyLoss(), X[i : i + 1], CLASSES[i : i + 1])
        agree({path: t[i] for path, t in fit["batch_grad"].items()}, gradient)


def test_draws_are_those_of_collect():
    model = nnj.extend(mlp().eval())
    loss = nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    with nnj.collect("ggn_diag_mc", samples=3, generator=torch.Generator().manual_seed(5)):
        for x, y in batches(X, CLASSES, 3):
            loss(model(x), y).backward()
    expected = {name: p.ggn_diag_mc / N for name, p in model.named_parameters()}
    agree(
        nnj.fit(
            model,
            nn.CrossEntropyLoss(),
            batches(X, CLASSES, 3),
            "ggn_diag_mc",
            scale="mean",
            samples=3,
            generator=torch.Generator().manual_seed(5),
        )["ggn_diag_mc"],
        expected,
    )


# -- the bar ---------------------------------------------------------------------------------------


def test_a_bar(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setitem(
        sys.modules, "tqdm", types.SimpleNamespace(tqdm=lambda it, **kw: (seen.append(kw), it)[1])
    )
    nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "ggn_diag")
    assert seen == []
    nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "ggn_diag", progress=True)
    assert seen == [{"desc": "nnj.fit", "unit": "batch"}]


def test_no_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.warns(
        UserWarning,
        match=r"^progress=True shows a bar by tqdm, which is not installed: pip install tqdm$",
    ):
        fit = nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "ggn_diag", progress=True)
    agree(fit["ggn_diag"], expected())


# -- refusals --------------------------------------------------------------------------------------


class Odd(nnj.Quantity):
    """A quantity that does not say how it grows with the loss."""

    source = "gradient"

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.dense().square().sum((0, 1))


@pytest.fixture
def odd():
    former = manager()
    mine = copy.copy(former)

    class Plugin:
        @nnj.hookimpl
        def nnj_register_quantities(self, register):
            register("odd", Odd)

    former.load()
    mine.register(Plugin(), "odd")
    use(mine)
    yield
    use(former)


def test_a_quantity_that_cannot_be_divided(odd):
    fit = nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "odd", "batch_grad")
    agree(fit["odd"], {name: t.square().sum(0) for name, t in fit["batch_grad"].items()})
    with pytest.raises(
        nnj.NNJError,
        match=r"^odd: Odd does not say how it grows with the loss \(its attribute degree\), so "
        r"that "
        r"nnj\.fit cannot divide it\. Use scale='sum'$",
    ):
        nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "odd", scale="mean")
    Odd.degree = 2
    try:
        mean = nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "odd", scale="mean")
    finally:
        Odd.degree = None
    agree(mean["odd"], {name: t / N**2 for name, t in fit["odd"].items()})


class Parts(nn.Linear):
    """A model whose output has parts."""

    def forward(self, x):
        return {"scores": super().forward(x)}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": (
        dict(loader=[]),
        r"^the loader gave no samples, and a data set has at least one\. \(An iterator can be "
        r"read only ",
    ),
    "scale": (dict(scale="average"), r"^scale='average', expected 'sum' or 'mean'$"),
    "reduction": (
        dict(reduction="none", loss_func=F.cross_entropy),
        r"^reduction='none', expected 'sum' or 'mean'$",
    ),
    "known": (
        dict(reduction="sum"),
        r"^reduction='sum' is for losses that nnj does not know; CrossEntropyLoss is known, and "
        r"scale= says whether the data set is summed or averaged\. Leave it out$",
    ),
    "no loss": (
        dict(loss_func="mse"),
        r"^loss_func is 'mse', expected a loss module or a function of \(output, target\)$",
    ),
    "a class": (
        dict(loss_func=nn.MSELoss),
        r"^loss_func is <class '.*MSELoss'>, expected a loss module",
    ),
    "data set": (
        dict(loader=TensorDataset(X, CLASSES)),
        r"^loader is a data set of single samples \(TensorDataset\), expected ",
    ),
    "bare": (
        dict(loader=(X, CLASSES)),
        r"^a batch is Tensor, expected \(x, \.\.\., y\) or a dict\. Say forward=lambda model, .*; "
        r"or, if the data are one batch, give \[\(x, y\)\]$",
    ),
    "one": (dict(loader=[(X,)]), r"^a batch is tuple of 1, expected \(x, \.\.\., y\) or a dict"),
    "keys": (
        dict(loader=[{"x": X, "y": CLASSES}]),
        r"^a batch has the keys 'x', 'y', and not 'labels' for the target\. Say ",
    ),
    "key of a tuple": (
        dict(target="y"),
        r"^target='y' is a key, but a batch is tuple\. Give a function of the batch$",
    ),
    "target alone": (
        dict(target=lambda b: b[1]),
        r"^target= is a function, so nnj does not know what of a ",
    ),
    "no tensor": (
        dict(loader=[("x", CLASSES)]),
        r"^a batch has no tensor with a batch axis for the model",
    ),
    "several outputs": (
        dict(model=Parts(X.shape[1], 3).double()),
        r"^CrossEntropyLoss takes a tensor, and the model gives dict\. Say which part it is: ",
    ),
    "unknown": (
        dict(quantities=["ggn_dig"]),
        r"^unknown quantity 'ggn_dig' \(did you mean 'ggn_diag'\?\)\. Known: ",
    ),
    "no quantity": (dict(quantities=[]), r"^nnj\.collect needs the name of a quantity"),
    "frozen": (
        dict(model=mlp().requires_grad_(False)),
        r"^no parameter of the model \(or of modules=\) requires grad",
    ),
    "other modules": (
        dict(modules=[nn.Linear(2, 2)]),
        r"^no parameter of the model \(or of modules=\) requires grad",
    ),
    "not a scalar": (
        dict(
            loss_func=lambda z, y: F.cross_entropy(z, y, reduction="none"),
            reduction="sum",
            loader=batches(X, CLASSES, 1),
        ),
        (
            r"^<lambda> gave a tensor of shape \(1,\), expected a scalar that depends on the "
            r"parameters of the model$"
        ),
    ),
    "detached": (
        dict(loss_func=lambda z, y: F.cross_entropy(z.detach(), y), reduction="mean"),
        (
            r"^<lambda> gave a scalar that does not, expected a scalar that depends on the "
            r"parameters of the model$"
        ),
    ),
    "scripted": (
        dict(model=torch.jit.script(mlp())),
        r"^a scripted module has no calls of layers to hook",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    given, message = REFUSALS[name]
    given = {
        "model": mlp(),
        "loss_func": nn.CrossEntropyLoss(),
        "loader": LOADER,
        "quantities": ["ggn_diag"],
        **given,
    }
    with pytest.raises(nnj.NNJError, match=message):
        nnj.fit(
            given.pop("model"),
            given.pop("loss_func"),
            given.pop("loader"),
            *given.pop("quantities"),
            **given,
        )


def test_inside_a_collect():
    with pytest.raises(
        nnj.NNJError,
        match=r"^nnj\.fit inside an nnj\.collect would add its passes to that one\. Call it ",
    ):
        with nnj.collect("ggn_diag"):
            nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "ggn_diag")


def test_samples_that_the_rows_of_the_loss_deny():
    model, loss = mlp(), lambda z, y: F.mse_loss(z, y)
    with pytest.raises(
        nnj.NNJError,
        match=r"^a batch has 4 samples by its first tensor and 7 by the rows of the loss, so ",
    ):
        nnj.fit(
            model,
            loss,
            [(torch.zeros(4), X, REAL)],
            "ggn_diag",
            reduction="mean",
            forward=lambda m, b: m(b[1]),
        )


def test_a_refusal_of_collect_comes_through():
    model = nn.Sequential(nn.Linear(4, C), nn.Softmax(0)).double()
    with pytest.raises(nnj.NNJError, match="sample"):
        nnj.fit(model, nn.MSELoss(), [(X, REAL)], "ggn_diag")
    assert not vars(model[0].weight) and model.training


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_compiled_is_what_eager_is(scale):
    x, y = torch.randn(22, 4).double(), torch.randint(3, (22,))
    model, names = mlp(), ("ggn_diag", "batch_grad", "ggn_block")
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double())
    found, expected = (
        nnj.fit(model, loss, batches(x, y, 4), *names, scale=scale, compile=how)
        for how in ("aot", False)
    )
    assert (found.samples, found.total) == (expected.samples, expected.total)
    for name in names:
        agree(found[name], expected[name])
    assert all(p.grad is None for p in model.parameters())


def test_compiled_passes_are_replayed(monkeypatch):
    from nnj.compiling.cases import Cases

    made, init = [], Cases.__init__
    monkeypatch.setattr(
        Cases, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k)
    )
    x, y = torch.randn(22, 4).double(), torch.randint(3, (22,))
    nnj.fit(mlp(), nn.CrossEntropyLoss(), batches(x, y, 4), "ggn_diag", compile="aot")
    (cases,) = made
    assert cases.replays == 2 and cases.reasons == []  # of 5 batches of 4, and one of 2


def test_compiled_the_reduction_is_looked_into():
    def total(output, target):
        return (output - target).square().sum()

    x, y = torch.randn(24, 4).double(), torch.randn(24, 3).double()
    given = batches(x, y, 4)
    options = {"reduction": "mean", "compile": "aot"}
    with pytest.raises(nnj.NNJError, match="is not the mean"):
        nnj.fit(mlp(), total, given, "ggn_diag", **options)
    options["reduction"] = "sum"
    found = nnj.fit(mlp(), total, given, "ggn_diag", **options)
    agree(found["ggn_diag"], nnj.fit(mlp(), total, given, "ggn_diag", reduction="sum")["ggn_diag"])

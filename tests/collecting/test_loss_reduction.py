"""What nnj.fit knows of reductions: those of known losses, those that are said, and wrong ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.fitting import CLASSES, HOLES, REAL, SHARES, N, W, X, agree, batches, dense, mlp


@pytest.mark.parametrize("size", [1, 3, N])
def test_the_mean_of_kl_over_the_batch(size):
    model, loss = mlp(nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean")
    agree(
        nnj.fit(model, loss, batches(X, SHARES, size), "batch_grad", scale="mean")["batch_grad"],
        nnj.fit(model, loss, [(X, SHARES)], "batch_grad", scale="mean")["batch_grad"],
    )
    _, _, gradient = dense(model, loss, X, SHARES)
    found = nnj.fit(model, loss, batches(X, SHARES, size), "batch_grad", scale="mean")["batch_grad"]
    agree({path: t.sum(0) for path, t in found.items()}, gradient)


@pytest.mark.parametrize("own", ["sum", "mean"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("size", [1, 2, N])
def test_a_function_as_loss(own, scale, size):
    def made(reduction: str) -> Any:
        return lambda z, y: getattr((z - y).pow(2).sum(1) + z.logsumexp(1), reduction)()

    diag, _, _ = dense(mlp(), made(scale), X, REAL)
    fit = nnj.fit(mlp(), made(own), batches(X, REAL, size), "ggn_diag", reduction=own, scale=scale)
    agree(fit["ggn_diag"], diag)


class Focal(nn.Module):
    """A stranger's loss with a reduction that nnj cannot know."""

    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)


class Mine(nn.CrossEntropyLoss):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 3 * F.cross_entropy(z, y, reduction=self.reduction)


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, Focal(), Mine(), nnj.extend(lambda z, y: F.cross_entropy(z, y))],
    ids=["function", "module", "subclass", "extended function"],
)
def test_no_guess_at_a_reduction(loss):
    with pytest.raises(
        nnj.NNJError,
        match=r"^nnj does not guess how .+ puts the samples of a batch together\. Say reduction="
        r"'sum' or reduction='mean', over the samples of the batch$",
    ):
        nnj.fit(mlp(), loss, batches(X, CLASSES, 3), "ggn_diag")
    factor = 3 if isinstance(loss, Mine) else 1
    diag, _, _ = dense(mlp(), nn.CrossEntropyLoss(), X, CLASSES)
    hooks = dict(loss._forward_hooks) if isinstance(loss, nn.Module) else None
    agree(
        nnj.fit(mlp(), loss, batches(X, CLASSES, 3), "ggn_diag", reduction="mean", scale="mean")[
            "ggn_diag"
        ],
        {name: factor * t for name, t in diag.items()},
    )
    assert hooks is None or dict(loss._forward_hooks) == hooks


@pytest.mark.parametrize(
    "loss, said, y",
    [
        (F.cross_entropy, "sum", CLASSES),
        (functools.partial(F.cross_entropy, reduction="sum"), "mean", CLASSES),
        (functools.partial(F.cross_entropy, weight=W), "mean", CLASSES),
        (lambda z, y: F.cross_entropy(z, y), "mean", HOLES),
    ],
    ids=["a mean", "a sum", "weights", "ignored"],
)
def test_a_wrong_reduction_is_seen(loss, said, y):
    with pytest.raises(
        nnj.NNJError,
        match=rf"is not the {said} over the samples of a batch, as reduction='{said}' says: "
        r"the halves of a batch of 7 make \S+, the whole \S+\. Write it as a sum ",
    ):
        nnj.fit(mlp(), loss, [(X, y)], "ggn_diag", reduction=said)


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_no_gradient_of_batches_that_are_ignored(scale):
    """The mean of a batch of ignored targets is nan; that of the data set is not."""
    y = CLASSES.clone().index_fill(0, torch.arange(3), -100)
    diag, _, _ = dense(mlp(), nn.CrossEntropyLoss(reduction=scale), X, y)
    agree(
        nnj.fit(mlp(), nn.CrossEntropyLoss(), batches(X, y, 3), "ggn_diag", scale=scale)[
            "ggn_diag"
        ],
        diag,
    )
    with pytest.raises(
        nnj.NNJError,
        match="over this data set divides by 0: all targets are ignored, or of weight zero$",
    ):
        nnj.fit(mlp(), nn.CrossEntropyLoss(), [(X[:3], y[:3])], "ggn_diag", scale="mean")

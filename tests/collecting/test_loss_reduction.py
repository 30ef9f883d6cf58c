"""What nnj.fit knows of reductions: those of known losses, those that are said, and wrong ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.fitting import (
    CLASSES,
    HOLES,
    REAL,
    SHARES,
    C,
    N,
    W,
    X,
    agree,
    batches,
    dense,
    mlp,
)


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
def test_samples_in_axis_1_of_the_input_and_axis_0_of_the_output(own):
    """As many samples as outputs: a batch is not cut into halves along the wrong one."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean(0)

    def made(z: Tensor, y: Tensor) -> Tensor:
        return getattr(z.logsumexp(1) - (z * y).sum(1), own)()

    model, x, y = nnj.extend(Mean(), batch_axis=1), X[None, :C], SHARES[:C]
    fit = nnj.fit(model, made, [(x, y)], "ggn_diag", reduction=own)
    diag, _, _ = dense(mlp(), nn.CrossEntropyLoss(reduction="sum"), X[:C], SHARES[:C])
    agree({name.removeprefix("net."): t for name, t in fit["ggn_diag"].items()}, diag)


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


def mean_over_tokens(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def sum_over_tokens(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")


def mean_of_means(z, y):
    """Over samples, of the means over their tokens."""
    return F.cross_entropy(z.mT, y, reduction="none").sum(1).div((y >= 0).sum(1)).mean()


def tokens(counts):
    """Sequences of which so many targets count."""
    x, y = torch.randn(len(counts), 5, 3), torch.randint(0, 4, (len(counts), 5))
    for row, count in zip(y, counts, strict=True):
        row[count:] = -100
    return x.double(), y


COUNTS = {
    "halves that agree": ([5, 5, 2, 2, 1, 1], 2),
    "halves that differ": ([5, 2, 5, 2, 5, 2], 2),
    "batches of one sample": ([5, 5, 2, 2, 1, 1], 1),
    "last batch of one sample": ([4, 4, 4, 4, 2], 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_mean_over_tokens_is_no_mean_over_samples(seeded, name):
    counts, size = COUNTS[name]
    model, (x, y) = nn.Linear(3, 4).double(), tokens(counts)
    with pytest.raises(nnj.NNJError, match=r"is not the mean over the samples.*reduction='sum'"):
        nnj.fit(model, mean_over_tokens, batches(x, y, size), "ggn_diag", reduction="mean")
    loader = lambda size: batches(x, y, size)
    for loss, own in ((sum_over_tokens, "sum"), (mean_of_means, "mean")):
        one = nnj.fit(model, loss, loader(len(x)), "ggn_diag", reduction=own)
        agree(
            nnj.fit(model, loss, loader(size), "ggn_diag", reduction=own)["ggn_diag"],
            one["ggn_diag"],
        )


def test_as_many_tokens_in_every_sample(seeded):
    model, (x, y) = nn.Linear(3, 4).double(), tokens([3] * 6)
    whole = nnj.fit(model, mean_over_tokens, [(x, y)], "ggn_diag", reduction="mean", scale="mean")
    for size in (1, 2, 4):
        fit = nnj.fit(
            model, mean_over_tokens, batches(x, y, size), "ggn_diag", reduction="mean", scale="mean"
        )
        agree(fit["ggn_diag"], whole["ggn_diag"])


@pytest.mark.parametrize("counts", [[0, 0, 3, 3], [3, 3, 0, 0]])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_whose_targets_are_all_ignored(seeded, counts, size):
    model, (x, y) = nn.Linear(3, 4).double(), tokens(counts)
    loader = lambda size: batches(x, y, size)
    with pytest.raises(nnj.NNJError, match=r"nan for a batch of .*reduction='sum'"):
        nnj.fit(model, mean_over_tokens, loader(size), "ggn_diag", reduction="mean")
    one = nnj.fit(model, sum_over_tokens, loader(4), "ggn_diag", reduction="sum")
    agree(
        nnj.fit(model, sum_over_tokens, loader(size), "ggn_diag", reduction="sum")["ggn_diag"],
        one["ggn_diag"],
    )
    known, (a, b) = nn.CrossEntropyLoss(), (x.flatten(0, 1), y.flatten())
    one = nnj.fit(model, known, [(a, b)], "ggn_diag", scale="mean")
    agree(
        nnj.fit(model, known, batches(a, b, 5), "ggn_diag", scale="mean")["ggn_diag"],
        one["ggn_diag"],
    )


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.PoissonNLLLoss()]
)
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_target_that_torch_would_broadcast(seeded, loss, size, scale):
    model, x, y = nn.Linear(3, 1).double(), torch.randn(6, 3).double(), torch.rand(6).double()
    with pytest.raises(nnj.NNJError, match=r"broadcast.*same shape"):
        nnj.fit(model, loss, batches(x, y, size), "ggn_diag", scale=scale)
    fit = nnj.fit(model, loss, batches(x, y[:, None], size), "ggn_diag", scale=scale)
    whole = nnj.fit(model, loss, [(x, y[:, None])], "ggn_diag", scale=scale)
    agree(fit["ggn_diag"], whole["ggn_diag"])


def test_looking_at_a_loss_does_not_move_it(seeded):
    class Counts(nn.Module):
        calls = 0

        def forward(self, z, y):
            self.calls += 1
            return (z - y).square().mean(1).sum()

    loss, model = Counts(), nn.Linear(3, 4).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    nnj.fit(model, loss, batches(x, y, 2), "ggn_diag", reduction="sum")
    assert loss.calls == 3

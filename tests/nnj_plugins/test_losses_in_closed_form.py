"""Rules in closed form against torch.func.hessian, for every reduction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.registry.loss_rules import hessian_of_loss
from nnj.registry.manager import manager
from nnj.testing import check_loss
from tests.support.losses import (
    CE,
    ce,
    ignoring,
    made,
    multi_label_margin,
    multi_margin,
    soft,
    y,
    z,
)

pytestmark = pytest.mark.usefixtures("seeded")


CROSS_ENTROPY = {
    "plain": (CE, z(5, 4), y(4, 5)),
    "two classes": (CE, z(5, 2), y(2, 5)),
    "one class": (CE, z(5, 1), y(1, 5)),
    "one class, soft": (CE, z(5, 1), soft(5, 1)),
    "one sample": (CE, z(1, 3), y(3, 1)),
    "unbatched": (CE, z(4), y(4)),
    "unbatched, all options": (ce(weighted=True, label_smoothing=0.2), z(4), y(4)),
    "unbatched, soft": (ce(weighted=True, label_smoothing=0.2), z(4), soft(4)),
    "weights": (ce(weighted=True), z(5, 4), y(4, 5)),
    "a weight of zero": (
        lambda: CE(weight=torch.tensor([1.0, 0.0, 2.0])),
        z(6, 3),
        lambda: torch.tensor([0, 1, 2, 0, 1, 2]),
    ),
    "smoothing": (ce(label_smoothing=0.3), z(5, 4), y(4, 5)),
    "smoothing 1": (ce(label_smoothing=1.0), z(5, 4), y(4, 5)),
    "weights and smoothing": (ce(weighted=True, label_smoothing=0.3), z(5, 4), y(4, 5)),
    "ignored": (CE, z(9, 4), ignoring(-100, 4, 9)),
    "a class ignored": (ce(ignore_index=1), z(9, 4), y(4, 9)),
    "ignored, weights": (ce(weighted=True, ignore_index=2), z(9, 4), y(4, 9)),
    "ignored, smoothing": (ce(ignore_index=-1, label_smoothing=0.1), z(9, 4), ignoring(-1, 4, 9)),
    "ignored beyond, all": (
        ce(weighted=True, ignore_index=255, label_smoothing=0.1),
        z(9, 4),
        ignoring(255, 4, 9),
    ),
    "soft": (CE, z(5, 4), soft(5, 4)),
    "soft, weights": (ce(weighted=True), z(5, 4), soft(5, 4)),
    "soft, smoothing": (ce(label_smoothing=0.3), z(5, 4), soft(5, 4)),
    "soft, all": (ce(weighted=True, label_smoothing=0.3, ignore_index=-7), z(5, 4), soft(5, 4)),
    "an axis": (CE, z(3, 4, 2), y(4, 3, 2)),
    "two axes": (CE, z(2, 3, 2, 2), y(3, 2, 2, 2)),
    "two axes, all": (
        ce(3, weighted=True, ignore_index=0, label_smoothing=0.1),
        z(2, 3, 2, 2),
        y(3, 2, 2, 2),
    ),
    "an axis, soft, all": (ce(weighted=True, label_smoothing=0.1), z(3, 4, 2), soft(3, 4, 2)),
    "an axis of as many places as classes": (CE, z(3, 3, 3), y(3, 3, 3)),
    "strided": (CE, lambda: z(3, 2, 4)().mT, y(4, 3, 2)),
    "saturated": (CE, lambda: 1000 * z(5, 4)(), y(4, 5)),
    "ties": (CE, lambda: torch.zeros(2, 5, dtype=torch.float64), y(5, 2)),
    "more than a chunk": (CE, z(1, 70), y(70, 1)),
}


def signs(*shape):
    return lambda: y(2, *shape)() * 2.0 - 1


BCE, Poisson, Gaussian = nn.BCEWithLogitsLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss
ENTRYWISE = {
    "mse": (nn.MSELoss, z(5, 4), z(5, 4)),
    "mse, no axis": (nn.MSELoss, z(), z()),
    "mse, one axis": (nn.MSELoss, z(5), z(5)),
    "mse, images": (nn.MSELoss, z(2, 3, 2, 2), z(2, 3, 2, 2)),
    "bce": (BCE, z(5, 4), soft(5, 4)),
    "bce, one axis": (BCE, z(5), lambda: y(2, 5)().double()),
    "bce, weight": (lambda: BCE(weight=torch.rand(4)), z(5, 4), soft(5, 4)),
    "bce, weight of rows": (lambda: BCE(weight=torch.rand(5, 1)), z(5, 4), soft(5, 4)),
    "bce, weight of positives": (
        lambda: BCE(pos_weight=torch.tensor([0.1, 1.0, 9.0])),
        z(5, 3),
        soft(5, 3),
    ),
    "bce, all": (lambda: BCE(torch.rand(5, 3), pos_weight=torch.rand(3)), z(5, 3), soft(5, 3)),
    "bce, images": (lambda: BCE(pos_weight=torch.rand(3, 1)), z(2, 3, 2), soft(2, 3, 2)),
    "bce of probabilities": (nn.BCELoss, lambda: soft(4, 3)() * 0.8 + 0.1, soft(4, 3)),
    "bce of probabilities, weight": (
        lambda: nn.BCELoss(torch.rand(3)),
        lambda: soft(4, 3)() * 0.8 + 0.1,
        soft(4, 3),
    ),
    "bce of probabilities, hard": (
        nn.BCELoss,
        lambda: soft(4, 3)() * 0.8 + 0.1,
        lambda: y(2, 4, 3)().double(),
    ),
    "bce of probabilities, images": (
        nn.BCELoss,
        lambda: soft(2, 3, 2, 2)() * 0.8 + 0.1,
        soft(2, 3, 2, 2),
    ),
    "huber": (nn.HuberLoss, z(4, 3), z(4, 3)),
    "huber, delta": (lambda: nn.HuberLoss(delta=0.7), z(4, 3, 2), z(4, 3, 2)),
    "smooth l1": (nn.SmoothL1Loss, z(4, 3), z(4, 3)),
    "smooth l1, beta": (lambda: nn.SmoothL1Loss(beta=0.7), z(4, 3, 2), z(4, 3, 2)),
    "smooth l1, no beta": (lambda: nn.SmoothL1Loss(beta=0.0), z(4, 3), z(4, 3)),
    "poisson": (Poisson, z(4, 3), soft(4, 3)),
    "poisson, full": (lambda: Poisson(full=True), z(4, 3, 2), lambda: 5 * soft(4, 3, 2)()),
    "poisson, rates": (lambda: Poisson(log_input=False), lambda: soft(4, 3)() + 0.1, soft(4, 3)),
    "poisson, rates, eps": (
        lambda: Poisson(log_input=False, eps=0.3, full=True),
        soft(4, 3),
        soft(4, 3),
    ),
    "gaussian": (Gaussian, z(4, 3), z(4, 3), lambda: soft(4, 3)() + 0.1),
    "gaussian, full": (
        lambda: Gaussian(full=True),
        z(4, 3, 2),
        z(4, 3, 2),
        lambda: soft(4, 3, 2)() + 0.1,
    ),
    "gaussian, one variance a row": (Gaussian, z(4, 3), z(4, 3), lambda: soft(4, 1)() + 0.1),
    "gaussian, one variance a row, flat": (Gaussian, z(4, 3), z(4, 3), lambda: soft(4)() + 0.1),
    "gaussian, a number": (Gaussian, z(4, 3), z(4, 3), lambda: 0.3),
    "gaussian, below eps": (lambda: Gaussian(eps=0.4), z(4, 3), z(4, 3), lambda: soft(4, 3)()),
    "soft margin": (nn.SoftMarginLoss, z(4, 3), signs(4, 3)),
    "soft margin, soft": (nn.SoftMarginLoss, z(4, 3, 2), soft(4, 3, 2)),
    "several labels": (nn.MultiLabelSoftMarginLoss, z(4, 3), lambda: y(2, 4, 3)().double()),
    "several labels, weight": (
        lambda: nn.MultiLabelSoftMarginLoss(torch.rand(3)),
        z(4, 3),
        soft(4, 3),
    ),
    "several labels, one sample": (nn.MultiLabelSoftMarginLoss, z(3), soft(3)),
    "several labels, places": (nn.MultiLabelSoftMarginLoss, z(4, 2, 3), soft(4, 2, 3)),
}
LINEAR = {
    "l1": (nn.L1Loss, z(4, 3), z(4, 3)),
    "l1, broadcast": (nn.L1Loss, z(4, 3), z(4, 1)),
    "hinge embedding": (lambda: nn.HingeEmbeddingLoss(0.5), z(4, 3), signs(4, 3)),
}


@pytest.mark.parametrize("loss, given", made(CROSS_ENTROPY | ENTRYWISE | LINEAR))
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction:UserWarning")
def test_rule(loss, given):
    loss, given = loss(), [make() for make in given]
    assert manager().find("loss", type(loss)).key is type(loss)
    check_loss(loss, *given)


@pytest.mark.parametrize("loss, given", made(CROSS_ENTROPY))
def test_twice_agrees_with_the_rule_for_cross_entropy(loss, given):
    loss, (output, *args) = loss().double(), [make() for make in given]
    if output.dim() == 1:
        output, args = output[None], [args[0][None]]
    h = nnj.autodiff_hessian(lambda o: loss(o, *args), (output,))
    g = hessian_of_loss(loss, torch.tensor(1.0, dtype=torch.float64), output, *args)
    torch.testing.assert_close(
        h.to_outputs(h.diagonal()[None]), g.to_outputs(g.diagonal()[None]), rtol=1e-9, atol=1e-12
    )
    v = torch.randn(2, *output.shape, dtype=torch.float64)
    ours = v.reshape(2, g.rows, g.block, g.places).mT
    theirs = v.reshape(2, h.rows, h.block, h.places).mT
    torch.testing.assert_close(
        h.to_outputs(h.product(theirs)), g.to_outputs(g.product(ours)), rtol=1e-9, atol=1e-12
    )


# -- margins: torch cannot differentiate them twice, so they are written out -----------------------


MARGINS = {
    "linear": (nn.MultiMarginLoss, multi_margin, z(5, 4), y(4, 5)),
    "squared": (lambda: nn.MultiMarginLoss(p=2), multi_margin, z(5, 4), y(4, 5)),
    "squared, all": (
        lambda: nn.MultiMarginLoss(p=2, margin=0.7, weight=torch.rand(4).double()),
        multi_margin,
        z(5, 4),
        y(4, 5),
    ),
    "squared, two classes": (lambda: nn.MultiMarginLoss(p=2), multi_margin, z(5, 2), y(2, 5)),
    "squared, far out": (
        lambda: nn.MultiMarginLoss(p=2),
        multi_margin,
        lambda: 1000 * z(5, 4)(),
        y(4, 5),
    ),
    "several labels": (
        nn.MultiLabelMarginLoss,
        multi_label_margin,
        z(2, 4),
        lambda: torch.tensor([[3, 0, -1, 1], [2, -1, 0, 0]]),
    ),
}


@pytest.mark.parametrize("loss, given", made(MARGINS))
def test_margins(loss, given):
    reference, *given = given
    check_loss(loss(), *[make() for make in given], reference=reference)


def test_a_squared_margin_of_one_sample():
    row, loss, scale = torch.tensor([1.0, 0.5, 3.0]), nn.MultiMarginLoss(p=2), torch.tensor(1.0)
    h, one = (
        hessian_of_loss(loss, scale, o, t)
        for o, t in ((row[None], torch.tensor([0])), (row, torch.tensor(0)))
    )
    torch.testing.assert_close(h.columns(0, 2), one.columns(0, 2))
    assert h.to_outputs(h.columns(0, 2))[0].shape == (2, 1, 3) and one.to_outputs(
        one.columns(0, 2)
    )[0].shape == (2, 3)

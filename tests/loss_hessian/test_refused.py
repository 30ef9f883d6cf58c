"""What a loss is refused for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.loss_hessian.base import check_outputs
from nnj.registry.loss_rules import hessian_of_loss
from nnj.registry.manager import use
from nnj.testing import check_loss
from tests.support.losses import CE, z

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_loss_that_is_not_convex():
    message = (
        r"sin: its Hessian in the output is not positive semi-definite \(smallest eigenvalue -1\)"
    )
    with pytest.raises(nnj.NNJError, match=message):
        nnj.autodiff_hessian(lambda o: o.sin().sum(), (torch.full((2, 3), torch.pi / 2),), "sin")
    with pytest.raises(nnj.NNJError, match="not positive semi-definite"):
        nnj.autodiff_hessian(lambda o: o.prod(1).sum(), (z(3, 2)(),))
    with pytest.raises(nnj.NNJError, match=r"CosineEmbeddingLoss.*not positive.*write a loss rule"):
        hessian_of_loss(
            nn.CosineEmbeddingLoss(),
            torch.tensor(1.0),
            torch.randn(3, 4),
            torch.randn(3, 4),
            torch.ones(3),
        )
    with pytest.raises(nnj.NNJError, match=r"CrossEntropyLoss.*not positive"):
        hessian_of_loss(CE(), torch.tensor(1.0), torch.randn(2, 3), -torch.rand(2, 3))
    with pytest.raises(nnj.NNJError, match="not positive semi-definite"):
        nnj.BlockHessian(torch.diag(torch.tensor([1.0, -0.1]))[None, None], [(1, 2)])


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.sum().square(),
        lambda o: (o - o.mean(0)).square().sum(),
        lambda o: o.logsumexp(0).sum(),
        lambda o: o.square().sum() + 1e-3 * o[0, 0] * o[1, 1],
        lambda o: o.square().sum().sqrt() + (o[:1] * o[1:2]).sum(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_couples_rows(call, dtype):
    with pytest.raises(nnj.NNJError, match="contrast couples rows of the batch"):
        nnj.autodiff_hessian(call, (torch.randn(6, 3, dtype=dtype),), "contrast")


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.diff(dim=1).sum().square(),
        lambda o: o.logsumexp(1).sum() + 1e-2 * o.diff(dim=1).prod(),
        lambda o: (o - o.flip(0)).logsumexp(1).sum(),
        lambda o: (o + o.flip(0)).logsumexp(1).sum(),
    ],
)
def test_a_loss_that_couples_rows_of_two_classes(call, size):
    """All of which see nothing but differences of classes, as cross entropy does."""
    with pytest.raises(nnj.NNJError, match="couples rows of the batch"):
        nnj.autodiff_hessian(call, (size * z(2, 2)(),))


def test_a_loss_of_one_axis_that_couples_entries():
    with pytest.raises(nnj.NNJError, match="couples rows of the batch"):
        nnj.autodiff_hessian(lambda o: o.sum().square(), (z(4)(),))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: torch.randn(2, 3, dtype=torch.complex64),
            r"loss: .*is complex \(torch.complex64\).*view_as_real",
        ),
        (
            lambda: torch.ones(2, 3, dtype=torch.long),
            r"loss: the output of the model is not of floating point \(torch.int64\)",
        ),
        (
            lambda: torch.tensor([[1.0, torch.nan]]),
            "loss: the output of the model has entries that are not finite",
        ),
        (lambda: torch.tensor([[1.0, torch.inf]]), "not finite"),
        (lambda: torch.tensor([[1.0, -torch.inf]]), "not finite"),
    ],
)
def test_outputs_without_curvature(make, message):
    with pytest.raises(nnj.NNJError, match=message):
        check_outputs("loss", [torch.zeros(2), make()])
    with pytest.raises(nnj.NNJError, match=message):
        nnj.autodiff_hessian(lambda o: o.abs().square().sum(), (make(),), "loss")


def test_rows_that_are_too_long():
    with pytest.raises(nnj.NNJError, match=r"1 blocks of 5000 x 5000.*4096.*loss rule"):
        nnj.autodiff_hessian(lambda o: o.logsumexp(1).square().sum(), (torch.randn(1, 5000),))


def test_a_hessian_that_is_not_finite():
    with pytest.raises(nnj.NNJError, match="its Hessian is not finite"):
        nnj.autodiff_hessian(lambda o: o.sqrt().sum(), (torch.zeros(2, 3),))
    with pytest.raises(nnj.NNJError, match="its Hessian is not finite"):
        loss = CE(weight=torch.tensor([0.0, 1.0]), label_smoothing=0.1)
        hessian_of_loss(loss, torch.tensor(1.0), torch.randn(1, 2), torch.tensor([0]))


def test_a_loss_that_draws_random_numbers():
    with pytest.raises(nnj.NNJError, match="another value each time"):
        nnj.autodiff_hessian(lambda o: F.dropout(o, 0.5).square().sum(), (torch.ones(50, 3),))


def test_a_loss_without_second_derivatives():
    with pytest.raises(
        nnj.NNJError, match=r"the loss cannot be differentiated twice by autograd: .*loss rule"
    ):
        nnj.autodiff_hessian(
            lambda o: F.multi_margin_loss(o, torch.tensor([0, 1]), p=2), (torch.randn(2, 3),)
        )


def test_ctc():
    args = (torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 5]), torch.tensor([2, 2]))
    for loss in (nn.CTCLoss(), nnj.extend(F.ctc_loss)):
        with pytest.raises(nnj.NNJError, match=r"CTCLoss: .*concave in the log probabilities"):
            hessian_of_loss(loss, torch.tensor(1.0), torch.randn(5, 2, 3).log_softmax(2), *args)


def test_check_loss_finds_a_wrong_rule():
    class Half(nn.MSELoss):
        """Its rule forgets the mean."""

    def rule(m, scale, y, target):
        return nnj.DiagonalHessian(torch.full_like(y, 2.0) * scale)

    class Plugin:
        @nnj.hookimpl
        def nnj_register_losses(self, register):
            register(Half, rule)

    manager = nnj.PluginManager(load=False)
    manager.register(Plugin(), "half")
    former = use(manager)
    try:
        with pytest.raises(AssertionError, match=r"Half\(reduction='mean'\): S S\^T is wrong"):
            check_loss(Half(), z(3, 2)(), z(3, 2)())
        with pytest.raises(
            AssertionError, match=r"Half\(reduction='mean'\): the value of the reference is wrong"
        ):
            check_loss(Half(), z(3, 2)(), z(3, 2)(), reference=lambda loss, y, t: 2 * loss(y, t))
    finally:
        use(former)

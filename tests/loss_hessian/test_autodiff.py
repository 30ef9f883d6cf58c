"""Losses that are differentiated twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.registry.loss_rules import hessian_of_loss
from nnj.testing import check_loss
from nnj.testing.check_loss import check_hessian
from tests.support.losses import CE, LogCosh, Quadratic, made, soft, y, z

pytestmark = pytest.mark.usefixtures("seeded")


class Squared(CE):
    """A subclass that computes something else than its parent: it must not get the parent's
    rule.
    """

    def forward(self, y, target):
        return (
            super().forward(y, target).square()
            if self.reduction != "none"
            else super().forward(y, target)
        )


class Logistic(nn.Module):
    """Rows of two axes, coupled within a row."""

    def forward(self, y):
        return y.flatten(1).logsumexp(1).square().sum() + y.exp().sum()


class Pinball(nn.Module):
    """A quantile loss: linear on either side, so that its Hessian is zero."""

    def forward(self, y, target):
        return torch.maximum(0.9 * (target - y), 0.1 * (y - target)).mean()


TWICE = {
    "a user's": (LogCosh, z(4, 3), z(4, 3)),
    "quadratic": (Quadratic, z(4, 5)),
    "two axes": (lambda: Logistic(), lambda: z(3, 2, 2)().abs()),
    "linear": (Pinball, z(4, 3), z(4, 3)),
    "broadcast target": (nn.MSELoss, z(4, 3), z(4, 1)),
    "broadcast output": (nn.MSELoss, z(4, 1), z(4, 3)),
    "broadcast target, huber": (nn.HuberLoss, z(4, 3), z(4, 1)),
    "broadcast target, poisson": (nn.PoissonNLLLoss, z(4, 3), soft(4, 1)),
    "broadcast target, gaussian": (
        nn.GaussianNLLLoss,
        z(4, 3),
        z(4, 1),
        lambda: soft(4, 3)() + 0.1,
    ),
    "linear cross entropy": (lambda: nn.LinearCrossEntropyLoss(4, 3), z(5, 4), y(3, 5)),
    "triplet, convex in the positive": (
        lambda: nn.TripletMarginWithDistanceLoss(
            distance_function=lambda a, b: (a - b).square().sum(-1), margin=9.0
        ),
        z(4, 3),
        z(4, 3),
        z(4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction:UserWarning")
@pytest.mark.parametrize("loss, given", made(TWICE))
def test_twice(loss, given):
    check_loss(loss(), *[make() for make in given])


def test_subclass_with_a_forward_of_its_own_goes_twice():
    output, target = z(1, 4)(), y(4, 1)()
    check_loss(Squared(), output, target)


def test_a_loss_that_insists_on_a_dtype_is_had_in_it():
    weight = torch.rand(3)
    target = torch.tensor([0, 2])
    for dtype in (torch.float32, torch.bfloat16):
        output = torch.randn(2, 3).to(dtype)
        w = weight.to(dtype)
        h = nnj.autodiff_hessian(lambda o, w=w: F.nll_loss(o.log_softmax(1), target, w), (output,))
        exact = hessian_of_loss(CE(w), torch.tensor(1.0), output, target)
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.diagonal(), exact.diagonal())


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_a_loss_with_parameters_is_had_in_float64(narrow):
    loss = Quadratic().to(narrow)
    h = nnj.autodiff_hessian(loss, (torch.randn(3, 5).to(narrow),))
    a = loss.a.detach().double()
    torch.testing.assert_close(
        h.diagonal()[:, 0], (2 * a.square().sum(0)).float().expand(3, 5), rtol=1e-6, atol=0.0
    )
    assert h.rank == 2


def test_a_loss_that_works_in_place_is_had_as_it_is():
    def call(o):
        total = torch.zeros(3)
        total.add_(o.exp().sum(0))
        part = torch.zeros(())
        part += total.sum()
        return part

    output = torch.randn(2, 3)
    torch.testing.assert_close(
        nnj.autodiff_hessian(call, (output,)).diagonal().flatten(), output.exp().flatten()
    )


def test_a_loss_that_takes_one_dtype_alone_is_had_in_it():
    def call(o):
        assert o.dtype == torch.float32
        return o.exp().sum(1).square().sum()

    output = torch.randn(2, 3)
    h, exact = (
        nnj.autodiff_hessian(call, (output,)),
        nnj.autodiff_hessian(lambda o: o.exp().sum(1).square().sum(), (output,)),
    )
    torch.testing.assert_close(h.diagonal(), exact.diagonal(), rtol=1e-4, atol=1e-4)


def test_twice_leaves_the_global_generator_alone():
    output, before = z(3, 2)(), torch.get_rng_state()
    nnj.autodiff_hessian(lambda o: o.exp().sum(1).square().sum(), (output,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_twice_in_any_grad_mode(mode):
    output = z(3, 2)()
    with mode():
        h = nnj.autodiff_hessian(lambda o: o.exp().sum(1).square().sum(), (output,))
    e = output.exp()
    torch.testing.assert_close(h.diagonal()[:, 0], 2 * e * (e + e.sum(1, keepdim=True)))


def test_twice_over_two_outputs():
    a, b = z(3, 2)(), z(3, 1, 2)()
    call = lambda a, b: (a.sum(1) + 2 * b.sum((1, 2))).square().sum() + a.exp().sum()
    h = nnj.autodiff_hessian(call, (a, b))
    assert (h.rows, h.places, h.block) == (3, 1, 4)
    s = h.to_outputs(
        (torch.eye(3, dtype=a.dtype)[:, None, :, None, None] * h.columns(0, h.rank)).flatten(0, 1)
    )
    flat = torch.cat([t.reshape(len(t), -1) for t in s], 1)
    joint = lambda t: call(t[:6].reshape(3, 2), t[6:].reshape(3, 1, 2))
    exact = torch.func.hessian(joint)(torch.cat([a.flatten(), b.flatten()]))
    torch.testing.assert_close(flat.T @ flat, exact)


def test_outputs_that_share_no_rows_are_one_block():
    a, b = z(3, 2)(), z()()
    h = nnj.autodiff_hessian(lambda a, b: (a.sum() + b).square(), (a, b))
    assert (h.rows, h.places, h.block, h.rank) == (1, 1, 7, 1)
    assert [t.shape for t in h.to_outputs(h.columns(0, 1))] == [(1, 3, 2), (1,)]
    torch.testing.assert_close(h.diagonal(), torch.full((1, 1, 7), 2.0, dtype=torch.float64))


def test_an_elementwise_loss_of_any_size_is_diagonal():
    output = torch.randn(2, 3, 100, 100)
    h = nnj.autodiff_hessian(
        lambda o: F.huber_loss(o, torch.zeros_like(o), reduction="sum"), (output,)
    )
    assert (h.rows, h.places, h.block, h.rank) == (2, 30_000, 1, 1)
    torch.testing.assert_close(h.to_outputs(h.diagonal()[None])[0][0], (output.abs() < 1).float())


def test_columns_that_are_zero_for_every_row_are_left_out():
    torch.manual_seed(0)
    loss = Quadratic().double()
    assert nnj.autodiff_hessian(lambda o: loss(o), (z(4, 5)(),)).rank == 2


def test_twice_without_vmap():
    class Once(torch.autograd.Function):
        """exp, whose derivative cannot be had under vmap."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if torch._C._functorch.is_batchedtensor(g):
                raise RuntimeError("not under vmap")
            return g * Once.apply(x)

    output = z(3, 4)()
    h, exact = (
        nnj.autodiff_hessian(lambda o, f=f: f(o).sum(1).square().sum(), (output,))
        for f in (Once.apply, torch.exp)
    )
    torch.testing.assert_close(h.diagonal(), exact.diagonal())
    assert h.block == 4


# -- functions around cross entropy ----------------------------------------------------------------


def smooth(o, t):
    return F.cross_entropy(o.flatten(0, 1), t.flatten(), label_smoothing=0.1, reduction="sum")


AROUND = {
    "plain": (lambda o, t: F.cross_entropy(o, t), 1, z(5, 4), y(4, 5)),
    "two classes": (lambda o, t: F.cross_entropy(o, t), 1, z(5, 2), y(2, 5)),
    "two rows of two classes": (lambda o, t: 0.3 * F.cross_entropy(o, t), 1, z(2, 2), y(2, 2)),
    "one row": (lambda o, t: F.cross_entropy(o, t), 1, z(1, 4), y(4, 1)),
    "far out": (lambda o, t: F.cross_entropy(o, t), 1, lambda: 300 * z(5, 4)(), y(4, 5)),
    "tokens": (smooth, 2, z(3, 2, 4), y(4, 3, 2)),
    "tokens, as many as classes": (smooth, 2, z(3, 4, 4), y(4, 3, 4)),
    "places": (lambda o, t: F.cross_entropy(o, t), 1, z(2, 3, 2, 2), y(3, 2, 2, 2)),
    "ignored": (
        lambda o, t: F.cross_entropy(o, t, ignore_index=1),
        1,
        z(2, 3, 2, 2),
        y(3, 2, 2, 2),
    ),
    "soft": (lambda o, t: -(t * o.log_softmax(1)).sum(1).mean(), 1, z(5, 4), soft(5, 4)),
    "shifted": (lambda o, t: F.nll_loss((o + 3.0).log_softmax(1), t), 1, z(5, 4), y(4, 5)),
}


@pytest.mark.parametrize("loss, given", made(AROUND))
def test_cross_entropy_is_recognised(loss, given):
    axis, *given = given
    output, target = (make() for make in given)
    h = nnj.autodiff_hessian(lambda o: loss(o, target), (output,))
    assert isinstance(h, nnj.SoftmaxHessian) and h.axis == axis
    dense = torch.func.hessian(loss)(output, target).reshape(output.numel(), -1)
    check_hessian("cross entropy", h, dense, output)


@pytest.mark.parametrize(
    "call",
    [
        lambda o: F.cross_entropy(2 * o, torch.tensor([0, 1, 2])),
        lambda o: o.logsumexp(1).square().sum(),
        lambda o: o.logsumexp(1).sum() + 1e-6 * o[:, :2].sum(1).square().sum(),
        lambda o: (
            ((1 - o.softmax(1)[:, 0]).detach() * o.logsumexp(1)).sum()
            + 0.01 * (o[:, 0] - o[:, 1]).square().sum()
        ),
        lambda o: o.logsumexp(1).sum() + o[0, 0].square(),
    ],
)
def test_what_is_nearly_cross_entropy_is_not_taken_for_it(call):
    output = z(3, 4)().abs()
    h = nnj.autodiff_hessian(call, (output,))
    assert isinstance(h, nnj.BlockHessian)
    check_hessian("nearly", h, torch.func.hessian(call)(output).reshape(12, 12), output)


def test_a_factor_that_changes_with_the_output_is_seen():
    """a is found at small outputs, and is another at the output itself."""
    call = lambda o: (o.logsumexp(1) * (o.detach() ** 2).sum(1)).sum()
    output = 3 * z(3, 4)()
    h = nnj.autodiff_hessian(call, (output,))
    dense = torch.func.hessian(call)(output).reshape(12, 12)
    (s,) = h.to_outputs(
        (torch.eye(3, dtype=output.dtype).reshape(3, 1, 3, 1, 1) * h.columns(0, h.rank)).flatten(
            0, 1
        )
    )
    torch.testing.assert_close(s.reshape(len(s), -1).T @ s.reshape(len(s), -1), dense)


@pytest.mark.parametrize("classes", [1000, 50_000])
def test_many_classes_in_a_function(classes):
    output, target = torch.randn(8, classes), torch.randint(classes, (8,))
    h = nnj.autodiff_hessian(lambda o: F.cross_entropy(o, target), (output,))
    exact = hessian_of_loss(CE(), torch.tensor(1.0), output, target)
    torch.testing.assert_close(h.diagonal(), exact.diagonal(), rtol=1e-5, atol=0.0)
    assert h.rank == classes - 1


# -- refusals --------------------------------------------------------------------------------------


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

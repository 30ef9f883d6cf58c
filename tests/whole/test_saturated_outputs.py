"""Saturated outputs, and narrow dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.registry.loss_rules import hessian_of_loss
from tests.support.losses import CE, LogCosh, ce, soft, y

pytestmark = pytest.mark.usefixtures("seeded")


SATURATED = {
    "sure": [1000.0, 0.0, -1000.0, 3.0],
    "two left": [1000.0, 1000.0, 0.0, -5.0],
    "underflow in steps": [0.0, -30.0, -60.0, -90.0],
    "below the least float32": [0.0, -100.0, -101.0, -102.0],
    "denormal": [0.0, -88.0, -95.0, -102.0],
    "nearly sure": [12.0, 0.0, 0.5, -1.0],
    "negative": [-1e30, -1e30, -3e38, 0.0],
}


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in SATURATED.items()])
def test_saturated_logits_in_float32(row):
    output, target = torch.tensor([row, [0.3, -0.2, 0.1, 0.0]]), torch.tensor([1, 2])
    scale = torch.tensor(1.0)
    h, exact = (
        hessian_of_loss(CE(), s, o, target)
        for s, o in ((scale, output), (scale.double(), output.double()))
    )
    near = dict(rtol=1e-5, atol=1e-37)
    s = h.columns(0, h.rank)
    assert s.dtype == torch.float32 and bool(torch.isfinite(s).all())
    torch.testing.assert_close(h.diagonal().double(), exact.diagonal(), **near)
    torch.testing.assert_close(s.square().sum(0).double(), exact.diagonal(), **near)
    # Entries, not columns: classes of equal probability may be taken in another order.
    t = exact.columns(0, exact.rank)
    size = exact.diagonal().sqrt()
    for columns in (s, h.mix(torch.eye(4)[:, :, None, None].expand(-1, -1, 2, 1))):
        full = torch.einsum("jrdb,jrdc->rdbc", columns.double(), columns.double())
        error = (full - torch.einsum("jrdb,jrdc->rdbc", t, t)).abs()
        assert bool((error <= 1e-5 * size[..., None] * size[..., None, :] + 1e-37).all())
    v = torch.randn(3, 2, 1, 4)
    torch.testing.assert_close(
        h.product(v).double(), exact.product(v.double()), rtol=1e-4, atol=1e-37
    )
    signs = h.signs(4)[:, : h.rank]
    torch.testing.assert_close(
        h.combine(signs), torch.einsum("kjrd,jrdb->krdb", signs.float(), s), rtol=1e-4, atol=1e-25
    )


@pytest.mark.parametrize("logit", [20.0, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saturated_logits_by_autograd(logit, dtype):
    output, target = (
        torch.tensor([[logit, 0.0, 1.0], [0.0, logit, -logit]], dtype=dtype),
        torch.tensor([0, 2]),
    )
    loss = lambda o: F.cross_entropy(o, target, reduction="sum")
    h, exact = nnj.autodiff_hessian(loss, (output,)), nnj.SoftmaxHessian(output.double())
    diagonals = [c.to_outputs(c.diagonal()[None])[0].double() for c in (h, exact)]
    torch.testing.assert_close(*diagonals, rtol=1e-5, atol=1e-14)


FAR = [1000.0, -1000.0, 80.0, -80.0, 40.0, -40.0, 0.5]


def sure(z):
    """s(z) s(-z), without cancellation."""
    return (-z.abs()).exp() / (1 + (-z.abs()).exp()) ** 2


def zeros(z):
    return 0 * z


# The loss, what makes a target of the output, and the Hessian's diagonal for its sum, of the output
# in float64.
OUT = {
    "mse": (nn.MSELoss, torch.zeros_like, lambda z: 2 + 0 * z),
    "l1": (nn.L1Loss, torch.zeros_like, zeros),
    "smooth l1": (nn.SmoothL1Loss, torch.zeros_like, lambda z: (z.abs() < 1).double()),
    "huber": (nn.HuberLoss, torch.zeros_like, lambda z: (z.abs() < 1).double()),
    "bce": (nn.BCEWithLogitsLoss, lambda z: torch.full_like(z, 0.3), sure),
    "soft margin": (nn.SoftMarginLoss, torch.ones_like, sure),
    "several labels": (nn.MultiLabelSoftMarginLoss, torch.ones_like, lambda z: sure(z) / len(FAR)),
    "gaussian": (
        lambda reduction: (
            lambda z, t: F.gaussian_nll_loss(z, t, torch.full_like(z, 1e30), reduction=reduction)
        ),
        torch.zeros_like,
        lambda z: 1e-30 + 0 * z,
    ),
    "gaussian, no variance": (
        lambda reduction: (
            lambda z, t: F.gaussian_nll_loss(z, t, torch.zeros_like(z), reduction=reduction)
        ),
        torch.zeros_like,
        lambda z: 1e6 + 0 * z,
    ),
    "cross entropy": (CE, lambda z: z.argmin(1), lambda z: z.softmax(1) * (1 - z.softmax(1))),
    "cross entropy, soft": (
        CE,
        lambda z: torch.full_like(z, 1 / 7),
        lambda z: z.softmax(1) * (1 - z.softmax(1)),
    ),
}


def rowwise(z, loss, target):
    """By a rule or by a function that is differentiated twice."""
    h = hessian_of_loss(loss, torch.tensor(1.0, dtype=z.dtype), z, target)
    s = h.to_outputs(h.columns(0, h.rank))[0]
    assert s.dtype == torch.float32 and bool(s.isfinite().all())
    return h.to_outputs(h.diagonal()[None])[0][0].double()


@pytest.mark.parametrize("name", OUT)
def test_far_out_in_float32(name):
    make, target, expected = OUT[name]
    z = torch.tensor([FAR])
    loss = make(reduction="sum")
    loss = loss if isinstance(loss, nn.Module) else nnj.FunctionLoss(loss)
    torch.testing.assert_close(
        rowwise(z, loss, target(z)), expected(z.double()), rtol=1e-5, atol=1e-37
    )
    function = nnj.FunctionLoss(lambda z, t: loss.forward(z, t))
    if name == "soft margin":  # torch overflows where it is differentiated
        with pytest.raises(nnj.NNJError, match="its Hessian is not finite"):
            rowwise(z, function, target(z))
        return
    torch.testing.assert_close(
        rowwise(z, function, target(z)), expected(z.double()), rtol=1e-5, atol=1e-14
    )


@pytest.mark.parametrize("logit", [-1000.0, -80.0, 80.0])
def test_rates_far_out(logit):
    z = torch.tensor([[logit]])
    found = rowwise(z, nn.PoissonNLLLoss(reduction="sum"), torch.ones(1, 1))
    torch.testing.assert_close(found, z.double().exp(), rtol=1e-5, atol=1e-37)
    with pytest.raises(nnj.NNJError, match="PoissonNLLLoss: its Hessian is not finite"):
        rowwise(z.abs() + 1000, nn.PoissonNLLLoss(), torch.ones(1, 1))


class Probability(nn.Module):
    def __init__(self, logit):
        super().__init__()
        self.one = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.one.weight, logit)

    def forward(self, x):
        return self.one(x).sigmoid()


@pytest.mark.parametrize(
    "logit, target",
    [
        (-80.0, 1.0),
        (-50.0, 1.0),
        (-50.0, 0.3),
        (-20.0, 1.0),
        (15.0, 0.0),
        (12.0, 0.6),
        (1000.0, 1.0),
        (-1000.0, 0.0),
    ],
)
@pytest.mark.parametrize("options", [{}, dict(tol=1e-9)])
def test_probabilities_of_which_the_square_underflows(logit, target, options):
    """t / p² is no float32 where p is 1e-20, but what comes back through the sigmoid, t
    (1 - p)² + (1 - t) p², is.
    """
    model, x = nnj.extend(Probability(logit)), torch.ones(1, 1)
    with nnj.collect("ggn_diag", **options):
        p = model(x)
        nnj.extend(nn.BCELoss())(p, torch.full((1, 1), target)).backward()
    p = p.detach().double()
    expected = target * (1 - p) ** 2 + (1 - target) * p**2
    torch.testing.assert_close(model.one.weight.ggn_diag.double(), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    "logit, target", [(1000.0, 0.0), (17.5, 0.0), (1000.0, 0.7), (-1000.0, 1.0), (-95.0, 1.0)]
)
def test_probabilities_that_are_rounded_against_their_targets(logit, target):
    model = nnj.extend(Probability(logit))
    with (
        pytest.raises(
            nnj.NNJError, match="BCELoss: a probability is rounded to 0 or 1.*BCEWithLogitsLoss"
        ),
        nnj.collect("ggn_diag"),
    ):
        nnj.extend(nn.BCELoss())(model(torch.ones(1, 1)), torch.full((1, 1), target)).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make, target",
    [
        (ce(3, weighted=True), y(3, 2)),
        (nn.MSELoss, soft(2, 3)),
        (nn.HuberLoss, soft(2, 3)),
        (LogCosh, soft(2, 3)),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(3)), soft(2, 3)),
        (nn.BCELoss, soft(2, 3)),
    ],
)
def test_sixteen_bits_are_computed_in_float32(dtype, make, target):
    narrow, output, target = make().to(dtype), torch.rand(2, 3).to(dtype), target()
    target = target.to(dtype) if target.is_floating_point() else target
    wide = target.double() if target.is_floating_point() else target
    h = hessian_of_loss(narrow, torch.tensor(1.0, dtype=dtype), output, target)
    exact = hessian_of_loss(
        narrow.double(), torch.tensor(1.0, dtype=torch.float64), output.double(), wide
    )
    assert h.columns(0, 1).dtype == torch.float32
    torch.testing.assert_close(h.diagonal().double(), exact.diagonal(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(weight=torch.rand(4)), dict(label_smoothing=0.1)])
def test_all_targets_ignored_gives_zero_as_the_gradient_is(options):
    output, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    loss = CE(**options)
    loss(output, target).backward()
    assert not output.grad.any()
    h = hessian_of_loss(loss, torch.tensor(1.0), output.detach(), target)
    assert not h.columns(0, 3).any() and not h.diagonal().any()

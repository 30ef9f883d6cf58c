"""The Hessian of every loss against torch.func.hessian, saturated outputs, and what is refused."""
from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj import plugins
from nnj.curvature import check_outputs
from nnj.testing import check_loss, loss_curvature


@pytest.fixture(autouse=True)
def manager():
    """Our own loss rules in a fresh manager, and a fixed seed."""
    torch.manual_seed(0)
    new = nnj.PluginManager(load=False)
    new.register(importlib.import_module("nnj_plugins.losses"), "nnj-losses")
    former = plugins.use(new)
    yield new
    plugins.use(former)


def z(*shape):
    return lambda: torch.randn(shape, dtype=torch.float64)


def y(classes, *shape):
    return lambda: torch.randint(classes, shape)


def soft(*shape):
    return lambda: torch.rand(*shape, dtype=torch.float64)


def ignoring(index, classes, *shape):
    """Classes, of which about a third are ignored."""
    return lambda: torch.where(torch.rand(shape) < 0.35, index, torch.randint(classes, shape))


def ce(classes=4, weighted=False, **options):
    weight = torch.linspace(0.2, 2.0, classes) if weighted else None
    return lambda: nn.CrossEntropyLoss(weight=weight, **options)


CE = nn.CrossEntropyLoss
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
    "a weight of zero": (lambda: CE(weight=torch.tensor([1.0, 0.0, 2.0])), z(6, 3), lambda: torch.tensor([0, 1, 2, 0, 1, 2])),
    "smoothing": (ce(label_smoothing=0.3), z(5, 4), y(4, 5)),
    "smoothing 1": (ce(label_smoothing=1.0), z(5, 4), y(4, 5)),
    "weights and smoothing": (ce(weighted=True, label_smoothing=0.3), z(5, 4), y(4, 5)),
    "ignored": (CE, z(9, 4), ignoring(-100, 4, 9)),
    "a class ignored": (ce(ignore_index=1), z(9, 4), y(4, 9)),
    "ignored, weights": (ce(weighted=True, ignore_index=2), z(9, 4), y(4, 9)),
    "ignored, smoothing": (ce(ignore_index=-1, label_smoothing=0.1), z(9, 4), ignoring(-1, 4, 9)),
    "ignored beyond, all": (ce(weighted=True, ignore_index=255, label_smoothing=0.1), z(9, 4), ignoring(255, 4, 9)),
    "soft": (CE, z(5, 4), soft(5, 4)),
    "soft, weights": (ce(weighted=True), z(5, 4), soft(5, 4)),
    "soft, smoothing": (ce(label_smoothing=0.3), z(5, 4), soft(5, 4)),
    "soft, all": (ce(weighted=True, label_smoothing=0.3, ignore_index=-7), z(5, 4), soft(5, 4)),
    "an axis": (CE, z(3, 4, 2), y(4, 3, 2)),
    "two axes": (CE, z(2, 3, 2, 2), y(3, 2, 2, 2)),
    "two axes, all": (ce(3, weighted=True, ignore_index=0, label_smoothing=0.1), z(2, 3, 2, 2), y(3, 2, 2, 2)),
    "an axis, soft, all": (ce(weighted=True, label_smoothing=0.1), z(3, 4, 2), soft(3, 4, 2)),
    "an axis of as many places as classes": (CE, z(3, 3, 3), y(3, 3, 3)),
    "strided": (CE, lambda: z(3, 2, 4)().mT, y(4, 3, 2)),
    "saturated": (CE, lambda: 1000 * z(5, 4)(), y(4, 5)),
    "ties": (CE, lambda: torch.zeros(2, 5, dtype=torch.float64), y(5, 2)),
    "more than a chunk": (CE, z(1, 70), y(70, 1)),
}
ELEMENTWISE = {
    "mse": (nn.MSELoss, z(5, 4), z(5, 4)),
    "mse, no axis": (nn.MSELoss, z(), z()),
    "mse, one axis": (nn.MSELoss, z(5), z(5)),
    "mse, images": (nn.MSELoss, z(2, 3, 2, 2), z(2, 3, 2, 2)),
    "bce": (nn.BCEWithLogitsLoss, z(5, 4), soft(5, 4)),
    "bce, one axis": (nn.BCEWithLogitsLoss, z(5), lambda: y(2, 5)().double()),
    "bce, weight": (lambda: nn.BCEWithLogitsLoss(weight=torch.rand(4)), z(5, 4), soft(5, 4)),
    "bce, weight of rows": (lambda: nn.BCEWithLogitsLoss(weight=torch.rand(5, 1)), z(5, 4), soft(5, 4)),
    "bce, weight of positives": (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.1, 1.0, 9.0])), z(5, 3), soft(5, 3)),
    "bce, all": (lambda: nn.BCEWithLogitsLoss(torch.rand(5, 3), pos_weight=torch.rand(3)), z(5, 3), soft(5, 3)),
    "bce, images": (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(3, 1)), z(2, 3, 2), soft(2, 3, 2)),
}


class LogCosh(nn.Module):
    """A loss of a user, which has no reduction."""

    def forward(self, y, target):
        return (y - target).cosh().log().sum()


class Squared(CE):
    """A subclass that computes something else than its parent: it must not get the parent's rule."""

    def forward(self, y, target):
        return super().forward(y, target).square() if self.reduction != "none" else super().forward(y, target)


class Quadratic(nn.Module):
    """x^T A x for each row, with A not diagonal and of rank 2."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 5))

    def forward(self, y):
        return (y @ self.a.mT).square().sum()


class Logistic(nn.Module):
    """Rows of two axes, coupled within a row."""

    def forward(self, y):
        return y.flatten(1).logsumexp(1).square().sum() + y.exp().sum()


TWICE = {
    "a user's": (LogCosh, z(4, 3), z(4, 3)),
    "quadratic": (Quadratic, z(4, 5)),
    "two axes": (lambda: Logistic(), lambda: z(3, 2, 2)().abs()),
    "smooth l1": (nn.SmoothL1Loss, z(4, 3), z(4, 3)),
    "huber": (nn.HuberLoss, z(4, 3), z(4, 3)),
    "l1": (nn.L1Loss, z(4, 3), z(4, 3)),
    "nll, which is linear": (nn.NLLLoss, z(5, 4), y(4, 5)),
    "poisson": (nn.PoissonNLLLoss, z(4, 3), soft(4, 3)),
    "gaussian": (nn.GaussianNLLLoss, z(4, 3), z(4, 3), lambda: soft(4, 3)() + 0.1),
    "bce of probabilities": (nn.BCELoss, lambda: soft(4, 3)() * 0.8 + 0.1, soft(4, 3)),
    "several labels": (nn.MultiLabelSoftMarginLoss, z(4, 3), lambda: y(2, 4, 3)().double()),
    "divergence": (nn.KLDivLoss, z(4, 3), soft(4, 3)),
    "soft margin": (nn.SoftMarginLoss, z(4, 3), lambda: y(2, 4, 3)() * 2.0 - 1),
    "broadcast target": (nn.MSELoss, z(4, 3), z(4, 1)),
    "broadcast output": (nn.MSELoss, z(4, 1), z(4, 3)),
}


def made(table):
    return [pytest.param(*[case[0], case[1:]], id=name) for name, case in table.items()]


@pytest.mark.parametrize("loss, given", made(CROSS_ENTROPY | ELEMENTWISE))
def test_rule(loss, given, manager):
    loss, given = loss(), [make() for make in given]
    assert manager.find("loss", type(loss)).key is type(loss)
    check_loss(loss, *given)


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction:UserWarning")
@pytest.mark.parametrize("loss, given", made(TWICE))
def test_twice(loss, given):
    check_loss(loss(), *[make() for make in given])


def test_subclass_with_a_forward_of_its_own_goes_twice():
    output, target = z(1, 4)(), y(4, 1)()
    check_loss(Squared(), output, target)


@pytest.mark.parametrize("loss, given", made(CROSS_ENTROPY))
def test_twice_agrees_with_the_rule_for_cross_entropy(loss, given):
    loss, (output, *args) = loss().double(), [make() for make in given]
    if output.dim() == 1:
        output, args = output[None], [args[0][None]]
    h = nnj.twice(lambda o: loss(o, *args), (output,))
    g = loss_curvature(loss, torch.tensor(1.0, dtype=torch.float64), output, *args)
    torch.testing.assert_close(h.place(h.diagonal()[None]), g.place(g.diagonal()[None]), rtol=1e-9, atol=1e-12)
    v = torch.randn(2, *output.shape, dtype=torch.float64)
    ours = v.reshape(2, g.rows, g.block, g.places).mT
    theirs = v.reshape(2, h.rows, h.block, h.places).mT
    torch.testing.assert_close(h.place(h.product(theirs)), g.place(g.product(ours)), rtol=1e-9, atol=1e-12)


# -- numerics -------------------------------------------------------------------------------------------------------------

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
    h, exact = (loss_curvature(CE(), s, o, target) for s, o in ((scale, output), (scale.double(), output.double())))
    near = dict(rtol=1e-5, atol=1e-37)
    s = h.columns(0, h.rank)
    assert s.dtype == torch.float32 and bool(torch.isfinite(s).all())
    torch.testing.assert_close(h.diagonal().double(), exact.diagonal(), **near)
    torch.testing.assert_close(s.square().sum(0).double(), exact.diagonal(), **near)
    # Entries, not columns: classes of equal probability may be taken in another order.
    full = torch.einsum("jrdb,jrdc->rdbc", s.double(), s.double())
    t = exact.columns(0, exact.rank)
    size = exact.diagonal().sqrt()
    error = (full - torch.einsum("jrdb,jrdc->rdbc", t, t)).abs()
    assert bool((error <= 1e-5 * size[..., None] * size[..., None, :] + 1e-37).all())
    v = torch.randn(3, 2, 1, 4)
    torch.testing.assert_close(h.product(v).double(), exact.product(v.double()), rtol=1e-4, atol=1e-37)
    signs = h.signs(4)
    torch.testing.assert_close(h.combine(signs), torch.einsum("kjrd,jrdb->krdb", signs.float(), s), rtol=1e-4, atol=1e-25)


@pytest.mark.parametrize("logit", [20.0, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saturated_logits_by_autograd(logit, dtype):
    output, target = torch.tensor([[logit, 0.0, 1.0], [0.0, logit, -logit]], dtype=dtype), torch.tensor([0, 2])
    loss = lambda o: F.cross_entropy(o, target, reduction="sum")
    h, exact = nnj.twice(loss, (output,)), nnj.SoftmaxCurvature(output.double())
    diagonals = [c.place(c.diagonal()[None])[0].double() for c in (h, exact)]
    torch.testing.assert_close(*diagonals, rtol=1e-5, atol=1e-14)


def test_bce_is_exact_far_out():
    h = loss_curvature(nn.BCEWithLogitsLoss(reduction="sum"), torch.tensor(1.0), torch.tensor([[40.0, -40.0]]), torch.rand(1, 2))
    torch.testing.assert_close(h.diagonal().flatten(), torch.exp(torch.tensor([-40.0, -40.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make, target", [
    (ce(3, weighted=True), y(3, 2)), (nn.MSELoss, soft(2, 3)), (nn.HuberLoss, soft(2, 3)), (LogCosh, soft(2, 3)),
    (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.rand(3)), soft(2, 3)), (nn.BCELoss, soft(2, 3))])
def test_sixteen_bits_are_computed_in_float32(dtype, make, target):
    narrow, output, target = make().to(dtype), torch.rand(2, 3).to(dtype), target()
    target = target.to(dtype) if target.is_floating_point() else target
    wide = target.double() if target.is_floating_point() else target
    h = loss_curvature(narrow, torch.tensor(1.0, dtype=dtype), output, target)
    exact = loss_curvature(narrow.double(), torch.tensor(1.0, dtype=torch.float64), output.double(), wide)
    assert h.columns(0, 1).dtype == torch.float32
    torch.testing.assert_close(h.diagonal().double(), exact.diagonal(), rtol=1e-5, atol=1e-6)


def test_a_loss_that_insists_on_a_dtype_is_had_in_it():
    weight = torch.rand(3)
    target = torch.tensor([0, 2])
    for dtype in (torch.float32, torch.bfloat16):
        output = torch.randn(2, 3).to(dtype)
        w = weight.to(dtype)
        h = nnj.twice(lambda o, w=w: F.nll_loss(o.log_softmax(1), target, w), (output,))
        exact = loss_curvature(CE(w), torch.tensor(1.0), output, target)
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.diagonal(), exact.diagonal())


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_a_loss_with_parameters_is_had_in_float64(narrow):
    loss = Quadratic().to(narrow)
    h = nnj.twice(loss, (torch.randn(3, 5).to(narrow),))
    a = loss.a.detach().double()
    torch.testing.assert_close(h.diagonal()[:, 0], (2 * a.square().sum(0)).float().expand(3, 5), rtol=1e-6, atol=0.0)
    assert h.rank == 2


def test_a_loss_that_works_in_place_is_had_as_it_is():
    def call(o):
        total = torch.zeros(3)
        total.add_(o.exp().sum(0))
        part = torch.zeros(())
        part += total.sum()
        return part

    output = torch.randn(2, 3)
    torch.testing.assert_close(nnj.twice(call, (output,)).diagonal().flatten(), output.exp().flatten())


def test_a_loss_that_takes_one_dtype_alone_is_had_in_it():
    def call(o):
        assert o.dtype == torch.float32
        return o.exp().sum(1).square().sum()

    output = torch.randn(2, 3)
    h, exact = nnj.twice(call, (output,)), nnj.twice(lambda o: o.exp().sum(1).square().sum(), (output,))
    torch.testing.assert_close(h.diagonal(), exact.diagonal(), rtol=1e-4, atol=1e-4)


# -- structure ------------------------------------------------------------------------------------------------------------


def test_columns_of_many_classes_are_lazy():
    classes = 100_000  # all columns would be 80 GB
    h = loss_curvature(CE(), torch.tensor(1.0), torch.randn(2, classes), torch.tensor([0, 1]))
    assert h.rank == classes - 1
    s = h.columns(0, 3)
    assert s.shape == (3, 2, 1, classes)
    assert bool((h.columns(classes - 3, classes - 1) != 0).sum() <= 2 * (3 + 2))
    assert h.sample(2).shape == (2, 2, 1, classes)
    assert h.product(s).shape == s.shape
    p = h.p
    torch.testing.assert_close(h.diagonal(), p * (1 - p) / 2)


def test_columns_fall_and_what_is_cut_off_is_known():
    h = nnj.SoftmaxCurvature(3 * z(4, 6)())
    s, p = h.columns(0, 5), h.p.sort(-1, descending=True).values
    for k in range(5):
        q = p[..., k:].sum(-1)
        torch.testing.assert_close(s[k:].square().sum((0, -1)), q - p[..., k:].square().sum(-1) / q)


def test_samples_are_unbiased_and_independent_between_rows_and_places():
    h = loss_curvature(CE(), torch.tensor(1.0, dtype=torch.float64), z(2, 4, 2)(), y(4, 2, 2)())
    count = 20_000
    (s,) = h.place(h.sample(count, torch.Generator().manual_seed(1)))
    found = s.reshape(count, -1).T @ s.reshape(count, -1) / count
    (columns,) = h.place((torch.eye(4, dtype=s.dtype).reshape(4, 1, 2, 2, 1) * h.columns(0, 3)).flatten(0, 1))
    exact = columns.reshape(12, -1).T @ columns.reshape(12, -1)
    size = exact.diagonal().sqrt()
    assert bool(((found - exact).abs() <= 6 * (3 / count) ** 0.5 * size * size[:, None]).all())


def test_samples_depend_on_the_generator_alone():
    h = nnj.SoftmaxCurvature(z(3, 4)())
    draw = lambda seed: h.sample(6, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    torch.manual_seed(5)
    first = h.sample(2)
    torch.manual_seed(5)
    assert torch.equal(h.sample(2), first)


def test_twice_leaves_the_global_generator_alone():
    output, before = z(3, 2)(), torch.get_rng_state()
    nnj.twice(lambda o: o.exp().sum(1).square().sum(), (output,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_twice_in_any_grad_mode(mode):
    output = z(3, 2)()
    with mode():
        h = nnj.twice(lambda o: o.exp().sum(1).square().sum(), (output,))
    e = output.exp()
    torch.testing.assert_close(h.diagonal()[:, 0], 2 * e * (e + e.sum(1, keepdim=True)))


@pytest.mark.parametrize("rule, function, target", [
    (CE(label_smoothing=0.1), lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), y(4, 6)),
    (nn.MSELoss(), lambda o, t: (o - t).square().mean(), lambda: torch.randn(6, 4)),
    (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, lambda: torch.rand(6, 4))])
def test_rule_and_function_collect_the_same(rule, function, target, manager):
    manager.register(importlib.import_module("nnj_plugins.linear"), "nnj-linear")
    manager.register(importlib.import_module("nnj.quantities"), "nnj-quantities")
    model, x, target, found = nnj.extend(nn.Linear(3, 4)), torch.randn(6, 3), target(), []
    for loss in (nnj.extend(rule), nnj.extend(function)):
        with nnj.collect("ggn_diag"):
            loss(model(x), target).backward()
        found.append([p.ggn_diag for p in model.parameters()])
    torch.testing.assert_close(*found)
    assert found[0][0].any()


def test_twice_over_two_outputs():
    a, b = z(3, 2)(), z(3, 1, 2)()
    call = lambda a, b: (a.sum(1) + 2 * b.sum((1, 2))).square().sum() + a.exp().sum()
    h = nnj.twice(call, (a, b))
    assert (h.rows, h.places, h.block) == (3, 1, 4)
    s = h.place((torch.eye(3, dtype=a.dtype)[:, None, :, None, None] * h.columns(0, h.rank)).flatten(0, 1))
    flat = torch.cat([t.reshape(len(t), -1) for t in s], 1)
    joint = lambda t: call(t[:6].reshape(3, 2), t[6:].reshape(3, 1, 2))
    exact = torch.func.hessian(joint)(torch.cat([a.flatten(), b.flatten()]))
    torch.testing.assert_close(flat.T @ flat, exact)


def test_outputs_that_share_no_rows_are_one_block():
    a, b = z(3, 2)(), z()()
    h = nnj.twice(lambda a, b: (a.sum() + b).square(), (a, b))
    assert (h.rows, h.places, h.block, h.rank) == (1, 1, 7, 1)
    assert [t.shape for t in h.place(h.columns(0, 1))] == [(1, 3, 2), (1,)]
    torch.testing.assert_close(h.diagonal(), torch.full((1, 1, 7), 2.0, dtype=torch.float64))


def test_an_elementwise_loss_of_any_size_is_diagonal():
    output = torch.randn(2, 3, 100, 100)
    h = nnj.twice(lambda o: F.huber_loss(o, torch.zeros_like(o), reduction="sum"), (output,))
    assert (h.rows, h.places, h.block, h.rank) == (2, 30_000, 1, 1)
    torch.testing.assert_close(h.place(h.diagonal()[None])[0][0], (output.abs() < 1).float())


def test_columns_that_are_zero_for_every_row_are_left_out():
    torch.manual_seed(0)
    loss = Quadratic().double()
    assert nnj.twice(lambda o: loss(o), (z(4, 5)(),)).rank == 2


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
    h, exact = (nnj.twice(lambda o, f=f: f(o).sum(1).square().sum(), (output,)) for f in (Once.apply, torch.exp))
    torch.testing.assert_close(h.diagonal(), exact.diagonal())
    assert h.block == 4


@pytest.mark.parametrize("make", [lambda o: loss_curvature(CE(), torch.tensor(1.0), o, torch.zeros(len(o), dtype=torch.long)),
                                  lambda o: loss_curvature(nn.MSELoss(), torch.tensor(1.0), o, torch.zeros_like(o)),
                                  lambda o: nnj.twice(lambda o: o.square().sum(), (o,))])
def test_no_rows(make):
    output = torch.zeros(0, 3)
    h = make(output)
    assert h.rows == 0
    assert h.place(h.sample(2))[0].shape == (2, 0, 3)
    assert h.diagonal().numel() == 0 and h.product(h.sample(2)).numel() == 0


def test_explicit_blocks():
    a = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    h = nnj.BlockCurvature(a @ a.mT, [(3, 4, 2)])
    s = h.columns(0, h.rank)
    torch.testing.assert_close(torch.einsum("jrdb,jrdc->rdbc", s, s), a @ a.mT)
    v = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(h.product(v), (v[..., None, :] @ (a @ a.mT))[..., 0, :])
    torch.testing.assert_close(h.diagonal(), (a @ a.mT).diagonal(dim1=-2, dim2=-1))
    (placed,) = h.place(v)
    torch.testing.assert_close(placed[1, 2, :, 1], v[1, 2, 1])


def test_a_curvature_needs_only_columns():
    class Ours(nnj.Curvature):
        def __init__(self, s, shape):
            super().__init__([shape], s, s.shape[-1], len(s))
            self.s = s

        def columns(self, start, stop):
            return self.s[start:stop]

    s = torch.randn(150, 3, 1, 5, dtype=torch.float64)
    h = Ours(s, (3, 5))
    full = torch.einsum("jrdb,jrdc->rdbc", s, s)
    torch.testing.assert_close(h.diagonal(), full.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(h.product(s[:4]), torch.einsum("rdbc,krdc->krdb", full, s[:4]))
    signs = h.signs(3, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(h.sample(3, torch.Generator().manual_seed(0)), torch.einsum("kjrd,jrdb->krdb", signs, s))


@pytest.mark.parametrize("options", [{}, dict(weight=torch.rand(4)), dict(label_smoothing=0.1)])
def test_all_targets_ignored_gives_zero_as_the_gradient_is(options):
    output, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    loss = CE(**options)
    loss(output, target).backward()
    assert not output.grad.any()
    h = loss_curvature(loss, torch.tensor(1.0), output.detach(), target)
    assert not h.columns(0, 3).any() and not h.diagonal().any()


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_convex():
    message = r"sin: its Hessian in the output is not positive semi-definite \(smallest eigenvalue -1\)"
    with pytest.raises(nnj.NNJError, match=message):
        nnj.twice(lambda o: o.sin().sum(), (torch.full((2, 3), torch.pi / 2),), "sin")
    with pytest.raises(nnj.NNJError, match="not positive semi-definite"):
        nnj.twice(lambda o: o.prod(1).sum(), (z(3, 2)(),))
    with pytest.raises(nnj.NNJError, match=r"CosineEmbeddingLoss.*not positive.*write a loss rule"):
        loss_curvature(nn.CosineEmbeddingLoss(), torch.tensor(1.0), torch.randn(3, 4), torch.randn(3, 4), torch.ones(3))
    with pytest.raises(nnj.NNJError, match=r"CrossEntropyLoss.*not positive"):
        loss_curvature(CE(), torch.tensor(1.0), torch.randn(2, 3), -torch.rand(2, 3))
    with pytest.raises(nnj.NNJError, match="not positive semi-definite"):
        nnj.BlockCurvature(torch.diag(torch.tensor([1.0, -0.1]))[None, None], [(1, 2)])


@pytest.mark.parametrize("call", [
    lambda o: o.sum().square(), lambda o: (o - o.mean(0)).square().sum(), lambda o: o.logsumexp(0).sum(),
    lambda o: o.square().sum() + 1e-3 * o[0, 0] * o[1, 1], lambda o: o.square().sum().sqrt() + (o[:1] * o[1:2]).sum()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_couples_rows(call, dtype):
    with pytest.raises(nnj.NNJError, match="contrast couples rows of the batch"):
        nnj.twice(call, (torch.randn(6, 3, dtype=dtype),), "contrast")


def test_a_loss_of_one_axis_that_couples_entries():
    with pytest.raises(nnj.NNJError, match="couples rows of the batch"):
        nnj.twice(lambda o: o.sum().square(), (z(4)(),))


@pytest.mark.parametrize("make, message", [
    (lambda: torch.randn(2, 3, dtype=torch.complex64), r"loss: .*is complex \(torch.complex64\).*view_as_real"),
    (lambda: torch.ones(2, 3, dtype=torch.long), r"loss: the output of the model is not of floating point \(torch.int64\)"),
    (lambda: torch.tensor([[1.0, torch.nan]]), "loss: the output of the model has entries that are not finite"),
    (lambda: torch.tensor([[1.0, torch.inf]]), "not finite"), (lambda: torch.tensor([[1.0, -torch.inf]]), "not finite")])
def test_outputs_without_curvature(make, message):
    with pytest.raises(nnj.NNJError, match=message):
        check_outputs("loss", [torch.zeros(2), make()])
    with pytest.raises(nnj.NNJError, match=message):
        nnj.twice(lambda o: o.abs().square().sum(), (make(),), "loss")


def test_rows_that_are_too_long():
    with pytest.raises(nnj.NNJError, match=r"1 blocks of 5000 x 5000.*4096.*loss rule"):
        nnj.twice(lambda o: o.logsumexp(1).sum(), (torch.randn(1, 5000),))


def test_a_hessian_that_is_not_finite():
    with pytest.raises(nnj.NNJError, match="its Hessian is not finite"):
        nnj.twice(lambda o: o.sqrt().sum(), (torch.zeros(2, 3),))
    with pytest.raises(nnj.NNJError, match="its Hessian is not finite"):
        loss = CE(weight=torch.tensor([0.0, 1.0]), label_smoothing=0.1)
        loss_curvature(loss, torch.tensor(1.0), torch.randn(1, 2), torch.tensor([0]))


def test_a_loss_that_draws_random_numbers():
    with pytest.raises(nnj.NNJError, match="another value each time"):
        nnj.twice(lambda o: F.dropout(o, 0.5).square().sum(), (torch.ones(50, 3),))


def test_a_loss_without_second_derivatives():
    loss = nn.CTCLoss()
    args = (torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 5]), torch.tensor([2, 2]))
    with pytest.raises(nnj.NNJError, match=r"CTCLoss cannot be differentiated twice by autograd: .*loss rule"):
        loss_curvature(loss, torch.tensor(1.0), torch.randn(5, 2, 3).log_softmax(2), *args)


def test_check_loss_finds_a_wrong_rule(manager):
    class Half(nn.MSELoss):
        """Its rule forgets the mean."""

    def rule(m, scale, y, target):
        return nnj.DiagonalCurvature(torch.full_like(y, 2.0) * scale)

    class Plugin:
        @nnj.hookimpl
        def nnj_register_losses(self, register):
            register(Half, rule)

    manager.register(Plugin(), "half")
    with pytest.raises(AssertionError, match=r"Half\(reduction='mean'\): S S\^T is wrong"):
        check_loss(Half(), z(3, 2)(), z(3, 2)())

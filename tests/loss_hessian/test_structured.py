"""Columns, samples and products of a curvature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.loss_hessian import structured
from nnj.registry.loss_rules import hessian_of_loss
from tests.support.losses import CE, y, z

pytestmark = pytest.mark.usefixtures("seeded")


def test_columns_of_many_classes_are_lazy():
    classes = 100_000  # all columns would be 80 GB
    h = hessian_of_loss(CE(), torch.tensor(1.0), torch.randn(2, classes), torch.tensor([0, 1]))
    assert h.rank == classes - 1
    s = h.columns(0, 3)
    assert s.shape == (3, 2, 1, classes)
    assert bool((h.columns(classes - 3, classes - 1) != 0).sum() <= 2 * (3 + 2))
    assert h.sample(2).shape == (2, 2, 1, classes)
    assert h.product(s).shape == s.shape
    p = h.p
    torch.testing.assert_close(h.diagonal(), p * (1 - p) / 2)


def test_columns_fall_and_what_is_cut_off_is_known():
    h = nnj.SoftmaxHessian(3 * z(4, 6)())
    s, p = h.columns(0, 5), h.p.sort(-1, descending=True).values
    for k in range(5):
        q = p[..., k:].sum(-1)
        torch.testing.assert_close(s[k:].square().sum((0, -1)), q - p[..., k:].square().sum(-1) / q)


def test_samples_are_unbiased_and_independent_between_rows_and_places():
    h = hessian_of_loss(CE(), torch.tensor(1.0, dtype=torch.float64), z(2, 4, 2)(), y(4, 2, 2)())
    count = 20_000
    (s,) = h.to_outputs(h.sample(count, torch.Generator().manual_seed(1)))
    found = s.reshape(count, -1).T @ s.reshape(count, -1) / count
    (columns,) = h.to_outputs(
        (torch.eye(4, dtype=s.dtype).reshape(4, 1, 2, 2, 1) * h.columns(0, 3)).flatten(0, 1)
    )
    exact = columns.reshape(12, -1).T @ columns.reshape(12, -1)
    size = exact.diagonal().sqrt()
    assert bool(((found - exact).abs() <= 6 * (3 / count) ** 0.5 * size * size[:, None]).all())


def logits(classes: int, sure: float) -> torch.Tensor:
    """(4, classes), of which the likeliest class has about this probability."""
    p = z(4, classes)().softmax(1)
    p[:, 0] = 0.0
    p = p / p.sum(1, keepdim=True) * (1 - sure)
    p[:, 0] = sure
    return p.log()


def factor_of_draws(h: nnj.SoftmaxHessian) -> torch.Tensor:
    units = torch.eye(h.mixed, dtype=h.dtype)[:, :, None, None]
    return h.mix(units.expand(-1, -1, h.rows, h.places))


@pytest.mark.parametrize("leading", [0, 1, 2, 8, 64])
@pytest.mark.parametrize("classes", [1, 2, 9, 80])
def test_draws_are_of_a_factor_of_h(monkeypatch, classes: int, leading: int):
    """However many classes have a column of their own, and where outputs are saturated."""
    monkeypatch.setattr(structured, "LEADING", leading)
    given = torch.cat([3 * z(4, classes)(), 1e3 * z(4, classes)(), logits(classes, 0.999)])
    for output in (given.nan_to_num(), given.nan_to_num()[..., None].expand(-1, -1, 2)):
        h = nnj.SoftmaxHessian(output, 2.0)
        t, p = factor_of_draws(h), h.p
        true = 2 * (torch.diag_embed(p) - p[..., None] * p[..., None, :])
        found = torch.einsum("jrdb,jrdc->rdbc", t, t)
        torch.testing.assert_close(found, true, rtol=0, atol=4e-15)
        h.sample(2)
        assert "_sorted" not in vars(h)


def noise(t: torch.Tensor) -> torch.Tensor:
    """The deviation of (sum_j e_j t_j J)^2 for random signs e and some J, over its mean."""
    j = torch.randn(t.shape[-1], 50, generator=torch.Generator().manual_seed(0), dtype=t.dtype)
    second, fourth = ((t @ j).pow(power).sum(0) for power in (2, 4))
    return (2 * (1 - fourth / second.square())).clamp(min=0).sqrt().mean()


@pytest.mark.parametrize("sure", [0.5, 0.999])
def test_draws_vary_as_those_of_sorted_columns_do(monkeypatch, sure: float):
    h = nnj.SoftmaxHessian(logits(500, sure))
    least = noise(h.columns(0, h.rank))
    assert noise(factor_of_draws(h)) <= 1.02 * least
    monkeypatch.setattr(structured, "LEADING", 0)
    assert noise(factor_of_draws(h)) > 1.05 * least


@pytest.mark.parametrize("n", [23, 24, 50])
@pytest.mark.parametrize("d", [1, 5, 64, 65])
def test_a_gram_matrix_of_many_samples(monkeypatch, n: int, d: int):
    """As one product for all of them, or sample by sample."""
    monkeypatch.setattr(structured, "MATRICES", 3 * d * d)
    rows, weight = torch.randn(7, d).double(), torch.rand(n, 7).double()
    true = torch.einsum("nc,ci,cj->nij", weight, rows, rows)
    torch.testing.assert_close(structured._weighted_gram(rows, weight), true)


def test_samples_depend_on_the_generator_alone():
    h = nnj.SoftmaxHessian(z(3, 4)())
    draw = lambda seed: h.sample(6, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    torch.manual_seed(5)
    first = h.sample(2)
    torch.manual_seed(5)
    assert torch.equal(h.sample(2), first)


@pytest.mark.parametrize(
    "rule, function, target",
    [
        (CE(label_smoothing=0.1), lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), y(4, 6)),
        (nn.MSELoss(), lambda o, t: (o - t).square().mean(), lambda: torch.randn(6, 4)),
        (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, lambda: torch.rand(6, 4)),
    ],
)
def test_rule_and_function_collect_the_same(rule, function, target):
    model, x, target, found = nnj.extend(nn.Linear(3, 4)), torch.randn(6, 3), target(), []
    for loss in (nnj.extend(rule), nnj.extend(function)):
        with nnj.collect("ggn_diag"):
            loss(model(x), target).backward()
        found.append([p.ggn_diag for p in model.parameters()])
    torch.testing.assert_close(*found)
    assert found[0][0].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: hessian_of_loss(
            CE(), torch.tensor(1.0), o, torch.zeros(len(o), dtype=torch.long)
        ),
        lambda o: hessian_of_loss(nn.MSELoss(), torch.tensor(1.0), o, torch.zeros_like(o)),
        lambda o: nnj.autodiff_hessian(lambda o: o.square().sum(), (o,)),
    ],
)
def test_no_rows(make):
    output = torch.zeros(0, 3)
    h = make(output)
    assert h.rows == 0
    assert h.to_outputs(h.sample(2))[0].shape == (2, 0, 3)
    assert h.diagonal().numel() == 0 and h.product(h.sample(2)).numel() == 0


def test_explicit_blocks():
    a = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    h = nnj.BlockHessian(a @ a.mT, [(3, 4, 2)])
    s = h.columns(0, h.rank)
    torch.testing.assert_close(torch.einsum("jrdb,jrdc->rdbc", s, s), a @ a.mT)
    v = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(h.product(v), (v[..., None, :] @ (a @ a.mT))[..., 0, :])
    torch.testing.assert_close(h.diagonal(), (a @ a.mT).diagonal(dim1=-2, dim2=-1))
    (placed,) = h.to_outputs(v)
    torch.testing.assert_close(placed[1, 2, :, 1], v[1, 2, 1])


def test_a_curvature_needs_only_columns():
    class Ours(nnj.LossHessian):
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
    torch.testing.assert_close(
        h.sample(3, torch.Generator().manual_seed(0)), torch.einsum("kjrd,jrdb->krdb", signs, s)
    )

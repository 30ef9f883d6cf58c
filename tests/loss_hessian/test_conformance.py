"""Every class of Hessian against the dense H: one table of cases, in which each class must be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.loss_hessian import base
from nnj.propagation.weight_contractions import UnitHessian
from tests.support.subclasses import subclasses

pytestmark = pytest.mark.usefixtures("seeded")
CLOSE: dict[str, Any] = dict(rtol=1e-10, atol=1e-11)
Case = tuple[nnj.LossHessian, Tensor]  # with the dense blocks, (R, D, B, B)


class Stranger(nnj.LossHessian):
    """What a stranger must define, and no more: S of (rank, R, D, B)."""

    def __init__(self, s: Tensor, *shapes: tuple[int, ...]):
        super().__init__(list(shapes), s, s.shape[-1], len(s), s.shape[1])
        self.s = s

    def columns(self, start: int, stop: int) -> Tensor:
        return self.s[start:stop]


class FastStranger(Stranger):
    """It is taken together with the last layer, by the defaults."""

    closed_form = True


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def softmax(z: Tensor, a: Tensor | float = 1.0, axis: int = 1) -> Case:
    p = z.movedim(axis, -1) if z.dim() > 1 else z[None]
    p = p.reshape(p.shape[0], -1, p.shape[-1]).softmax(-1)
    h = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    weight = torch.as_tensor(a, dtype=z.dtype)
    weight = weight.reshape(*p.shape[:2], 1, 1) if weight.dim() else weight
    return nnj.SoftmaxHessian(z, a, axis=axis), h * weight


def diagonal(*shapes: tuple[int, ...]) -> Case:
    h = torch.cat([normal(*shape).square().flatten(1) for shape in shapes], 1)
    h[:, ::3] = 0.0
    return nnj.DiagonalHessian(h, shapes), h[..., None, None]


def blocks(d: int, *shapes: tuple[int, ...]) -> Case:
    n = shapes[0][0]
    b = sum(math.prod(shape) // n for shape in shapes) // d
    a = normal(n, d, b, max(1, b - 1))
    return nnj.BlockHessian(a @ a.mT, shapes), a @ a.mT


def stranger(s: Tensor, *shapes: tuple[int, ...], cls: type[Stranger] = Stranger) -> Case:
    return cls(s, *shapes), torch.einsum("jrdb,jrdc->rdbc", s, s)


def pairs() -> Case:
    """Of nn.MultiMarginLoss: (e_c - e_t)(e_c - e_t)^T for the classes c within the margin."""
    z, t = normal(4, 6), torch.randint(6, (4,))
    found = nnj.hessian_of_loss(nn.MultiMarginLoss(p=2), torch.tensor(3.0).double(), z, t)
    h = torch.zeros(4, 6, 6, dtype=z.dtype)
    for n, c in itertools.product(range(4), range(6)):
        if c != t[n] and 1 - z[n, t[n]] + z[n, c] > 0:
            e = torch.eye(6, dtype=z.dtype)[c] - torch.eye(6, dtype=z.dtype)[t[n]]
            h[n] += 2 * 3.0 / 6 / 4 * torch.outer(e, e)
    return found, h[:, None]


def unit(*shape: int) -> Case:
    """The identity in the outputs, (R, 1, B, B)."""
    c = UnitHessian(normal(*shape))
    eye = torch.eye(c.block, dtype=torch.float64)
    return c, eye.expand(shape[0], 1, -1, -1)


CASES: dict[str, Callable[[], Case]] = {
    "pairs": pairs,
    "unit": lambda: unit(4, 6),
    "unit, places": lambda: unit(4, 3, 2),
    "softmax": lambda: softmax(3 * normal(4, 6)),
    "softmax, weighted": lambda: softmax(normal(4, 6), torch.tensor([2.0, 0.0, 1.0, 0.5])),
    "softmax, places": lambda: softmax(normal(4, 6, 2, 3), torch.rand(4, 2, 3)),
    "softmax, last axis": lambda: softmax(normal(4, 2, 6), torch.rand(4, 2), axis=2),
    "softmax, one sample": lambda: softmax(normal(6)),
    "softmax, one class": lambda: softmax(normal(4, 1)),
    "softmax, sure": lambda: softmax(40 * torch.eye(6, dtype=torch.float64)[:4]),
    "softmax, equal": lambda: softmax(torch.zeros(3, 6, dtype=torch.float64)),
    "diagonal": lambda: diagonal((4, 6)),
    "diagonal, places": lambda: diagonal((4, 3, 2)),
    "diagonal, two outputs": lambda: diagonal((4, 3), (4, 2, 2)),
    "blocks": lambda: blocks(1, (4, 6)),
    "blocks, places": lambda: blocks(2, (4, 3, 2)),
    "blocks, two outputs": lambda: blocks(1, (4, 3), (4, 2)),
    "stranger": lambda: stranger(normal(150, 4, 1, 5), (4, 5)),
    "stranger, places": lambda: stranger(normal(2, 4, 3, 2), (4, 2, 3)),
    "stranger, fast": lambda: stranger(normal(7, 4, 1, 5), (4, 5), cls=FastStranger),
}


def test_every_class_has_a_case() -> None:
    ours = subclasses(nnj.LossHessian)
    assert ours and ours <= {type(make()[0]) for make in CASES.values()}


@pytest.fixture(params=["", "small chunks"])
def chunks(request: Any, monkeypatch: Any) -> None:
    if request.param:
        monkeypatch.setattr(base, "_CHUNK", 2)


@pytest.fixture(params=CASES)
def case(request: Any, chunks: None) -> Case:
    return CASES[request.param]()


def flat_blocks(c: nnj.LossHessian, h: Tensor) -> Tensor:
    """H of each row over all its outputs, (R, entries, entries), by where each entry stands."""
    size = c.block * c.places
    eye = torch.eye(size, dtype=h.dtype).reshape(size, 1, c.places, c.block)
    outputs = c.to_outputs(eye.expand(size, c.rows, c.places, c.block))
    where = torch.cat([t.reshape(size, c.rows, -1) for t in outputs], -1)  # (entry, R, position)
    whole = h.new_zeros(c.rows, c.places, c.block, c.places, c.block)
    for d in range(c.places):
        whole[:, d, :, d] = h[:, d]
    return torch.einsum("erp,ref,frq->rpq", where, whole.flatten(3).flatten(1, 2), where)


def test_columns(case: Case) -> None:
    c, h = case
    s = c.columns(0, c.rank)
    assert s.shape == (c.rank, c.rows, c.places, c.block) and s.dtype == c.dtype
    torch.testing.assert_close(torch.einsum("jrdb,jrdc->rdbc", s, s), h, **CLOSE)
    for a, b in itertools.combinations(range(min(c.rank, 5) + 1), 2):
        torch.testing.assert_close(c.columns(a, b), s[a:b], **CLOSE)
    torch.testing.assert_close(c.norms(), s.square().sum(-1), **CLOSE)
    row, place = torch.randint(c.rows, (9,)), torch.randint(c.places, (9,))
    j = torch.randint(c.rank, (9,))
    torch.testing.assert_close(c.columns_at(row, place, j), s[j, row, place], **CLOSE)
    assert c.columns_at(row[:0], place[:0], j[:0]).shape == (0, c.block)


def test_products(case: Case) -> None:
    c, h = case
    torch.testing.assert_close(c.diagonal(), h.diagonal(dim1=-2, dim2=-1), **CLOSE)
    v = normal(3, c.rows, c.places, c.block)
    torch.testing.assert_close(c.product(v), torch.einsum("rdbc,krdc->krdb", h, v), **CLOSE)


def test_random_combinations(case: Case) -> None:
    """Of S, and of the factor T of which draws are made."""
    c, h = case
    s, given = c.columns(0, c.rank), normal(3, c.rank, c.rows, c.places)
    expected = torch.einsum("kjrd,jrdb->krdb", given, s)
    torch.testing.assert_close(c.combine(given), expected, **CLOSE)
    units = torch.eye(c.mixed, dtype=torch.float64)[:, :, None, None]
    t = c.mix(units.expand(-1, -1, c.rows, c.places))
    torch.testing.assert_close(torch.einsum("jrdb,jrdc->rdbc", t, t), h, **CLOSE)
    draw = lambda: torch.Generator().manual_seed(3)
    signs = c.signs(5, draw())
    assert signs.shape == (5, c.mixed, c.rows, c.places) and bool((signs.abs() == 1).all())
    expected = torch.einsum("kjrd,jrdb->krdb", signs.double(), t)
    torch.testing.assert_close(c.sample(5, draw()), expected, **CLOSE)


def test_the_layout_of_outputs(case: Case) -> None:
    c, h = case
    v = normal(3, c.rows, c.places, c.block)
    parts = c.to_outputs(v)
    assert [tuple(t.shape) for t in parts] == [(3, *shape) for shape in c.shapes]
    assert [t[0].numel() // max(c.rows, 1) for t in parts] == c.sizes
    flat = torch.cat([t.reshape(3, c.rows, -1) for t in parts], -1)
    assert torch.equal(c.flat(v), flat)
    whole = c.flat_factor()
    assert whole.shape == (c.rank * c.places, c.rows, c.block * c.places)
    torch.testing.assert_close(
        torch.einsum("krp,krq->rpq", whole, whole), flat_blocks(c, h), **CLOSE
    )


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_behind_a_map_that_all_rows_share(case: Case, size: int) -> None:
    c, h = case
    rows = normal(c.block * c.places, 3)
    expected = rows.T @ flat_blocks(c, h) @ rows
    found = list(c.columns_through(rows, size))
    assert all(v.shape[1:] == (c.rows, 3) and 1 <= len(v) <= size for v in found)
    s = torch.cat(found)
    assert len(s) == c.rank * c.places
    torch.testing.assert_close(torch.einsum("krp,krq->rpq", s, s), expected, **CLOSE)
    assert torch.cat(list(c.columns_through(rows.float(), size))).dtype == torch.float32
    torch.testing.assert_close(c.gram_through(rows), expected, **CLOSE)
    assert c.gram_through(rows.float()).dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnj.SoftmaxHessian(normal(0, 6)),
        lambda: nnj.DiagonalHessian(normal(0, 6)),
        lambda: Stranger(normal(2, 0, 1, 6), (0, 6)),
    ],
)
def test_no_rows(make: Callable[[], nnj.LossHessian]) -> None:
    c = make()
    assert c.gram_through(normal(6, 3)).shape == (0, 3, 3)
    assert torch.cat(list(c.columns_through(normal(6, 3), 2))).shape[1:] == (0, 3)
    assert c.flat_factor().shape == (c.rank * c.places, 0, 6)


def test_a_subclass_without_its_columns() -> None:
    with pytest.raises(TypeError, match="^Nothing must define columns$"):
        type("Nothing", (nnj.LossHessian,), {})

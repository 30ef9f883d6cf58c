"""Every class of factor against the dense B: one table of cases, in which each class must be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nnj
from nnj.jacobians import factor as factor_file
from nnj.jacobians import outer_kernels, outer_product, outer_squares
from nnj.jacobians import patches as patches_file
from nnj.jacobians.factor import DenseFactor, Factor, ScaledFactor, SumFactor, merge_uses
from nnj.jacobians.kron import Kron
from nnj.jacobians.outer_kron import OuterKron
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches
from nnj.jacobians.row_sparse import RowSparse
from nnj.jacobians.shared_columns import SharedColumns, Unit
from nnj.jacobians.views import View, ViewFactor
from nnj.propagation.hooks import EdgeMap, HookedFactor
from nnj.propagation.last_layer import LastLayerFactor
from nnj.propagation.unharmed import leaf_edge
from tests.support.subclasses import subclasses

pytestmark = pytest.mark.usefixtures("seeded")
SIZES = [(5, 4), (1, 4), (5, 1), (0, 4), (5, 0)]  # K and N
CLOSE: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


class Stranger(Factor):
    """What a stranger must define, and no more."""

    def __init__(self, b: Tensor):
        self.b, self.k, self.n, self.shape = b, b.shape[0], b.shape[1], tuple(b.shape[2:])
        self.device, self.dtype = b.device, b.dtype

    def dense(self) -> Tensor:
        return self.b

    def columns(self, which: slice) -> Factor:
        return type(self)(self.b[which])


class SparseStranger(Stranger):
    """Its `inner` is asked for first, and is the default."""

    sparse = True


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def hooked(shape: tuple[int, ...]) -> EdgeMap:
    """A hook on a parameter that mixes its entries."""
    p = normal(*shape).requires_grad_()
    p.register_hook(lambda g: g.cumsum(-1))
    return EdgeMap(leaf_edge(p), lambda: None)


def outer(k: int, n: int, shape: tuple[int, ...], places: int = 1, groups: int = 1) -> OuterProduct:
    """V U^T at a parameter of `shape`, with U made in parts."""
    o, i = shape[0] // groups, torch.Size(shape[1:]).numel()
    u = normal(n, groups, i, places)
    return OuterProduct(Patches(lambda rows: u[rows], n, i), normal(k, n, groups, o, places), shape)


def sparse(k: int, n: int, shape: tuple[int, ...], m: int = 6) -> RowSparse:
    """M entries, of which some repeat and some are nobody's."""
    m = m if n else 0
    sample = torch.randint(-1, max(n, 1), (m,))
    return RowSparse.build(
        normal(k, m, *shape[1:]), sample, torch.randint(shape[0], (m,)), n, shape
    )


def last(hessian: Callable[[int, int], nnj.LossHessian], inputs: int = 3) -> Callable[..., Factor]:
    """Of a last layer: K is that of the Hessian."""

    def make(k: int, n: int) -> Factor:
        h = hessian(max(k, 1), n)
        u = normal(n, 1, inputs, 1)
        shape = (h.block * h.places, inputs)
        whole = LastLayerFactor(h, Patches.of(u), shape, torch.float64)
        return whole.columns(slice(0, k))

    return make


W, ROWS = (4, 3), lambda start, stop: View.rows((4, 3), start, stop)
TRANSPOSED = View.permuted((4, 3), (3, 4))
CHANNELS = View.permuted((4, 3, 2), (6, 2, 2), (2, 2, 3, 2), (0, 2, 1, 3))  # of two groups
CASES: dict[str, Callable[[int, int], Factor]] = {
    "dense": lambda k, n: DenseFactor(normal(k, n, *W)),
    "dense, of a number": lambda k, n: DenseFactor(normal(k, n)),
    "stranger": lambda k, n: Stranger(normal(k, n, *W)),
    "sparse stranger": lambda k, n: SparseStranger(normal(k, n, *W)),
    "outer": lambda k, n: outer(k, n, W),
    "outer, of shared columns": lambda k, n: OuterProduct(
        normal(n, 1, 3, 1), (v := normal(k, n, 4))[:, :, None, :, None], W, v
    ),
    "outer, places": lambda k, n: outer(k, n, W, 2),
    "outer, many places": lambda k, n: outer(k, n, W, 40),
    "outer, few places of many entries": lambda k, n: outer(k, n, (24, 20), 2),
    "outer, groups, few places": lambda k, n: outer(k, n, (48, 20), 2, 2),
    "outer, one row": lambda k, n: outer(k, n, (1, 3), 2),
    "outer, a bias": lambda k, n: OuterProduct(
        torch.ones(n, 1, 1, 1, dtype=torch.float64), normal(k, n, 1, 4, 1), (4,)
    ),
    "outer, groups": lambda k, n: outer(k, n, (4, 3, 2), 5, 2),
    "outer, groups, many places": lambda k, n: outer(k, n, (4, 3, 2), 40, 2),
    "outer, no place": lambda k, n: outer(k, n, W, 0),
    "outer, transposed memory": lambda k, n: OuterProduct(
        normal(n, 1, 3, 5), normal(k, n, 1, 5, 4).mT, W
    ),
    "sparse": lambda k, n: sparse(k, n, W),
    "sparse, of numbers": lambda k, n: sparse(k, n, (4,)),
    "sparse, nothing": lambda k, n: sparse(k, n, W, 0),
    "last layer, softmax": last(lambda k, n: nnj.SoftmaxHessian(normal(n, k + 1), 2.0)),
    "last layer, diagonal": last(lambda k, n: nnj.DiagonalHessian(normal(n, k).square())),
    "shared columns": lambda k, n: SharedColumns(
        Patches.of(normal(n, 1, 3, 1)), normal(k, 4), W, normal(0)
    ),
    "unit columns": lambda k, n: SharedColumns(
        Patches.of(normal(n, 1, 3, 1)), Unit(1, k, k + 2), (k + 2, 3), normal(0)
    ),
    "sum": lambda k, n: SumFactor([outer(k, n, W, 2), DenseFactor(normal(k, n, *W))]),
    "sum, sparse": lambda k, n: SumFactor([sparse(k, n, W), outer(k, n, W), outer(k, n, W, 2)]),
    "sum, sparse alone": lambda k, n: SumFactor(
        [sparse(k, n, W), SparseStranger(normal(k, n, *W))]
    ),
    "view, transposed": lambda k, n: ViewFactor([(TRANSPOSED, outer(k, n, (3, 4), 2))]),
    "view, transposed table": lambda k, n: ViewFactor([(TRANSPOSED, sparse(k, n, (3, 4)))]),
    "view, channels": lambda k, n: ViewFactor([(CHANNELS, outer(k, n, (6, 2, 2), 2, 2))]),
    "view, rows": lambda k, n: ViewFactor([(ROWS(1, 3), outer(k, n, (2, 3)))]),
    "view, no rows": lambda k, n: ViewFactor([(ROWS(2, 2), DenseFactor(normal(k, n, 0, 3)))]),
    "view, rows in parts": lambda k, n: ViewFactor(
        [(ROWS(2, 4), outer(k, n, (2, 3), 2)), (ROWS(0, 1), DenseFactor(normal(k, n, 1, 3)))]
    ),
    "view of a view": lambda k, n: ViewFactor(
        [(TRANSPOSED, ViewFactor([(View.rows((3, 4), 0, 2), outer(k, n, (2, 4)))]))]
    ),
    "scaled": lambda k, n: ScaledFactor(outer(k, n, W, 2), normal(*W)),
    "scaled, by sample": lambda k, n: ScaledFactor(sparse(k, n, W), normal(n, *W)),
    "hooked": lambda k, n: HookedFactor(outer(k, n, W, 2), hooked(W)),
    "no entries": lambda k, n: DenseFactor(normal(k, n, 0, 3)),
    "uses: outer": lambda k, n: merge_uses([outer(k, n, W, 2), outer(k, n, W)]),
    "uses: tables": lambda k, n: merge_uses([sparse(k, n, W), sparse(k, n, W)]),
    "uses: a table and a layer, tied": lambda k, n: merge_uses(
        [sparse(k, n, W), outer(k, n, W), sparse(k, n, W), outer(k, n, W)]
    ),
    "uses: transposed": lambda k, n: merge_uses(
        [ViewFactor([(TRANSPOSED, outer(k, n, (3, 4), 2))]) for _ in range(2)]
    ),
    "uses: rows apart": lambda k, n: merge_uses(
        [ViewFactor([(ROWS(*ends), outer(k, n, (2, 3)))]) for ends in ((2, 4), (0, 2))]
    ),
    "uses: rows alike": lambda k, n: merge_uses(
        [ViewFactor([(ROWS(1, 3), outer(k, n, (2, 3)))]) for _ in range(2)]
    ),
    "uses: rows that overlap": lambda k, n: merge_uses(
        [
            ViewFactor([(ROWS(0, 3), outer(k, n, (3, 3)))]),
            ViewFactor([(ROWS(2, 4), outer(k, n, (2, 3)))]),
        ]
    ),
    "uses: rows and a transposed": lambda k, n: merge_uses(
        [
            ViewFactor([(TRANSPOSED, outer(k, n, (3, 4)))]),
            ViewFactor([(ROWS(2, 4), outer(k, n, (2, 3)))]),
            outer(k, n, W),
        ]
    ),
}


def test_every_class_has_a_case() -> None:
    ours = subclasses(Factor)
    assert ours and ours <= {type(make(5, 4)) for make in CASES.values()}


def check_some_rows(f: Factor, b: Tensor) -> None:
    """B in some rows of the parameter."""
    length = f.shape[0] if f.shape else 0
    for start, stop in ((0, length), (1, length)) if length else ():
        some = f.rows(start, stop)
        assert some.shape == (stop - start, *f.shape[1:])
        torch.testing.assert_close(some.dense(), b[:, :, start:stop], **CLOSE)
        squares = b[:, :, start:stop].square().sum((0, 1))
        torch.testing.assert_close(some.square_sum(), squares, **CLOSE)


def parts(f: Factor) -> Iterator[slice]:
    """Columns in chunks that are not all as long."""
    ends = [e for e in (0, 2, 3) if e < f.k] + [f.k]
    return (slice(a, b) for a, b in itertools.pairwise(ends))


def check(f: Factor, b: Tensor) -> None:
    """All methods of a factor of one, against the dense B."""
    assert (f.k, f.n, *f.shape) == b.shape and (f.dtype, f.device) == (b.dtype, b.device)
    torch.testing.assert_close(f.dense(), b, **CLOSE)
    single = f.to(torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.dense(), b.float(), rtol=1e-4, atol=1e-4)
    for which in [slice(0, f.k), *parts(f)]:
        torch.testing.assert_close(f.columns(which).dense(), b[which], **CLOSE)
    check_products(f, b)
    check_rotated(f, b)
    check_kron(f, b)
    check_squares(f, b)
    check_rows(f, b)
    check_some_rows(f, b)


def check_products(f: Factor, b: Tensor) -> None:
    """With a vector on either side, and with entries scaled, alike for all samples or not."""
    c, flat = normal(f.k, f.n), b.reshape(f.k, f.n, math.prod(f.shape))
    torch.testing.assert_close(f.rmatvec(c), torch.tensordot(c, b, 2), **CLOSE)
    weighted = f.scale_rows(c)
    torch.testing.assert_close(weighted.dense(), (flat * c[..., None]).reshape(b.shape), **CLOSE)
    torch.testing.assert_close(f.inner(weighted), weighted.inner(f), **CLOSE)
    for d in (normal(*f.shape), normal(f.n, *f.shape)):
        moved = (b * d).reshape(flat.shape).sum(-1)
        torch.testing.assert_close(f.matvec(d), moved, **CLOSE)
        scaled = f.scale(d)
        torch.testing.assert_close(scaled.dense(), b * d, **CLOSE)
        check_kernels(f, scaled, b, b * d)
        check_kernels(scaled, scaled, b * d, b * d)


def check_rotated(f: Factor, b: Tensor) -> None:
    """By a matrix on each side, or on one alone, for each group; and shaped as it is wanted."""
    for g in {1, 2} if f.shape and f.shape[0] and f.shape[0] % 2 == 0 else {1}:
        o, i = (f.shape[0] // g if f.shape else 1), math.prod(f.shape[1:])
        grid = b.reshape(f.k, f.n, g, o, i)
        for left in (None, normal(g, o, 3)):
            for right in (None, normal(g, i, 2)):
                if left is right is None and g > 1:
                    continue
                moved = grid if left is None else left.mT @ grid
                moved = moved if right is None else moved @ right
                moved = moved.reshape(f.k, f.n, g * moved.shape[3], moved.shape[4])
                found = f.rotate(left, right)
                assert found.shape == moved.shape[2:]
                torch.testing.assert_close(found.dense(), moved, **CLOSE)
                torch.testing.assert_close(found.square_sum(), moved.square().sum((0, 1)), **CLOSE)
                whole = f.rotate(left, right, (math.prod(found.shape),))
                torch.testing.assert_close(whole.dense(), moved.flatten(2), **CLOSE)


def check_kron(f: Factor, b: Tensor) -> None:
    """S adds up over chunks, A and the count are those of each; rows of one sample with one place
    are their Kronecker product, at the entries of each view.
    """
    for approx in ("expand", "reduce"):
        whole = f.kron(approx)
        chunks = [f.columns(which).kron(approx) for which in parts(f)]
        if whole is None:
            assert all(found is None for found in chunks)
            continue
        for at, kron in enumerate(whole):
            found = [chunk[at] for chunk in chunks] or whole[at : at + 1]  # of no columns
            torch.testing.assert_close(sum(c.outer_v() for c in found), kron.outer_v(), **CLOSE)
            alive = torch.stack([c.alive() for c in found]).any(0)
            assert torch.equal(alive, kron.alive())
            for c in found:
                torch.testing.assert_close(c.outer_u(), kron.outer_u(), **CLOSE)
                torch.testing.assert_close(c.count(), kron.count(), **CLOSE)
            check_one_place(f, b, kron)
            before = [kron.outer_u(some) for some in (None, alive)], kron.count(alive)
            kron.forget_columns()
            again = [kron.outer_u(some) for some in (None, alive)], kron.count(alive)
            torch.testing.assert_close(again, before, rtol=0, atol=0)


def check_one_place(f: Factor, b: Tensor, kron: Kron) -> None:
    if f.n != 1 or not isinstance(kron, OuterKron) or kron.form[2] != 1:
        return
    left, right = kron.outer_v(), kron.outer_u()
    product = torch.block_diag(*(torch.kron(s, a) for s, a in zip(left, right, strict=True)))
    seen = (b if kron.view is None else kron.view.put(b)).reshape(f.k, -1)
    gram = seen.mT @ seen
    if len(left) > 1:  # between groups it is said to be zero
        group = torch.arange(len(gram)) // (len(gram) // len(left))
        gram = gram * (group[:, None] == group)
    torch.testing.assert_close(product, gram, **CLOSE)


def check_kernels(f: Factor, g: Factor, b: Tensor, c: Tensor) -> None:
    """Between all rows, within each sample, and of each row with the same one."""
    size = math.prod(f.shape)
    b, c = b.reshape(f.k, f.n, size), c.reshape(g.k, g.n, size)
    every = torch.einsum("knp,jmp->knjm", b, c)
    torch.testing.assert_close(f.kernel(g), every, **CLOSE)
    torch.testing.assert_close(g.kernel_from(f, "all"), every, **CLOSE)
    if f.n == g.n:
        within = every.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        torch.testing.assert_close(f.kernel(g, "sample"), within, **CLOSE)
    if (f.k, f.n) == (g.k, g.n):
        torch.testing.assert_close(f.kernel(g, "row"), (b * c).sum(-1), **CLOSE)


def check_squares(f: Factor, b: Tensor) -> None:
    expected = b.square().sum((0, 1))
    torch.testing.assert_close(f.square_sum(), expected, **CLOSE)
    torch.testing.assert_close(f.square_sum(per_sample=True), b.square().sum(0), **CLOSE)
    torch.testing.assert_close(f.squares().value(), expected, **CLOSE)
    for order in (lambda x: x, reversed):
        terms = [f.columns(which).squares(f.k) for which in order(list(parts(f)))]
        # a chunk that is on its own may choose another form
        terms.append(f.squares(f.k) if not terms else f.columns(slice(0, 0)).squares())
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        torch.testing.assert_close(total.value(), expected, **CLOSE)
    torch.testing.assert_close(f.square_sum(), expected, **CLOSE)  # nothing was changed in place


def check_rows(f: Factor, b: Tensor) -> None:
    if f.n and f.shape and f.shape[0]:
        sample, index = torch.randint(f.n, (7,)), torch.randint(f.shape[0], (7,))
        torch.testing.assert_close(f.entries(sample, index), b[:, sample, index], **CLOSE)
    flat = b.reshape(f.k, f.n, math.prod(f.shape))
    size = flat.shape[2]
    wide = flat.new_ones(f.k, f.n, 2 * size + 1)  # of which B has a part
    for out in (
        torch.ones_like(flat),
        torch.ones_like(flat).float(),
        flat.new_ones(f.k, size, f.n).mT,
        wide[..., 1 : 1 + size],
    ):
        close = CLOSE if out.dtype == b.dtype else dict(rtol=1e-5, atol=1e-5)
        f.write(out, False)
        torch.testing.assert_close(out, flat.to(out.dtype), **close)
        f.write(out, True)
        torch.testing.assert_close(out, 2 * flat.to(out.dtype), **close)
    assert bool((wide[..., 0] == 1).all() and (wide[..., 1 + size :] == 1).all())


def check_pair(f: Factor, g: Factor) -> None:
    """All methods of a factor of two, against both dense."""
    b, c = f.dense(), g.dense()
    p, q = math.prod(f.shape), math.prod(g.shape)
    block = b.reshape(f.k * f.n, p).T @ c.reshape(f.k * f.n, q)
    torch.testing.assert_close(f.gram(g), block, **CLOSE)
    torch.testing.assert_close(g.gram_from(f), block, **CLOSE)
    if f.shape != g.shape:
        return
    check_kernels(f, g, b, c)
    torch.testing.assert_close(f.inner(g), (b * c).sum((0, 1)), **CLOSE)
    torch.testing.assert_close(f.inner(g, per_sample=True), (b * c).sum(0), **CLOSE)
    if f is not g:
        whole = merge_uses([f, g])
        assert (whole.k, whole.n, whole.shape) == (f.k, f.n, f.shape)
        torch.testing.assert_close(whole.dense(), b + c, **CLOSE)
        torch.testing.assert_close(whole.square_sum(), (b + c).square().sum((0, 1)), **CLOSE)


@pytest.fixture(params=["", "small chunks"])
def chunks(request: Any, monkeypatch: Any) -> str:
    """With chunks of a few entries, every factor is taken in parts."""
    if request.param:
        for file in (factor_file, outer_kernels, outer_product, patches_file):
            monkeypatch.setattr(file, "CHUNK", 30)
        monkeypatch.setattr(outer_squares, "SQUARED", 30)
    return request.param


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_of_one(name: str, k: int, n: int) -> None:
    f = CASES[name](k, n)
    check(f, f.dense().clone())


@pytest.mark.parametrize("name", CASES)
def test_of_two(name: str, chunks: str) -> None:
    """With every other case of the same K and N, its own class and itself."""
    for k, n in SIZES[:1] if chunks else SIZES:
        f = CASES[name](k, n)
        check_pair(f, f)
        for make in CASES.values():
            check_pair(f, make(k, n))


@pytest.mark.parametrize("name", CASES)
def test_several_uses(name: str) -> None:
    """Two uses of one form are one factor, which does all that a factor does; so are three."""
    f, g, h = (CASES[name](5, 4) for _ in range(3))
    check(merge_uses([f, g]), f.dense() + g.dense())
    check(merge_uses([f, g, h]), f.dense() + g.dense() + h.dense())
    check(merge_uses([f]), f.dense())


def test_uses_of_one_form_keep_it() -> None:
    """So that tied weights, recurrence and chunked projections are as fast as one use."""
    for name, kind in (
        ("outer", OuterProduct),
        ("outer, groups", OuterProduct),
        ("sparse", RowSparse),
        ("view, transposed", ViewFactor),
        ("view, rows in parts", ViewFactor),
    ):
        whole = merge_uses([CASES[name](5, 4), CASES[name](5, 4)])
        assert type(whole) is kind, name
    whole = CASES["uses: rows apart"](5, 4)
    assert isinstance(whole, ViewFactor) and len(whole.parts) == 2
    assert type(CASES["uses: rows that overlap"](5, 4)) is SumFactor


@pytest.mark.parametrize(
    "view",
    [
        TRANSPOSED,
        CHANNELS,
        ROWS(1, 3),
        ROWS(0, 4),
        ROWS(2, 2),
        View.permuted((2, 3), (6,), order=(0, 1)),
    ],
)
def test_a_view_and_back(view: View) -> None:
    t = normal(2, 5, *view.shape)
    assert view.put(t).shape == (2, 5, *view.inner)
    rows = t[:, :, view.start : view.stop]
    assert torch.equal(view.back(view.put(t)), rows)
    padded = view.padded(view.put(t))
    assert torch.equal(padded[:, :, view.start : view.stop], rows) and padded.shape == t.shape
    assert torch.equal(
        padded.sum((0, 1)),
        torch.zeros_like(t).index_copy(2, torch.arange(view.start, view.stop), rows).sum((0, 1)),
    )


def test_the_order_of_axes_of_a_block() -> None:
    """The block of a transposed weight, entry by entry in the order of the parameter."""
    f, g = (ViewFactor([(TRANSPOSED, outer(5, 4, (3, 4), 2))]) for _ in range(2))
    b, c = f.dense(), g.dense()
    block, p = f.gram(g).reshape(4, 3, 4, 3), f.parts[0][1].dense()
    assert torch.equal(b, p.mT)
    for a in itertools.product(range(4), range(3), range(4), range(3)):
        expected = (b[:, :, a[0], a[1]] * c[:, :, a[2], a[3]]).sum()
        torch.testing.assert_close(block[a], expected, **CLOSE)

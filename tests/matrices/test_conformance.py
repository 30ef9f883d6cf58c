"""Every class of matrix against its entries, by dense linear algebra: one table of cases, in which
each class must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nnj import NNJError
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.row_sparse import RowSparse
from nnj.jacobians.views import View, ViewFactor
from nnj.matrices import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    Matrix,
    Part,
    Seen,
    load,
)
from nnj.matrices.kronecker import Grid
from tests.support.subclasses import subclasses

pytestmark = pytest.mark.usefixtures("seeded")
Shapes = Mapping[str, tuple[int, ...]]


class Stranger(Matrix):
    """What a stranger must define, and no more."""

    def __init__(self, shapes: Shapes, m: Tensor):
        super().__init__(shapes, m)
        self._m = m

    def matmul(self, v: Tensor) -> Tensor:
        return self._m @ v


class Case(NamedTuple):
    matrix: Matrix
    m: Tensor  # its entries
    singular: bool = False


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-10 of the largest entry."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(1.0, largest))


def filled(size: int, value: float) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


def square(size: int, *lead: int, rank: int | None = None) -> Tensor:
    """Positive definite, or semi-definite of a lower rank."""
    b = normal(*lead, size, size + 2 if rank is None else rank)
    return b @ b.mT


def conditioned(size: int, *lead: int, by: float = 1e5) -> Tensor:
    """With eigenvalues from 1 to 1 / by."""
    q = torch.linalg.qr(normal(*lead, size, size)).Q
    return q @ torch.diag_embed(torch.logspace(0, -math.log10(by), size).double()) @ q.mT


def entries(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """The sum of S (x) A over groups, in the order of a weight and of its bias behind it."""
    s, a = (torch.diag_embed(t) if t.dim() == 2 else t for t in (left, right))
    whole = torch.block_diag(*(torch.kron(x, y) for x, y in zip(s, a, strict=True)))
    if not bias:
        return whole
    inputs = torch.arange(len(whole)) % a.shape[1]
    last = inputs == a.shape[1] - 1
    order = torch.cat([(~last).nonzero()[:, 0], last.nonzero()[:, 0]])
    return whole[order[:, None], order]


def kronecker(
    left: Tensor, right: Tensor, shapes: Shapes, singular: bool = False
) -> Callable[[], Case]:
    return lambda: Case(
        Kronecker(shapes, left, right), entries(left, right, len(shapes) == 2), singular
    )


def corrected(
    form: tuple[int, int, int], shapes: Shapes, left: bool = True, right: bool = True
) -> Case:
    """Eigenvectors with eigenvalues that are no products."""
    g, o, i = form
    q, r = (torch.linalg.qr(normal(g, n, n)).Q for n in (o, i))
    eye = [torch.eye(n, dtype=torch.float64).expand(g, n, n) for n in (o, i)]
    values = normal(*form).square() + 0.1
    found = EigenKronecker(shapes, q if left else None, r if right else None, values)
    q, r = q if left else eye[0], r if right else eye[1]
    blocks = []
    for a, b, d in zip(q, r, values, strict=True):
        basis = torch.kron(a.contiguous(), b.contiguous())
        blocks.append(basis @ torch.diag(d.flatten()) @ basis.mT)
    m = torch.block_diag(*blocks)
    if len(shapes) == 2:
        last = torch.arange(len(m)) % i == i - 1
        order = torch.cat([(~last).nonzero()[:, 0], last.nonzero()[:, 0]])
        m = m[order[:, None], order]
    return Case(found, m)


def modules() -> Case:
    """Blocks of three modules, of which one was never reached and one is seen in parts."""
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "none": (), "c.in_weight": (6, 2), "c.x": (3, 2)}
    first = Kronecker({"weight": (4, 3), "bias": (4,)}, square(4, 1), square(4, 1))
    rows = View.rows((6, 2), 2, 4)
    second = Kronecker({"q": (2, 2)}, square(2, 1), square(2, 1))
    turned = View.permuted((3, 2), (2, 3))
    third = Kronecker({"w": (2, 3)}, square(2, 1), square(3, 1))
    parts = [
        Part(first, {"weight": Seen("a.weight"), "bias": Seen("a.bias")}),
        Part(second, {"q": Seen("c.in_weight", rows)}),
        Part(third, {"w": Seen("c.x", turned)}),
    ]
    m = torch.zeros(35, 35, dtype=torch.float64)
    m[:16, :16] = entries(first.left, first.right, True)
    m[21:25, 21:25] = entries(second.left, second.right, False)
    at = 29 + torch.tensor([0, 2, 4, 1, 3, 5])  # of the transposed weight
    m[at[:, None], at] = entries(third.left, third.right, False)
    return Case(BlockDiagonal(shapes, parts), m, True)


def blocks() -> Case:
    a, b = square(6), normal(4).square() + 0.1
    shapes = {"0.weight": (2, 2), "0.bias": (2,), "1.scale": (4,)}
    first = Dense({"0.weight": (2, 2), "0.bias": (2,)}, a)
    whole = BlockDiagonal(shapes, [first, Diagonal({"1.scale": (4,)}, b)])
    return Case(whole, torch.block_diag(a, torch.diag(b)))


W: Shapes = {"0.weight": (4, 3)}
JOINT: Shapes = {"0.weight": (4, 3), "0.bias": (4,)}
GROUPS: Shapes = {"0.weight": (6, 2, 2), "0.bias": (6,)}
SEVERAL: Shapes = {"0.weight": (2, 3), "0.bias": (2,), "number": (), "1.weight": (2, 1)}
NOTHING: Shapes = {"0.weight": (0, 3)}
MAKE: dict[str, Callable[[], Case]] = {
    "diagonal": lambda: Case(Diagonal(SEVERAL, d := normal(11).square()), torch.diag(d)),
    "diagonal, semi-definite": lambda: Case(
        Diagonal(SEVERAL, d := normal(11).square() * torch.tensor([1, 0] * 5 + [1])),
        torch.diag(d),
        True,
    ),
    "diagonal, empty": lambda: Case(Diagonal({}, normal(0)), normal(0, 0)),
    "dense": lambda: Case(Dense(SEVERAL, m := square(11)), m),
    "dense, semi-definite": lambda: Case(Dense(SEVERAL, m := square(11, rank=4)), m, True),
    "dense, ill-conditioned": lambda: Case(Dense(SEVERAL, m := conditioned(11)), m),
    "dense, zero": lambda: Case(Dense(W, m := torch.zeros(12, 12).double()), m, True),
    "dense, empty": lambda: Case(Dense(NOTHING, normal(0, 0)), normal(0, 0)),
    "stranger": lambda: Case(Stranger(SEVERAL, m := square(11)), m),
    "kronecker": lambda: kronecker(square(4, 1), square(3, 1), W)(),
    "kronecker, joint": lambda: kronecker(square(4, 1), square(4, 1), JOINT)(),
    "kronecker, groups": lambda: kronecker(square(2, 3), square(4, 3), {"w": (6, 2, 2)})(),
    "kronecker, groups, joint": lambda: kronecker(square(2, 3), square(5, 3), GROUPS)(),
    "kronecker, a table": lambda: kronecker(normal(1, 4).square(), square(3, 1), W)(),
    "kronecker, diagonal inputs": lambda: kronecker(square(4, 1), normal(1, 4).square(), JOINT)(),
    "kronecker, both diagonal": lambda: kronecker(
        normal(1, 4).square(), normal(1, 3).square(), W
    )(),
    "kronecker, semi-definite": lambda: kronecker(
        square(4, 1, rank=2), square(4, 1), JOINT, True
    )(),
    "kronecker, a table in part": lambda: kronecker(
        torch.tensor([[1.0, 0, 2, 0]]).double(), square(3, 1), W, True
    )(),
    "kronecker, ill-conditioned": lambda: kronecker(
        conditioned(4, 1, by=1e3), conditioned(3, 1, by=1e3), W
    )(),
    "kronecker, empty": lambda: kronecker(square(0, 1), square(3, 1), NOTHING)(),
    "eigen": lambda: corrected((1, 4, 3), W),
    "eigen, joint": lambda: corrected((1, 4, 4), JOINT),
    "eigen, groups, joint": lambda: corrected((3, 2, 5), GROUPS),
    "eigen, a table": lambda: corrected((1, 4, 3), W, left=False),
    "eigen, left": lambda: corrected((1, 4, 4), JOINT, right=False),
    "blocks": blocks,
    "blocks, in parts": modules,
    "blocks, none": lambda: Case(
        BlockDiagonal(W, [], normal(0)), torch.zeros(12, 12).double(), True
    ),
}


@pytest.fixture(params=MAKE)
def case(request: Any) -> Case:
    made = MAKE[request.param]()
    assert made.matrix.dtype == made.m.dtype == torch.float64
    return made


def dampings(case: Case) -> list[tuple[Any, Tensor]]:
    """Those to try, each with its diagonal."""
    names, d = list(case.matrix.layout.shapes), []
    found: list[tuple[Any, Tensor]] = [(0.3, filled(len(case.m), 0.3))]
    found.append((1e-3, filled(len(case.m), 1e-3)))
    if not case.singular:
        found.append((0.0, filled(len(case.m), 0.0)))
    for at, name in enumerate(names):
        d.append(filled(case.matrix.layout.sizes[name], 0.2 + at))
    own = {name: 0.2 + at for at, name in enumerate(names)}
    found.append((own, torch.cat([filled(0, 0.0), *d])))
    return found


def test_every_class_has_a_case() -> None:
    ours = subclasses(Matrix) - {Grid}  # which others define
    assert ours and ours <= {type(make().matrix) for make in MAKE.values()}


def test_what_it_is(case: Case) -> None:
    check_entries(case.matrix, case.m)


def check_entries(matrix: Matrix, m: Tensor) -> None:
    """All that says what a matrix is."""
    assert matrix.shape == m.shape
    close(matrix.dense(), m)
    close(matrix.diagonal(), m.diagonal())
    close(matrix.trace(), m.trace())
    close(matrix.eigenvalues(), torch.linalg.eigvalsh(m))
    close(matrix.frobenius_norm(), m.square().sum().sqrt())
    for v in (normal(len(m)), normal(len(m), 3), normal(2, len(m)).mT, normal(len(m), 0)):
        close(matrix @ v, m @ v)


def test_the_inverse(case: Case, monkeypatch: Any) -> None:
    size = len(case.m)
    for damping, d in dampings(case):
        damped = case.m + torch.diag(d)
        inverse = torch.linalg.inv(damped)
        for v in (normal(size), normal(size, 3), normal(2, size).mT):
            close(case.matrix.solve(v, damping), inverse @ v)
        expected = torch.linalg.slogdet(damped).logabsdet
        close(case.matrix.logdet(damping), expected)
        check_entries(case.matrix.inverse(damping), inverse)
        root = case.matrix.root(torch.eye(size).double(), damping)
        close(root @ root.mT, inverse)
        # and it is with this root that samples are drawn
        drawn = case.matrix.sample(3, damping, torch.Generator().manual_seed(5))
        z = torch.randn(size, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        close(drawn, (root @ z).mT)


def test_a_singular_one(case: Case) -> None:
    if not case.singular:
        assert torch.isfinite(case.matrix.logdet())
        return
    assert case.matrix.logdet() == -math.inf
    for ask in (
        lambda m: m.solve(normal(len(case.m))),
        lambda m: m.sample(),
        lambda m: m.inverse(),
        lambda m: m.inverse(dict.fromkeys(m.layout.shapes, 0.0)),
    ):
        with pytest.raises(NNJError, match="is singular to the precision"):
            ask(case.matrix)


def factors(matrix: Matrix, k: int, n: int, v: Tensor | None = None) -> dict[str, Factor]:
    """Some at each parameter; thin ones where they are a weight's and its bias's."""
    found: dict[str, Factor] = {}
    columns: Tensor | None = None
    for name, shape in matrix.layout.shapes.items():
        rows = shape[0] if shape else 1
        if name.endswith("weight") and len(shape) > 1 and rows:
            g = matrix.form[0] if isinstance(matrix, Grid) else 1
            columns = normal(k, n, rows)
            form = columns.reshape(k, n, g, rows // g, 1)
            u = normal(n, g, math.prod(shape[1:]), 1)
            found[name] = OuterProduct(u, form, shape, columns)
        elif name.endswith("bias") and columns is not None:
            ones = torch.ones(n, 1, 1, 1).double()
            found[name] = OuterProduct(ones, columns[:, :, None, :, None], shape, columns)
        else:
            found[name] = DenseFactor(normal(k, n, *shape))
    return found


def rows_of(matrix: Matrix, given: Mapping[str, Factor], k: int, n: int) -> Tensor:
    """B, (K, N, P)."""
    parts = [
        given[name].dense().reshape(k, n, size) if name in given else torch.zeros(k, n, size)
        for name, size in matrix.layout.sizes.items()
    ]
    return torch.cat([torch.empty(k, n, 0), *parts], -1).double()


def check_contraction(
    case: Case, a: Mapping[str, Factor], b: Mapping[str, Factor], form: tuple[int, int, int, int]
) -> None:
    k, n, j, m = form
    every = torch.einsum(
        "knp,pq,jmq->knjm", rows_of(case.matrix, a, k, n), case.m, rows_of(case.matrix, b, j, m)
    )
    close(case.matrix.contract(a, b), every)
    if n == m:
        within = every.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        found = case.matrix.contract(a, b, "sample")
        close(found, within)
        if k == j:
            found = case.matrix.contract(a, b, "row")
            close(found, within.diagonal(dim1=1, dim2=2).mT)


def test_factors(case: Case) -> None:
    if not case.matrix.layout.shapes:
        with pytest.raises(NNJError, match="factors at no parameter"):
            case.matrix.contract({})
        return
    a, b, c = (factors(case.matrix, *form) for form in ((2, 3), (2, 3), (4, 5)))
    check_contraction(case, a, b, (2, 3, 2, 3))
    check_contraction(case, a, c, (2, 3, 4, 5))
    check_contraction(case, a, a, (2, 3, 2, 3))
    close(case.matrix.contract(a), case.matrix.contract(a, a))
    one = {name: f for name, f in a.items() if not name.endswith("bias")}
    check_contraction(case, one, b, (2, 3, 2, 3))
    check_contraction(case, b, one, (2, 3, 2, 3))
    only = dict([list(b.items())[-1]])
    check_contraction(case, one, only, (2, 3, 2, 3))
    dense = {name: DenseFactor(f.dense()) for name, f in a.items()}
    check_contraction(case, dense, b, (2, 3, 2, 3))


def test_factors_of_parts() -> None:
    """Tables, and views of a parameter in which the matrix sees it, too."""
    table = MAKE["kronecker, a table"]()
    index = torch.tensor([0, 3, 3, 1])
    sparse = RowSparse.build(normal(2, 4, 3), torch.tensor([0, 1, 2, 1]), index, 3, (4, 3))
    check_contraction(table, {"0.weight": sparse}, {"0.weight": sparse}, (2, 3, 2, 3))
    parts = MAKE["blocks, in parts"]()
    rows, other = View.rows((6, 2), 2, 4), View.rows((6, 2), 0, 2)
    seen = ViewFactor(
        [
            (other, DenseFactor(normal(2, 3, 2, 2))),
            (rows, factors(Diagonal({"weight": (2, 2)}, normal(4).square()), 2, 3)["weight"]),
        ]
    )
    check_contraction(parts, {"c.in_weight": seen}, {"c.in_weight": seen}, (2, 3, 2, 3))


def test_other_matrices(case: Case) -> None:
    check_entries(case.matrix * 2.5, 2.5 * case.m)
    check_entries(0 * case.matrix, 0 * case.m)
    check_entries(case.matrix + case.matrix, 2 * case.m)
    shapes, size = case.matrix.layout.shapes, len(case.m)
    d, other = normal(size).square(), square(size)
    for more, m in ((Diagonal(shapes, d), torch.diag(d)), (Dense(shapes, other), other)):
        check_entries(case.matrix + more, case.m + m)
        check_entries(more + case.matrix, case.m + m)


def test_blocks_of_modules(case: Case) -> None:
    names = list(case.matrix.layout.shapes)
    for path in {name.rpartition(".")[0] for name in names} | set(names) if names else ():
        within = [n for n in names if path == "" or n == path or n.startswith(path + ".")]
        at = case.matrix.layout.entries(within)
        block = case.matrix.block(path)
        assert list(block.layout.shapes) == within
        check_entries(block, case.m[at[:, None], at])
        others = torch.tensor([i for i in range(len(case.m)) if i not in at], dtype=torch.long)
        if case.matrix.is_apart(within):
            assert not case.m[at[:, None], others].any()
        inverse = torch.linalg.inv(case.m[at[:, None], at] + 0.5 * torch.eye(len(at)).double())
        close(block.inverse(0.5).dense(), inverse)


def test_parts_that_are_apart() -> None:
    shapes = {"a": (2,), "b": (2,)}
    blocks = BlockDiagonal(shapes, [Dense({"a": (2,)}, square(2)), Dense({"b": (2,)}, square(2))])
    for matrix in (blocks, Diagonal(shapes, normal(4).square())):
        assert matrix.is_apart(["a"]) and matrix.is_apart(["a", "b"])
    joint = Dense(shapes, square(4))
    assert not joint.is_apart(["a"]) and joint.is_apart(["a", "b"])


def test_files_and_dtypes(case: Case, tmp_path: Path) -> None:
    case.matrix.block_limit = 17
    case.matrix.save(tmp_path / "m.pt")
    torch.load(tmp_path / "m.pt", weights_only=True)
    again = load(tmp_path / "m.pt")
    assert again.layout == case.matrix.layout and again.block_limit == 17
    assert type(again) is case.matrix.kind
    torch.testing.assert_close(again.dense(), case.matrix.dense(), rtol=0, atol=0)
    single = case.matrix.to(torch.float32)
    assert single.dtype == single.dense().dtype == torch.float32
    torch.testing.assert_close(single.dense().double(), case.m, rtol=1e-5, atol=1e-5)
    if not case.singular:
        v = normal(len(case.m)).float()
        found = single.solve(v, 0.3)
        assert found.dtype == torch.float32
        expected = torch.linalg.solve(case.m + 0.3 * torch.eye(len(v)).double(), v.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert case.matrix.to("cpu").layout == case.matrix.layout

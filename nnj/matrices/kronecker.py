"""M = S (x) A for each group of a weight, and M = (Q_S (x) Q_A) diag(values) (Q_S (x) Q_A)^T, the
same with eigenvalues of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from nnj.errors import NNJError
from nnj.jacobians.factor import Factor, Pairs, merge_uses
from nnj.matrices.layout import Damping, uniform
from nnj.matrices.matrix import Factors, Matrix
from nnj.matrices.spectrum import check_definite, eigen, nonnegative, wide


class Grid(Matrix):
    """A matrix over the entries (G, O, I) of a weight, for which a joint bias is one more input.

    A subclass defines `on_grid`, or `matmul`.

    Args:
        shapes: of a weight that reshapes to (G, O, I); or of one that does to (G, O, I - 1), and of
            its bias (G O,).
        like: a tensor of the dtype and on the device of the matrix.
        form: G, O and I.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], like: Tensor, form: tuple[int, int, int]
    ):
        super().__init__(shapes, like)
        self.form = g, o, i = form
        widths = [i] if len(shapes) == 1 else [i - 1, 1]
        if list(self.layout.sizes.values()) != [g * o * width for width in widths]:
            raise NNJError(
                f"Kronecker factors of {g} groups, {o} outputs and {i} inputs are those of a "
                f"weight, or of a weight and a bias of one input, with {g * o * i} entries "
                f"together; given are {self.layout.shapes}"
            )
        inside = [slice(0, widths[0]), slice(widths[0], i)]
        self.inside = dict(zip(self.layout.shapes, inside, strict=False))  # inputs of each name

    def on_grid(self, x: Tensor) -> Tensor:
        """M x for x of (k, G, O, I)."""
        raise NotImplementedError(f"{type(self).__name__} must define on_grid, or matmul")

    @override
    def matmul(self, v: Tensor) -> Tensor:
        return self.back(self.on_grid(self.put(v)))

    def put(self, v: Tensor) -> Tensor:
        """(P, k) -> (k, G, O, I)."""
        g, o, _ = self.form
        parts = v.split(list(self.layout.sizes.values()))
        widths = (columns.stop - columns.start for columns in self.inside.values())
        return torch.cat(
            [t.mT.reshape(v.shape[1], g, o, w) for t, w in zip(parts, widths, strict=True)], -1
        )

    def back(self, x: Tensor) -> Tensor:
        """(k, G, O, I) -> (P, k)."""
        sizes = zip(self.inside.values(), self.layout.sizes.values(), strict=True)
        return torch.cat([x[..., at].reshape(len(x), size) for at, size in sizes], 1).mT

    def rotated(self, factors: Factors, left: Tensor | None, right: Tensor | None) -> Factor:
        """B (left (x) right) as one factor at (G O', I'), for left (G, O, O') and right (G, I, I');
        None is the identity.
        """
        g, o, i = self.form
        joint = self._joint(factors)
        if joint is not None:
            return joint.rotate(left, right, (g * o, i))
        if right is None:
            some = next(iter(factors.values()))
            right = torch.eye(i, dtype=some.dtype, device=some.device).expand(g, i, i)
        parts = [
            f.rotate(left, right[:, self.inside[name]], (g * o, right.shape[-1]))
            for name, f in factors.items()
        ]
        return merge_uses(parts)

    def _joint(self, factors: Factors) -> Factor | None:
        """The factor of a weight and its bias as one; None where they are to be rotated apart."""
        if len(self.inside) == 1:
            return next(iter(factors.values()))
        weight, bias = (factors.get(name) for name in self.inside)
        return None if weight is None or bias is None else weight.beside(bias)

    def contracted(
        self,
        factors: tuple[Factors, Factors],
        sides: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]],
        d: Tensor | None,
        pairs: Pairs,
    ) -> Tensor:
        """The kernel of both factors, each rotated by its sides, with d of (G, O, I) between."""
        self._check_factors(*factors)
        first = self.rotated(factors[0], *sides[0])
        same = factors[0] is factors[1] and sides[0] is sides[1]
        second = first if same else self.rotated(factors[1], *sides[1])
        if d is not None:
            second = second.scale(d.to(second.dtype).reshape(second.shape))
        return first.kernel(second, pairs)


class Kronecker(Grid):
    """S (x) A for each of G groups, and zero between groups: what Kronecker-factored curvature is
    (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions).

    Entry ((o, i), (o', i')) is S[o, o'] A[i, i'], for a weight of (O, I), row-major; a joint bias
    is the last i. Damping is exact, by the eigenvalues of both.

    Args:
        shapes: of a weight that reshapes to (G, O, I), or of a weight (G, O, I - 1) and its bias
            (G O,).
        left: S, (G, O, O), or (G, O) if it is diagonal.
        right: A, (G, I, I), or (G, I) if it is diagonal.

    Errors: `NNJError` for other shapes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], left: Tensor, right: Tensor):
        for side in (left, right):
            if side.dim() not in (2, 3) or side.shape[1:] != side.shape[-1:] * (side.dim() - 1):
                raise NNJError(
                    f"a Kronecker factor of {tuple(side.shape)}: it is (G, O, O), or (G, O) if it "
                    "is diagonal"
                )
        form = left.shape[0], left.shape[1], right.shape[1]
        super().__init__(shapes, left, form)
        if left.shape[0] != right.shape[0]:
            raise NNJError(
                f"Kronecker factors of {left.shape[0]} and {right.shape[0]} groups: both have one "
                "matrix for each group"
            )
        self.left, self.right = left, right

    @override
    def on_grid(self, x: Tensor) -> Tensor:
        x = self.left @ x if self.left.dim() == 3 else self.left[..., None] * x
        return x @ self.right if self.right.dim() == 3 else x * self.right[:, None]

    @override
    def diagonal(self) -> Tensor:
        return self._flat(_diagonal(self.left)[..., None] * _diagonal(self.right)[:, None])

    @override
    def trace(self) -> Tensor:
        return (_diagonal(self.left).sum(-1) * _diagonal(self.right).sum(-1)).sum()

    @override
    def eigenvalues(self) -> Tensor:
        return self.decomposed.eigenvalues()

    @override
    def frobenius_norm(self) -> Tensor:
        left, right = (side.flatten(1).square().sum(1) for side in (self.left, self.right))
        return (left * right).sum().sqrt()

    @override
    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        return self._by_eigenvalues(damping).solve(v, damping)

    @override
    def logdet(self, damping: Damping = 0.0) -> Tensor:
        return self._by_eigenvalues(damping).logdet(damping)

    @override
    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        return self._by_eigenvalues(damping).root(z, damping)

    @override
    def inverse(self, damping: Damping = 0.0) -> Matrix:
        return self._by_eigenvalues(damping).inverse(damping)

    @override
    def times(self, c: float) -> Matrix:
        return Kronecker(self.layout.shapes, self.left * c, self.right)

    @override
    def plus(self, other: Matrix) -> Matrix | None:
        if not isinstance(other, Kronecker) or self.form != other.form:
            return None
        if _same(self.right, other.right) and self.left.dim() == other.left.dim():
            return Kronecker(self.layout.shapes, self.left + other.left, self.right)
        if _same(self.left, other.left) and self.right.dim() == other.right.dim():
            return Kronecker(self.layout.shapes, self.left, self.right + other.right)
        return None

    @override
    def restricted(self, names: Sequence[str]) -> Matrix:
        kept = {name: s for name, s in self.layout.shapes.items() if name in names}
        if len(kept) == len(self.layout.shapes):
            return self
        if not kept:
            return super().restricted(names)
        (name,) = kept
        at = self.inside[name]
        right = self.right[:, at, at] if self.right.dim() == 3 else self.right[:, at]
        return Kronecker(kept, self.left, right)

    @override
    def contract(
        self, factor: Factors, other: Factors | None = None, pairs: Pairs = "all"
    ) -> Tensor:
        other = factor if other is None else other
        left, right = (side if side.dim() == 3 else None for side in (self.left, self.right))
        d = None
        if left is None or right is None:  # what is diagonal scales entries
            one = self.left.new_ones(())
            d = (self.left[..., None] if left is None else one) * (
                self.right[:, None] if right is None else one
            )
            d = d.expand(self.form)
        return self.contracted((factor, other), ((left, right), (None, None)), d, pairs)

    @override
    def state(self) -> dict[str, Any]:
        return {"shapes": self.layout.shapes, "left": self.left, "right": self.right}

    @cached_property
    def decomposed(self) -> EigenKronecker:
        """The same by the eigenvalues and eigenvectors of both factors."""
        (s, left), (a, right) = _eigen(self.left), _eigen(self.right)
        values = (s[..., None] * a[:, None]).to(self.dtype)
        sides = [None if side is None else side.to(self.dtype) for side in (left, right)]
        found = EigenKronecker(self.layout.shapes, sides[0], sides[1], values)
        return found

    def _by_eigenvalues(self, damping: Damping) -> Matrix:
        """What inverts it: eigenvectors are kept where all entries have one damping."""
        one = uniform(self.layout.damping(damping)) is not None
        return self.decomposed if one else self._entries

    def _flat(self, x: Tensor) -> Tensor:
        """(G, O, I) -> (P,)."""
        return self.back(x[None])[:, 0]


class EigenKronecker(Grid):
    """(Q_S (x) Q_A) diag(values) (Q_S (x) Q_A)^T for each group: eigenvectors of Kronecker factors
    with eigenvalues that need be no products (George et al. 2018), and what the inverse of a damped
    `Kronecker` is.

    Args:
        shapes: as of `Kronecker`.
        left: Q_S, (G, O, O), orthogonal; None is the identity.
        right: Q_A, (G, I, I), orthogonal; None is the identity.
        values: (G, O, I), not negative.

    Errors: `NNJError` for other shapes, and values below zero.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        left: Tensor | None,
        right: Tensor | None,
        values: Tensor,
    ):
        if values.dim() != 3:
            raise NNJError(
                f"eigenvalues of {tuple(values.shape)}: they are (G, O, I), one for each entry of "
                "the weight"
            )
        g, o, i = values.shape
        super().__init__(shapes, values, (g, o, i))
        for side, size in ((left, o), (right, i)):
            if side is not None and side.shape != (g, size, size):
                raise NNJError(
                    f"eigenvectors of {tuple(side.shape)}, where those of {g} groups are "
                    f"{(g, size, size)}"
                )
        if not bool((values >= 0).all()):
            raise NNJError(
                "eigenvalues below zero, or that are no numbers, are those of no semi-definite "
                "matrix. Sum squares for them"
            )
        self.left, self.right, self.values = left, right, values

    @override
    def on_grid(self, x: Tensor) -> Tensor:
        return self._spectral(x, self.values)

    @override
    def diagonal(self) -> Tensor:
        squares = self.values
        if self.left is not None:
            squares = self.left.square() @ squares
        if self.right is not None:
            squares = squares @ self.right.square().mT
        return self.back(squares[None])[:, 0]

    @override
    def trace(self) -> Tensor:
        return self.values.sum()

    @override
    def eigenvalues(self) -> Tensor:
        return self.values.flatten().sort().values

    @override
    def frobenius_norm(self) -> Tensor:
        return self.values.square().sum().sqrt()

    @override
    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        damped = self._damped(damping)
        if damped is None:
            return super().solve(v, damping)
        check_definite(damped)
        apply = lambda v: self.back(self._spectral(self.put(v), damped.reciprocal()))
        return self.on_columns(apply, v)

    @override
    def logdet(self, damping: Damping = 0.0) -> Tensor:
        damped = self._damped(damping)
        return super().logdet(damping) if damped is None else damped.log().sum()

    @override
    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        damped = self._damped(damping)
        if damped is None:
            return super().root(z, damping)
        check_definite(damped)
        return self.back(self._outwards(self.put(z) * damped.rsqrt()))

    @override
    def inverse(self, damping: Damping = 0.0) -> Matrix:
        damped = self._damped(damping)
        if damped is None:
            return super().inverse(damping)
        check_definite(damped)
        return self._with(damped.reciprocal())

    @override
    def times(self, c: float) -> Matrix:
        return self._with(self.values * c)

    @override
    def plus(self, other: Matrix) -> Matrix | None:
        if not isinstance(other, EigenKronecker) or self.form != other.form:
            return None
        if _same(self.left, other.left) and _same(self.right, other.right):
            return self._with(self.values + other.values)
        return None

    @override
    def restricted(self, names: Sequence[str]) -> Matrix:
        whole = all(name in names for name in self.layout.shapes)
        return self if whole else super().restricted(names)

    @override
    def contract(
        self, factor: Factors, other: Factors | None = None, pairs: Pairs = "all"
    ) -> Tensor:
        other, sides = factor if other is None else other, (self.left, self.right)
        return self.contracted((factor, other), (sides, sides), self.values, pairs)

    @override
    def state(self) -> dict[str, Any]:
        parts = {"left": self.left, "right": self.right, "values": self.values}
        return {"shapes": self.layout.shapes, **parts}

    def _with(self, values: Tensor) -> EigenKronecker:
        found = EigenKronecker(self.layout.shapes, self.left, self.right, values)
        found.block_limit = self.block_limit
        return found

    def _damped(self, damping: Damping) -> Tensor | None:
        """The eigenvalues of M + damping I; None where entries have different dampings."""
        d = uniform(self.layout.damping(damping))
        if d is None:
            return None
        if d > 0 or not self.values.numel():
            return self.values + d
        # what is left of a square of zero is the square of its rounding
        rounding = (self.layout.size * torch.finfo(self.dtype).eps) ** 2 * self.values.max()
        return torch.where(self.values <= rounding, 0.0, self.values)

    def _spectral(self, x: Tensor, values: Tensor) -> Tensor:
        """Q (values o Q^T x), of x (k, G, O, I)."""
        if self.left is not None:
            x = self.left.mT @ x
        if self.right is not None:
            x = x @ self.right
        return self._outwards(x * values)

    def _outwards(self, x: Tensor) -> Tensor:
        """Q x, of x (k, G, O, I)."""
        if self.left is not None:
            x = self.left @ x
        return x if self.right is None else x @ self.right.mT


def _diagonal(side: Tensor) -> Tensor:
    """Of a factor, (G, O)."""
    return side if side.dim() == 2 else side.diagonal(dim1=1, dim2=2)


def _eigen(side: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (G, O) of a factor, and eigenvectors unless it is diagonal."""
    if side.dim() == 2:
        return nonnegative(wide(side), 0.0), None
    return eigen(wide(side))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))

"""M: a symmetric positive semi-definite matrix over named parameters, as an operator; and the one
that stands in memory entry by entry.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from nnj.errors import NNJError
from nnj.jacobians.factor import CHUNK, DenseFactor, Factor, Pairs
from nnj.matrices.layout import Damping, Layout, uniform
from nnj.matrices.spectrum import Damped, decomposed, eigenvalues, wide

BLOCK_LIMIT = 10_000
FORMAT = 1  # of files
Factors = Mapping[str, Factor]


class Matrix:
    """M of (P, P): symmetric, positive semi-definite, over parameters that are flattened one behind
    the other.

    A subclass must define `matmul`. All else follows, through the entries of M where P is at most
    `block_limit`, and may be overridden for speed, never for meaning.

    Everywhere `damping` is a number that is not negative, or {name of module: number}, where a name
    speaks for all that is below it, and the longest one counts. With damping 0 an M that is
    singular, to the precision of its dtype, has a logdet of -inf, and no inverse.

    Args:
        shapes: of each parameter by its name, in the order of `model.named_parameters()`.
        like: a tensor of the dtype and on the device of M.

    Attributes:
        layout: the names, and where each parameter stands in a vector of (P,).
        dtype, device: of M.
        block_limit: the largest P for which entries are formed where the structure of M does not
            do; may be set.
    """

    block_limit: int = BLOCK_LIMIT

    def __init__(self, shapes: Mapping[str, Sequence[int]], like: Tensor):
        if not like.is_floating_point():
            raise NNJError(
                f"{type(self).__name__}: entries of {like.dtype} make no matrix of curvature, "
                "which is real and of floating point. Convert them first"
            )
        self.layout = Layout(shapes)
        self.dtype, self.device = like.dtype, like.device

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.matmul is Matrix.matmul:
            raise TypeError(f"{cls.__name__} must define matmul")

    # -- must be defined ---------------------------------------------------------------------------

    def matmul(self, v: Tensor) -> Tensor:
        """M v for v of (P, k)."""
        raise NotImplementedError(f"{type(self).__name__} must define matmul")

    # -- may be overridden: what M is --------------------------------------------------------------

    def dense(self) -> Tensor:
        """The entries of M, (P, P)."""
        return self.matmul(torch.eye(self.layout.size, dtype=self.dtype, device=self.device))

    def diagonal(self) -> Tensor:
        """diag(M), (P,)."""
        return self._entries.diagonal()

    def trace(self) -> Tensor:
        """The sum of the diagonal, ()."""
        return self.diagonal().sum()

    def eigenvalues(self) -> Tensor:
        """(P,), in ascending order."""
        return self._entries.eigenvalues()

    def frobenius_norm(self) -> Tensor:
        """The root of the sum of all entries squared, ()."""
        return self._entries.frobenius_norm()

    # -- may be overridden: the inverse of M + damping I -------------------------------------------

    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        """(M + damping I)^-1 v for v of (P,) or (P, k).

        Errors: `NNJError` if that is singular.
        """
        return self._entries.solve(v, damping)

    def logdet(self, damping: Damping = 0.0) -> Tensor:
        """The logarithm of the determinant of M + damping I, (): -inf if it is singular."""
        return self._entries.logdet(damping)

    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        """R z with R R^T = (M + damping I)^-1, for z of (P, k), by which `sample` draws.

        Errors: `NNJError` if that is singular.
        """
        return self._entries.root(z, damping)

    def inverse(self, damping: Damping = 0.0) -> Matrix:
        """(M + damping I)^-1 as a matrix.

        Errors: `NNJError` if that is singular.
        """
        return self._entries.inverse(damping)

    # -- may be overridden: other matrices, and factors --------------------------------------------

    def times(self, c: float) -> Matrix:
        """c M for a number that is not negative."""
        return self._entries.times(c)

    def plus(self, other: Matrix) -> Matrix | None:
        """M + M' over the same parameters, where the structures of both say how; None where entries
        are to be added.
        """
        return None

    def is_apart(self, names: Collection[str]) -> bool:
        """Whether all entries between some parameters and the others are zero by structure."""
        return len(names) == len(self.layout.shapes)

    def restricted(self, names: Sequence[str]) -> Matrix:
        """The rows and columns of some parameters, in the order of the layout."""
        return self._entries.restricted(names)

    def contract(
        self, factor: Factors, other: Factors | None = None, pairs: Pairs = "all"
    ) -> Tensor:
        """B M B'^T between rows of factors, as `Factor.kernel` is that of M = I.

        Args:
            factor, other: B and B' at each parameter by its name, zero where a name is missing; by
                default B' is B.
            pairs: "all" gives (K, N, K', N'), "sample" what is within each sample, (N, K, K'),
                "row" the diagonal of that, (K, N).
        """
        other = factor if other is None else other
        self._check_factors(factor, other)
        one = next(iter(other.values()))
        parts = []
        step = max(1, CHUNK // max(1, one.n * self.layout.size))
        for start in range(0, max(one.k, 1), step):
            which = slice(start, min(start + step, one.k))
            moved = self._moved({name: f.columns(which) for name, f in other.items()})
            mine = factor
            if pairs == "row":
                mine = {name: f.columns(which) for name, f in factor.items()}
            parts.append(kernel_sum(mine, moved, pairs))
        return torch.cat(parts, 0 if pairs == "row" else 2)

    def state(self) -> dict[str, Any]:
        """The arguments by which `from_state` makes it anew: tensors, plain values and matrices.
        By default those of its entries: what `save` and `to` give is then a `Dense`.
        """
        return self._entries.state()

    @property
    def kind(self) -> type[Matrix]:
        """The class of which `state` holds the arguments."""
        return Dense if type(self).state is Matrix.state else type(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The matrix of which `state` holds the arguments."""
        return cls(**state)

    # -- final -------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.layout.size, self.layout.size

    def __matmul__(self, v: Tensor) -> Tensor:
        """M v for v of (P,) or (P, k)."""
        return self.on_columns(self.matmul, v)

    def sample(
        self, n: int = 1, damping: Damping = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """n draws from N(0, (M + damping I)^-1), (n, P).

        Args:
            generator: of the draws; by default torch's own of the device.

        Errors: `NNJError` if M + damping I is singular.
        """
        device = self.device if generator is None else generator.device
        z = torch.randn(
            self.layout.size, n, generator=generator, dtype=wide_dtype(self.dtype), device=device
        )
        return self.root(z.to(self.device, self.dtype), damping).mT

    def block(self, module: str) -> Matrix:
        """The rows and columns of the parameters of one module, and of those within it, by its
        name.

        Errors: `NNJError` if it has none here.
        """
        return self.restricted(self.layout.below(module))

    def __mul__(self, c: float) -> Matrix:
        number = isinstance(c, (int, float)) and not isinstance(c, bool) and math.isfinite(c)
        if not number or c < 0:
            raise NNJError(
                f"a matrix times {c!r} is not positive semi-definite. Multiply by a number that "
                "is not negative"
            )
        return self.times(float(c))

    __rmul__ = __mul__

    def __add__(self, other: Matrix) -> Matrix:
        if not isinstance(other, Matrix):
            return NotImplemented
        if self.layout != other.layout:
            raise NNJError(
                f"a matrix over {len(self.layout.shapes)} parameters and one over "
                f"{len(other.layout.shapes)} have no sum: their names, shapes and order must be "
                "the same"
            )
        found = self.plus(other)
        found = other.plus(self) if found is None else found
        return self._entries.added(other._entries) if found is None else found

    def to(self, *args: Any, **kwargs: Any) -> Matrix:
        """On another device or in another dtype, as `torch.Tensor.to` takes them."""
        found: Matrix = _mapped(self, lambda t: t.to(*args, **kwargs))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which holds tensors and plain values alone; `nnj.matrices.load` reads
        it.
        """
        torch.save({"nnj.matrices": FORMAT, "matrix": packed(self)}, path)

    def __repr__(self) -> str:
        names = len(self.layout.shapes)
        return f"{type(self).__name__}({self.layout.size} entries of {names} parameters)"

    # -- for subclasses ----------------------------------------------------------------------------

    def on_columns(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """A function of (P, k), of a vector (P,) or of a matrix (P, k).

        Errors: `NNJError` for what is no tensor, or of another length, dtype or device.
        """
        if not isinstance(v, Tensor):
            raise NNJError(
                f"{type(v).__name__} is no vector of this matrix. Put what stands at parameters "
                "into one tensor (P,), as torch.nn.utils.parameters_to_vector does"
            )
        if wide_dtype(v.dtype) != wide_dtype(self.dtype) or v.device != self.device:
            raise NNJError(
                f"a vector is {v.dtype} on {v.device}, and the matrix {self.dtype} on "
                f"{self.device}. Convert one of them, as by matrix.to(...)"
            )
        if v.dim() not in (1, 2) or len(v) != self.layout.size:
            raise NNJError(
                f"a tensor of {tuple(v.shape)} is no vector of this matrix. Give (P,) or (P, k) "
                f"with P = {self.layout.size}, the entries of all its parameters"
            )
        return function(v) if v.dim() == 2 else function(v[:, None])[:, 0]

    def _check_factors(self, *factors: Factors) -> None:
        """Errors: `NNJError` if factors are at no parameter of the matrix, or of another shape."""
        for given in factors:
            wrong = [n for n, f in given.items() if self.layout.shapes.get(n) != tuple(f.shape)]
            if wrong or not given:
                raise NNJError(
                    f"factors at {', '.join(wrong) or 'no parameter'}: the matrix is over "
                    f"{self.layout.shapes}. Give each by the name and shape of its parameter"
                )

    def _moved(self, factors: Factors) -> dict[str, Factor]:
        """B M, in the entries of B."""
        one = next(iter(factors.values()))
        k, n = one.k, one.n
        parts = {
            name: factors[name].dense().reshape(k * n, size).mT
            if name in factors
            else torch.zeros(size, k * n, dtype=self.dtype, device=self.device)
            for name, size in self.layout.sizes.items()
        }
        moved = self.layout.split(self.matmul(torch.cat(list(parts.values()))))
        return {
            name: DenseFactor(t.movedim(-1, 0).reshape(k, n, *self.layout.shapes[name]))
            for name, t in moved.items()
        }

    @property
    def _entries(self) -> Dense:
        """M entry by entry, made once.

        Errors: `NNJError` beyond `block_limit`.
        """
        self._check_limit()
        return self._formed

    def _check_limit(self) -> None:
        size = self.layout.size
        if size > self.block_limit:
            raise NNJError(
                f"this of {type(self).__name__} needs all entries of a matrix of {size} x {size}, "
                f"beyond block_limit={self.block_limit}. Set matrix.block_limit to allow it, or "
                "ask the blocks of its modules one by one (matrix.block(name))"
            )

    @cached_property
    def _formed(self) -> Dense:
        found = Dense(self.layout.shapes, self.dense())
        found.block_limit = self.block_limit
        return found


class Dense(Matrix):
    """M as it stands: the block of one module, or the joint one of many.

    Args:
        shapes: as of every matrix.
        m: M, (P, P), symmetric.
        check: whether it is looked at whether m is symmetric, for which a GPU has to be waited for.

    Errors: `NNJError` for another shape, or an m that is not symmetric.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], m: Tensor, *, check: bool = True):
        super().__init__(shapes, m)
        size = self.layout.size
        if m.shape != (size, size):
            raise NNJError(
                f"a matrix over {size} entries of parameters is {size} x {size}, not "
                f"{tuple(m.shape)}. Give the shapes of all its parameters"
            )
        tolerance = math.sqrt(torch.finfo(m.dtype).eps)
        if check and size and bool((m - m.mT).abs().max() > tolerance * m.abs().max()):
            raise NNJError("a matrix of curvature is symmetric, and this one is not")
        self.m = m
        self._last: tuple[dict[str, float], Damped] | None = None  # of the damping asked for last

    @property
    @override
    def _entries(self) -> Dense:
        return self

    @override
    def matmul(self, v: Tensor) -> Tensor:
        return self.m @ v

    @override
    def dense(self) -> Tensor:
        return self.m

    @override
    def diagonal(self) -> Tensor:
        return self.m.diagonal().clone()

    @override
    def eigenvalues(self) -> Tensor:
        values: Tensor = eigenvalues(wide(self.m))
        return values.to(self.dtype)

    @override
    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(self.m)
        return norm

    @override
    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        damped = self._damped(damping)
        return self.on_columns(lambda v: damped.solve(wide(v)).to(v.dtype), v)

    @override
    def logdet(self, damping: Damping = 0.0) -> Tensor:
        return self._damped(damping).logdet().to(self.dtype)

    @override
    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        return self._damped(damping).root(wide(z)).to(z.dtype)

    @override
    def inverse(self, damping: Damping = 0.0) -> Matrix:
        eye = torch.eye(self.layout.size, dtype=self.dtype, device=self.device)
        found = self.solve(eye, damping)
        return self._with((found + found.mT) / 2)

    @override
    def times(self, c: float) -> Matrix:
        return self._with(self.m * c)

    @override
    def plus(self, other: Matrix) -> Matrix | None:
        return self.added(other) if isinstance(other, Dense) else None

    def added(self, other: Dense) -> Dense:
        """The sum, entry by entry."""
        return self._with(self.m + other.m)

    @override
    def restricted(self, names: Sequence[str]) -> Matrix:
        at = self.layout.entries(names).to(self.device)
        shapes = {name: s for name, s in self.layout.shapes.items() if name in names}
        return Dense(shapes, self.m[at[:, None], at], check=False)

    @override
    def state(self) -> dict[str, Any]:
        return {"shapes": self.layout.shapes, "m": self.m}

    def _with(self, m: Tensor) -> Dense:
        found = Dense(self.layout.shapes, m, check=False)
        found.block_limit = self.block_limit
        return found

    def _damped(self, damping: Damping) -> Damped:
        numbers = self.layout.damping(damping)
        if self._last is None or self._last[0] != numbers:
            m = wide(self.m)
            d = self.layout.spread(numbers, m)
            self._last = numbers, decomposed(m, d, uniform(numbers))
        return self._last[1]


def kernel_sum(a: Factors, b: Factors, pairs: Pairs, other: Factor | None = None) -> Tensor:
    """The sum of the kernels at all parameters that both have; zeros, for rows as `other` has them,
    if there is none.
    """
    found = [a[name].kernel(b[name], pairs) for name in a if name in b]
    if found:
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]
    f, g = next(iter(a.values())), other or next(iter(b.values()))
    shape = {"all": (f.k, f.n, g.k, g.n), "sample": (f.n, f.k, g.k), "row": (f.k, f.n)}[pairs]
    return torch.zeros(shape, dtype=f.dtype, device=f.device)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def name_of_kind(cls: type[Matrix]) -> str:
    """By which a file names a class of matrices."""
    return f"{cls.__module__}.{cls.__qualname__}"


def packed(value: Any) -> Any:
    """The same with a table of plain values and tensors for each matrix."""
    if isinstance(value, Matrix):
        kind, limit = name_of_kind(value.kind), value.block_limit
        return {"kind": kind, "block_limit": limit, "state": packed(value.state())}
    if isinstance(value, dict):
        return {key: packed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [packed(part) for part in value]
    return value.detach() if isinstance(value, Tensor) else value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with all tensors changed, in matrices and tables of them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Matrix):
        made = value.kind.from_state(_mapped(value.state(), change))
        made.block_limit = value.block_limit
        return made
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return value

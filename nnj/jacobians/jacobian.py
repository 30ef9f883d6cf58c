"""J: the Jacobian of one layer in one slot, as a linear operator on every row of the batch, and its
structures in an input.

Shapes, said once. A tangent is shaped like what it is a tangent of, with one free axis K in front:
v of (K, N, *inputs) forward, u of (K, N, *outputs) backward. A direction v of a parameter is
(K, N, *p), or (K, 1, *p) when the batch shares it. A matrix J is over flattened entries:
(N, out, in)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import DenseFactor, Factor
from nnj.jacobians.kron import KronSize
from nnj.jacobians.patches import Patches
from nnj.jacobians.sample_index import SampleIndex


class Jacobian:
    """A linear operator J for each of N rows.

    A subclass must define `dense`, or both `jvp` and `vjp`. All else follows, and may be overridden
    for speed, never for meaning.

    Args:
        inputs: the shape of one row's input (or of the parameter).
        outputs: the shape of one row's output.
        like: a tensor with the batch in axis 0, and the dtype and device of the tangents.

    Attributes:
        n: N.
        same_for_rows: whether J is the same matrix for all rows, so that products with it need be
            formed for one.
        places: at how many places of a row's output a parameter acts (L).
        entrywise: whether each entry of an output depends on that of the input at its place alone.
        spreads: whether the output has one entry for each channel (axis 0 of a row), and depends
            in it on the input's entries of that channel alone, as a global pooling does.
        makes_new: whether each entry of what `vjp` gives stands in memory once, and nothing else
            uses that memory, so that it may be written over.
    """

    same_for_rows: bool = False
    places: int = 1
    entrywise: bool = False
    spreads: bool = False
    makes_new: bool = False

    @property
    def kron_size(self) -> KronSize | None:
        """How large the Kronecker factors are of what it makes at a parameter; None where that is
        no matrix product. Known before any column comes.
        """
        return None

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], like: Tensor):
        self.inputs, self.outputs, self.like = tuple(inputs), tuple(outputs), like
        self.n = like.shape[0]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = Jacobian
        if cls.dense is base.dense and (cls.jvp is base.jvp or cls.vjp is base.vjp):
            raise TypeError(f"{cls.__name__} must define dense, or both jvp and vjp")

    # -- must be defined: each follows from the other ----------------------------------------------

    def dense(self) -> Tensor:
        """The matrix, (N, out, in) over flattened outputs and inputs."""
        d = math.prod(self.outputs)
        eye = torch.eye(d, dtype=self.like.dtype, device=self.like.device)
        rows = eye.reshape(d, 1, *self.outputs).expand(d, self.n, *self.outputs)
        return self.vjp(rows).reshape(d, self.n, -1).transpose(0, 1)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (K, N, *inputs) -> (K, N, *outputs)."""
        out = self.dense() @ v.flatten(2).permute(1, 2, 0)  # (N, out, K)
        return out.permute(2, 0, 1).reshape(v.shape[0], self.n, *self.outputs)

    def vjp(self, u: Tensor) -> Tensor:
        """u J: (K, N, *outputs) -> (K, N, *inputs), for each row on its own, also when the slot is
        a parameter.
        """
        out = u.reshape(*u.shape[:2], -1).transpose(0, 1) @ self.dense()
        return out.transpose(0, 1).reshape(*u.shape[:2], *self.inputs)

    def vjp_over(self, u: Tensor) -> Tensor:
        """`vjp` of a u that nobody needs afterwards, and that may be written over."""
        return self.vjp(u)

    # -- may be overridden: J as a matrix ----------------------------------------------------------

    def shared_rows(self, dtype: torch.dtype) -> Tensor:
        """The rows of the matrix that all rows of the batch share, where `same_for_rows`:
        (out, 1, *inputs), not to be written to.
        """
        size = math.prod(self.outputs)
        eye = torch.eye(size, dtype=dtype, device=self.like.device)
        return self.vjp(eye.reshape(size, 1, *self.outputs))

    # -- may be overridden: J with other entries ---------------------------------------------------

    def square(self) -> Jacobian:
        """The operator whose entries are those of J squared: diag(J^T diag(m) J) = (J o J)^T m."""
        return Dense(self.dense().square(), self.inputs, self.outputs)

    def times(self, other: Jacobian) -> Jacobian:
        """The operator whose entries are products of those of J and of `other`, which is that of
        the same layer at another x.
        """
        return Dense(self.dense() * other.dense(), self.inputs, self.outputs)

    # -- may be overridden: what stands at a parameter ---------------------------------------------

    def pullback(self, u: Tensor, sample_index: SampleIndex) -> Factor:
        """u J added up for each of n samples, as a factor B of (K, n, *p); `sample_index` says of
        which sample the entries of u are.
        """
        if sample_index.by_column and sample_index.n == 1:
            sample_index = SampleIndex(1)  # all entries are those of the one sample
        if not sample_index.by_column:
            factor = self.factor(u, sample_index)
            if factor is not None:
                return factor
            # an entry of each row for another sample: one column for each sample, always exact
            u = sample_index.to_columns(u)
        b = self.summed_vjp(u)
        return DenseFactor(b.reshape(-1, sample_index.n, *b.shape[1:]))

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        """`pullback` where a structure can tell samples apart; None where a row holds entries of
        several samples.
        """
        b = sample_index.sum(self.vjp(u))
        return None if b is None else DenseFactor(b)

    def summed_vjp(self, u: Tensor) -> Tensor:
        """u J added over all rows: (K, R, *outputs) -> (K, *inputs)."""
        return self.vjp(u).sum(1)

    def outer_patches(self) -> Patches | None:
        """U of (N, 1, I, 1) where one row's pullback is the outer product u U^T with the cotangent
        u of (K, N, O) itself, as of a linear layer on vectors; None for all else.
        """
        return None

    # -- may be overridden: what a pullback costs, by which the length of chunks is chosen ---------

    @property
    def column_entries(self) -> int:
        """How many entries of B `pullback` forms for one column and sample."""
        return math.prod(self.inputs)

    @property
    def patch_entries(self) -> int:
        """How many entries are made anew for each chunk, however many columns it has."""
        return 0


class Dense(Jacobian):
    """J given entry by entry: j of (N, out, in)."""

    def __init__(self, j: Tensor, inputs: Sequence[int], outputs: Sequence[int]):
        super().__init__(inputs, outputs, j)
        self.j = j

    def dense(self) -> Tensor:
        return self.j


class Diagonal(Jacobian):
    """An elementwise map: d = f'(x), of (N, *shape).

    Args:
        d: the slopes, or what makes them when they are asked for, so that they stand in memory no
            longer than they are used.
        like: a tensor of d's shape and dtype, if d is made.
    """

    makes_new = True

    def __init__(self, d: Tensor | Callable[[], Tensor], like: Tensor | None = None):
        if like is None:
            if not isinstance(d, Tensor):
                raise TypeError(
                    "Diagonal takes a tensor, or a function that makes it and a tensor that is "
                    "like it"
                )
            like = d
        super().__init__(like.shape[1:], like.shape[1:], like)
        self._d, self.entrywise = d, len(self.outputs) > 1

    @property
    def d(self) -> Tensor:
        """The slopes."""
        return self._d if isinstance(self._d, Tensor) else self._d()

    def jvp(self, v: Tensor) -> Tensor:
        return v * self.d

    def vjp(self, u: Tensor) -> Tensor:
        return u * self.d

    def vjp_over(self, u: Tensor) -> Tensor:
        d = self.d
        return u.mul_(d) if u.dtype == d.dtype else u * d

    def square(self) -> Jacobian:
        return Diagonal(lambda: self.d.square(), self.like)

    def times(self, other: Jacobian) -> Jacobian:
        if not isinstance(other, Diagonal):
            return super().times(other)
        return Diagonal(lambda: self.d * other.d, self.like)


class Identity(Jacobian):
    """The same numbers in another shape."""

    same_for_rows = True

    def jvp(self, v: Tensor) -> Tensor:
        return v.reshape(*v.shape[:2], *self.outputs)

    def vjp(self, u: Tensor) -> Tensor:
        return u.reshape(*u.shape[:2], *self.inputs)

    def square(self) -> Jacobian:
        return self

    def times(self, other: Jacobian) -> Jacobian:
        return self


class LinearMap(Jacobian):
    """A linear map given by itself and its adjoint, both on a plain batch (R, ...): pooling,
    padding, a convolution's input.

    Args:
        forward: (R, *inputs) -> (R, *outputs).
        adjoint: (R, *outputs) -> (R, *inputs).
        squared: makes the map with squared entries, if that is cheaper than squaring the dense
            matrix.
        matrix: of (out, in), where the map is given by one that stands in memory.
        per_row: the maps differ from row to row and take (K, N, ...) as it is.
        by_channel: no channel (axis 0 of a row) depends on another one.
        makes_new: the adjoint's result is memory of its own, which may be written over.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        inputs: Sequence[int],
        outputs: Sequence[int],
        like: Tensor,
        *,
        squared: Callable[[], Jacobian] | None = None,
        matrix: Tensor | None = None,
        per_row: bool = False,
        by_channel: bool = False,
        makes_new: bool = False,
    ):
        super().__init__(inputs, outputs, like)
        self.spreads = by_channel and self.outputs == (self.inputs[0], *[1] * (len(outputs) - 1))
        self.forward, self.adjoint, self.squared, self.per_row = forward, adjoint, squared, per_row
        self.matrix, self.makes_new = matrix, makes_new
        self.same_for_rows = not per_row

    def jvp(self, v: Tensor) -> Tensor:
        if self.per_row:
            return self.forward(v)
        result: Tensor = self.forward(v.flatten(0, 1)).unflatten(0, v.shape[:2])
        return result

    def vjp(self, u: Tensor) -> Tensor:
        if self.per_row:
            return self.adjoint(u)
        result: Tensor = self.adjoint(u.flatten(0, 1)).unflatten(0, u.shape[:2])
        return result

    def shared_rows(self, dtype: torch.dtype) -> Tensor:
        if self.matrix is None:
            return super().shared_rows(dtype)
        return self.matrix.to(dtype).reshape(len(self.matrix), 1, *self.inputs)

    def square(self) -> Jacobian:
        return super().square() if self.squared is None else self.squared()

    def times(self, other: Jacobian) -> Jacobian:
        return super().times(other) if self.per_row else self.square()  # the same map at every x

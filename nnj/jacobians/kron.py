"""S = sum v v^T and A = sum u u^T over the places of a factor B = V U^T: its Kronecker factors,
with B^T B ~ S (x) A / count for each group (Martens and Grosse 2015; Eschenhagen et al. 2023).

    expand   each place counts for itself: v and u of (n, l), count = N L
    reduce   v = sum_l v, u = mean_l u, count = N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor

Approx = Literal["expand", "reduce"]


# Of what columns V is a view: each object that holds them, and which of them.
Columns: TypeAlias = Sequence[tuple[object, int, int]]


class Arrived(NamedTuple):
    """The columns u, of (K, R, *outputs), that came to a layer.

    Attributes:
        last: whether the last axis of outputs is that of channels, or the first.
    """

    u: Tensor
    last: bool

    def same(self, other: object) -> bool:
        """Whether another one's are the same entries of memory, by the same channels. They may be
        seen as other rows: torch adds a bias in a node of its own, behind a reshape.
        """
        if not isinstance(other, Arrived):
            return False
        u, v = self.u, other.u
        if u is v and self.last == other.last:
            return True
        mine, theirs = (
            a.dim() - 1 if arrived.last else 2 for a, arrived in ((u, self), (v, other))
        )
        return (
            0 != u.data_ptr() == v.data_ptr()  # 0 where the memory of a sharded unit is free
            and (len(u), u.numel(), u.dtype) == (len(v), v.numel(), v.dtype)
            and (u.shape[mine], u.stride(mine)) == (v.shape[theirs], v.stride(theirs))
            and _has_no_repeats(u)
            and _has_no_repeats(v)
        )


def _has_no_repeats(u: Tensor) -> bool:
    """Whether each entry stands once in memory, and nothing is left out between them."""
    sizes = sorted((stride, size) for size, stride in zip(u.shape, u.stride(), strict=True))
    expected = 1
    for stride, size in sizes:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class Arrangement(Protocol):
    """In which entries of a parameter S (x) A stands: `nnj.View`."""

    def put(self, t: Tensor) -> Tensor:
        """The entries in which the product stands: (..., *shape) -> (..., *inner)."""
        ...

    def back(self, t: Tensor) -> Tensor:
        """The rows of the parameter that they are: (..., *inner) -> (..., rows, *shape[1:])."""
        ...


class Bias(NamedTuple):
    """B that is the sum of columns over places, as that of a bias: u is one everywhere.

    Attributes:
        columns: which they are.
        view: in which entries of the parameter; None is all of them.
    """

    columns: Columns
    view: Arrangement | None = None


class KronSize(NamedTuple):
    """How large the Kronecker factors of one matrix product are: S is (G, O, O), and A (G, I, I),
    or (G, I) if it is diagonal.
    """

    groups: int
    outputs: int
    inputs: int
    diagonal: bool = False

    def entries(self, bias: bool = False) -> int:
        """Of both, with a one at the end of u for a joint bias."""
        inputs = self.inputs + bias
        a = inputs if self.diagonal else inputs * inputs
        return self.groups * (self.outputs * self.outputs + a)


class Kron:
    """The Kronecker factors of one factor, made when they are asked for.

    Of several chunks of columns S adds up, while A and the count, in which no column is, are those
    of any of them. A place is alive if some column, of all chunks, is not zero there.

    Must define all methods but `takes`, `forget_columns` and `mean_u`.

    Attributes:
        inputs_first: whether A stands on the left, A (x) S, as of a table, of which a row is an
            input.
        view: in which entries of the parameter; None is all of them, as they stand.
        columns: of what V is a view, where it is known.
    """

    inputs_first: bool = False
    view: Arrangement | None = None
    columns: Columns = ()

    def takes(self, bias: Bias) -> bool:
        """Whether a bias is of the same places: then u with a one at its end serves both."""
        mine, theirs = self.columns, bias.columns
        return len(mine) == len(theirs) > 0 and all(
            a[1:] == b[1:] and (a[0] is b[0] or (isinstance(a[0], Arrived) and a[0].same(b[0])))
            for a, b in zip(mine, theirs, strict=True)
        )

    def forget_columns(self) -> None:
        """Let go of V, which takes most memory: afterwards A and the count alone are asked for."""
        self.columns = ()

    def outer_v(self) -> Tensor:
        """S, (G, O, O)."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_v")

    def outer_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        """A without the division by the count, (G, I, I); (G, I) if it is diagonal.

        Args:
            alive: the places that count; None is all of them.
            ones: whether u has a one at its end, as a joint bias wants it: (G, I + 1, I + 1).
        """
        raise NotImplementedError(f"{type(self).__name__} must define outer_u")

    def mean_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        """A, divided by the count: a tensor of its own. The arguments are those of `outer_u`."""
        return self.outer_u(alive, ones).div_(self.count(alive).clamp(min=1))

    def count(self, alive: Tensor | None = None) -> Tensor:
        """How many terms A is a sum of, ()."""
        raise NotImplementedError(f"{type(self).__name__} must define count")

    def alive(self) -> Tensor:
        """The places at which one of the columns is not zero: truth values, of any shape."""
        raise NotImplementedError(f"{type(self).__name__} must define alive")

"""H = S S^T: the Hessian of a loss in its outputs, a positive semi-definite block for each row and
each place of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nnj.checks import all_finite, refuse_unless
from nnj.errors import NNJError

_CHUNK = 64  # columns that are made at a time where all are summed
WRITE_A_RULE = "write a loss rule (nnj_register_losses in nnj.registry.hookspecs)"


class LossHessian:
    """Hessian of a loss in its outputs: for each row r of R and each place d of D a block of B x B,
    and zero between blocks.

    A subclass must define `columns`. All else follows, and may be overridden for speed, never for
    meaning. It is the Hessian of exactly the scalar that is differentiated, so factors before the
    loss and its reduction are in it.

    Args:
        shapes: the shape of each output of the loss (usually one). An output's row is its axes
            (B, *places), flattened; if there are several outputs, a block is their flattened rows
            one after the other, and there is one place.
        like: a tensor of the dtype and on the device of the blocks.
        block, rank: B, and the number of columns of S, the same for every block and at least 1.
        rows: R, by default the length of axis 0 where all outputs share it, else 1.

    Attributes:
        places: D.
        sizes: how many entries a row has of each output; together they are B D.
        closed_form: whether `columns_through` and `gram_through` cost less than S does. A last
            layer that is the same linear map for all rows is then taken together with the loss.
    """

    closed_form: bool = False

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        like: Tensor,
        block: int,
        rank: int,
        rows: int | None = None,
    ):
        self.shapes = [tuple(shape) for shape in shapes]
        self.rows = rows_of(self.shapes) if rows is None else rows
        self.sizes = [per_row(shape, self.rows) for shape in self.shapes]
        self.block, self.rank, self.places = block, rank, sum(self.sizes) // max(block, 1)
        self.dtype, self.device = like.dtype, like.device

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.columns is LossHessian.columns:
            raise TypeError(f"{cls.__name__} must define columns")

    # -- must be defined ---------------------------------------------------------------------------

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of the factor S of every block, (stop - start, R, D, B)."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    # -- may be overridden: H and S, block by block ------------------------------------------------

    def diagonal(self) -> Tensor:
        """diag(H), (R, D, B)."""
        return _sum(s.square().sum(0) for s in self._chunks())

    def norms(self) -> Tensor:
        """The square sum of each column of each block, (rank, R, D): together they are the
        trace.
        """
        return torch.cat([s.square().sum(-1) for s in self._chunks()])

    def columns_at(self, row: Tensor, place: Tensor, j: Tensor) -> Tensor:
        """Columns j (m,) of the blocks (row, place), (m, B)."""
        first = int(j.min()) if len(j) else 0
        return self.columns(first, int(j.max()) + 1 if len(j) else first + 1)[j - first, row, place]

    def product(self, v: Tensor) -> Tensor:
        """H v for v and the result of shape (k, R, D, B)."""
        return _sum(
            torch.einsum("jrdb,jkrd->krdb", s, torch.einsum("jrdb,krdb->jkrd", s, v))
            for s in self._chunks()
        )

    # -- may be overridden: random combinations of columns -----------------------------------------

    @property
    def mixed(self) -> int:
        """How many columns the factor T of each block has that `mix` combines; by default T = S."""
        return self.rank

    def mix(self, e: Tensor) -> Tensor:
        """T e, (k, R, D, B), with coefficients e of (k, mixed, R, D); T T^T = H."""
        return self.combine(e)

    def signs(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random signs, (count, mixed, R, D), of the default generator of the device or another
        one.
        """
        shape = (count, self.mixed, self.rows, self.places)
        device = self.device if generator is None else generator.device
        bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=device)
        return bits.to(self.device) * 2 - 1

    def combine(self, c: Tensor) -> Tensor:
        """sum_j c_j S_j with coefficients (k, rank, R, D) for the columns of each block:
        (k, R, D, B).
        """
        parts = c.to(self.dtype).split(_CHUNK, 1)
        return _sum(
            torch.einsum("kjrd,jrdb->krdb", c, s)
            for c, s in zip(parts, self._chunks(), strict=True)
        )

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Vectors s, (count, R, D, B), with E[s s^T] = H: the columns of T with random signs,
        summed. Not divided by count.
        """
        return self.mix(self.signs(count, generator))

    # -- may be overridden: S and H behind a linear map J that all rows share ----------------------

    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Columns of S^T J, one for each column of each place: (k, R, d), with k at most `size`.

        Args:
            rows: J, (B D, d): its rows are the entries of a row of the outputs.
            size: how many columns at a time.
        """
        return (s.to(rows.dtype) @ rows for s in self._flat_columns(size))

    def gram_through(self, rows: Tensor) -> Tensor:
        """J^T H J of each row, (R, d, d), from J (B * D, d): in float64."""
        total = rows.new_zeros(self.rows, rows.shape[1], rows.shape[1], dtype=torch.float64)
        for v in self.columns_through(rows.double(), _CHUNK):
            total += v.permute(1, 2, 0) @ v.transpose(0, 1)
        return total

    def flat_factor(self) -> Tensor:
        """S with a column for each column of each place, over flat rows of the outputs:
        (rank D, R, B D).
        """
        return torch.cat(list(self._flat_columns(self.rank)))

    def _flat_columns(self, size: int) -> Iterator[Tensor]:
        for d in range(self.places):
            for a in range(0, self.rank, size):
                s = self.columns(a, min(a + size, self.rank))
                if self.places > 1:
                    only = torch.zeros_like(s)
                    only[:, :, d] = s[:, :, d]
                    s = only
                yield self.flat(s)

    # -- may be overridden: which block an entry is in, and H with other rows ----------------------

    def block_index(self) -> Tensor:
        """The number r D + d of the block of each entry of the only output, in a shape that
        broadcasts to that of the output.
        """
        number, (shape,) = torch.arange(self.rows * self.places, device=self.device), self.shapes
        if len(shape) > 1 and shape[:2] == (self.rows, self.block):
            return number.reshape(self.rows, 1, *shape[2:])
        if self.places == 1 and len(shape) and shape[0] == self.rows:
            return number.reshape(-1, *[1] * (len(shape) - 1))
        number = number.reshape(1, self.rows, self.places, 1)
        (found,) = self.to_outputs(number.expand(1, self.rows, self.places, self.block))
        return found[0]

    def layout(self) -> Hashable:
        """What `block_index` follows from: two with the same layout have the same. None where it is
        not known.
        """
        own = type(self)
        if own.block_index is not LossHessian.block_index:
            return None
        if own.to_outputs is not LossHessian.to_outputs:
            return None
        return self.rows, self.places, self.block, tuple(map(tuple, self.shapes))

    def at_rows(self, block: Tensor) -> LossHessian | None:
        """The same blocks, one at each of P rows, with an output of (P, B); None where that is not
        to be had without forming them.

        Args:
            block: (P,) the number r D + d of the block of each row, -1 for zeros.
        """
        return None

    # -- layout ------------------------------------------------------------------------------------

    def to_outputs(self, t: Tensor) -> tuple[Tensor, ...]:
        """From (k, R, D, B) to a tensor (k, *shape) for each output of the loss."""
        rows = t.mT.reshape(*t.shape[:2], self.block * self.places).split(self.sizes, -1)
        return tuple(
            part.reshape(t.shape[0], *shape) for part, shape in zip(rows, self.shapes, strict=True)
        )

    def from_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """The inverse: from (k, *shape) for each output to (k, R, D, B)."""
        sizes = zip(outputs, self.sizes, strict=True)
        rows = torch.cat([t.reshape(len(t), self.rows, size) for t, size in sizes], -1)
        return rows.reshape(*rows.shape[:2], self.block, self.places).mT

    def flat(self, t: Tensor) -> Tensor:
        """From (k, R, D, B) to rows of the outputs, flattened one after the other: (k, R, B D)."""
        parts = zip(self.to_outputs(t), self.sizes, strict=True)
        return torch.cat([part.reshape(len(t), self.rows, size) for part, size in parts], -1)

    @functools.cached_property
    def flat_diagonal(self) -> Tensor:
        """diag(H) as rows of the outputs, (R, B D)."""
        return self.flat(self.diagonal()[None])[0]

    def _chunks(self) -> Iterator[Tensor]:
        for a in range(0, self.rank, _CHUNK):
            yield self.columns(a, min(a + _CHUNK, self.rank))


def check_outputs(name: str, outputs: Sequence[Tensor]) -> None:
    """Errors: `NNJError` if an output of a model that is given to the loss is not real, not
    floating or not finite.
    """
    for t in outputs:
        if not t.is_floating_point():
            kind = "complex" if t.is_complex() else "not of floating point"
            raise NNJError(
                f"{name}: the output of the model is {kind} ({t.dtype}), but curvature is that in "
                "a real output. Give the loss a real tensor (torch.view_as_real makes one of a "
                "complex one)"
            )
        refuse_unless(all_finite(t), lambda: NNJError(infinite_output(name)))


def infinite_output(name: str) -> str:
    return (
        f"{name}: the output of the model has entries that are not finite, where no loss has "
        "curvature. Check the model's input and weights; instead of -inf, mask with a large "
        "negative number"
    )


def rows_of(shapes: Sequence[Sequence[int]]) -> int:
    """The length of axis 0 where all outputs share it, else 1."""
    lengths = {shape[0] if len(shape) else 1 for shape in shapes}
    return lengths.pop() if len(lengths) == 1 else 1


def per_row(shape: Sequence[int], rows: int) -> int:
    return math.prod(shape[1:]) if rows == 0 else math.prod(shape) // rows


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def infinite(name: str) -> str:
    return (
        f"{name}: its Hessian is not finite at this output. Avoid what is singular there (a "
        f"division by zero, a logarithm or a root at zero), or {WRITE_A_RULE}"
    )

"""Of which sample the entries of a tangent are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 4096  # answers that are remembered
_answers: dict[Hashable, bool] = {}


class SampleAxis(NamedTuple):
    """Where the samples are in a tensor: entry i of an axis belongs to sample (i // run) % n,
    whatever the other indices.
    """

    axis: int
    run: int


class SampleIndex:
    """Which of `n` samples each entry of a tangent (K, R, *outputs) belongs to.

    Args:
        n: how many samples there are.
        of: None when rows are sample-major, R / n for each sample; otherwise a long tensor that
            broadcasts against (R, *outputs), -1 where an entry belongs to nobody.
        by_column: axis 0 of the tangent is (K * n): every column is that of one sample, and all its
            entries are that sample's.
        along: says the same as `of`, where it is so simple.
        key: two that share it have the same `of`; None where only its numbers tell.
    """

    def __init__(
        self,
        n: int,
        of: Tensor | None = None,
        by_column: bool = False,
        along: SampleAxis | None = None,
        key: Hashable = None,
    ):
        self.n, self.of, self.by_column, self.along = n, of, by_column, along
        if along is not None and of is not None:
            key = n, along, tuple(of.shape)
        self.key = key

    def answer(self, question: Hashable, ask: Callable[[], bool]) -> bool:
        """What `ask` says of `of`: asked of the tensor once, where a key says what is in it.

        Args:
            question: a name for it, with all else that it depends on.
        """
        if self.key is None:
            return ask()
        named = self.key, question
        if named not in _answers:
            if len(_answers) >= KEPT:
                _answers.clear()
            _answers[named] = ask()
        return _answers[named]

    @classmethod
    def by_axis(
        cls, n: int, shape: tuple[int, ...], along: SampleAxis, device: torch.device
    ) -> SampleIndex:
        """That of a tangent of (R, *outputs) = shape with the samples along one axis."""
        if along.axis == 0 and shape[0] == n * along.run:
            return cls(n)
        of = torch.arange(shape[along.axis], device=device) // along.run % n
        of = of.reshape(-1, *[1] * (len(shape) - along.axis - 1))
        if along.axis:  # all rows alike
            of = of.expand(shape[0], *[1] * (along.axis - 1), *of.shape)
        return cls(n, of, along=along)

    def rows(self, count: int, device: torch.device) -> Tensor | None:
        """The sample of each row, (R,); None where a row holds entries of several samples."""
        if self.of is None:
            return torch.arange(count, device=device) // (count // self.n)
        flat = self.of.reshape(self.of.shape[0], -1)
        if not self.answer("rows", lambda: bool((flat == flat[:, :1]).all())):
            return None
        return flat[:, 0].expand(count)

    def tidy(self) -> SampleIndex:
        """The same with nobody's entries given to the sample of the others in their row, and plain
        where it is sample-major.
        """
        of = self.of
        if of is None or self.by_column:
            return self
        # axes along which it does not change are of length one
        for axis in range(of.dim() - 1, 0, -1):
            one = of.amax(axis, keepdim=True)
            if bool(((of == one) | (of < 0)).all()):
                of = one
        if of.shape[0] % self.n == 0:
            rows = torch.arange(of.shape[0], device=of.device) // (of.shape[0] // self.n)
            if bool(((of == rows.reshape(-1, *[1] * (of.dim() - 1))) | (of < 0)).all()):
                return SampleIndex(self.n)
        return SampleIndex(self.n, of)

    def sum(self, t: Tensor) -> Tensor | None:
        """(K, R, *s) -> (K, n, *s), rows of one sample added; None where rows are not of one
        sample.
        """
        if self.of is None:
            r = t.shape[1]
            return t if r == self.n else t.unflatten(1, (self.n, r // self.n)).sum(2)
        rows = self.rows(t.shape[1], t.device)
        if rows is None:
            return None
        if self.answer(("cyclic", len(rows)), lambda: is_cyclic(rows, self.n)):
            result: Tensor | None = t.unflatten(1, (-1, self.n)).sum(1)
            return result
        out = t.new_zeros(t.shape[0], self.n + 1, *t.shape[2:])  # the last is nobody
        return out.index_add_(1, torch.where(rows < 0, self.n, rows), t)[:, : self.n]

    def to_columns(self, v: Tensor) -> Tensor:
        """(K, R, *outputs) -> (K * n, R, *outputs): each column once for each sample, all other
        samples' entries zero. Nothing is left to do where columns stand so already.
        """
        if self.by_column:
            return v
        of = self.of
        if of is None:
            rows = self.rows(v.shape[1], v.device)
            assert rows is not None
            of = rows.reshape(-1, *[1] * (v.dim() - 2))
        sample = torch.arange(self.n, device=v.device).reshape(-1, *[1] * (v.dim() - 1))
        return (v[:, None] * (of == sample)).flatten(0, 1)

    def from_columns(self, t: Tensor) -> Tensor:
        """The transpose of `to_columns`, (K * n, R, *outputs) -> (K, R, *outputs): each entry from
        the column of the sample that it belongs to.
        """
        if self.by_column or self.n == 1:
            return t
        t = t.unflatten(0, (-1, self.n))
        if self.of is None:
            r = t.shape[2]
            rows = torch.arange(r, device=t.device)
            return t[:, rows // (r // self.n), rows]
        of = self.of.expand(t.shape[2:])
        sample = torch.arange(self.n, device=t.device).reshape(-1, *[1] * of.dim())
        return (t * (of == sample)).sum(1)


def is_cyclic(sample: Tensor, n: int) -> bool:
    """Whether rows belong to samples 0, 1, ..., n - 1, 0, 1, ..., as those of a sequence-first
    model do.
    """
    if len(sample) % n:
        return False
    return torch.equal(sample, torch.arange(len(sample), device=sample.device) % n)

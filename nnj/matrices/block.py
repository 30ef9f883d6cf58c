"""M with a block for each module and zeros between them: matrices of parameters, or of rows of
them, side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from nnj.errors import NNJError
from nnj.jacobians.factor import DenseFactor, Factor, Pairs
from nnj.jacobians.views import View, ViewFactor
from nnj.matrices.diagonal import Diagonal
from nnj.matrices.layout import Damping
from nnj.matrices.matrix import Factors, Matrix, kernel_sum


class Seen(NamedTuple):
    """A parameter, or a view of some of its rows.

    Attributes:
        name: of the parameter.
        view: None is all of it, as it is.
    """

    name: str
    view: View | None = None


class Part(NamedTuple):
    """A block of a matrix.

    Attributes:
        matrix: over names of its own.
        seen: what each of its names is, in the same order.
    """

    matrix: Matrix
    seen: dict[str, Seen]

    def factors(self, factors: Factors) -> dict[str, Factor]:
        """Factors at parameters as they are at what the block sees of them."""
        return {
            own: _seen(factors[seen.name], seen.view)
            for own, seen in self.seen.items()
            if seen.name in factors
        }


class BlockDiagonal(Matrix):
    """Blocks side by side, and zeros for all entries that are in none of them.

    Args:
        shapes: of all parameters, as of every matrix.
        parts: the blocks, each over names of `shapes`; or a `Part`, where names are others or some
            rows of a parameter alone are meant.

    Errors: `NNJError` for blocks that overlap, or do not fit.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        parts: Iterable[Matrix | Part],
        like: Tensor | None = None,
    ):
        found = [_part(part) for part in parts]
        if like is None:
            some = found[0].matrix if found else None
            like = torch.zeros(
                0, dtype=some.dtype if some else None, device=some.device if some else None
            )
        super().__init__(shapes, like)
        for part in found:
            self._check(part)
        self.blocks = found  # those that may have other entries than zeros
        self.parts = found + self._zeros(found, like)

    def _check(self, part: Part) -> None:
        for own, seen in part.seen.items():
            shape = self.layout.shapes.get(seen.name)
            view = seen.view
            inner = shape if view is None else view.inner
            if (
                shape is None
                or part.matrix.layout.shapes[own] != inner
                or (view is not None and view.shape != shape)
            ):
                raise NNJError(
                    f"a block over {own} of {part.matrix.layout.shapes[own]} is none of "
                    f"{seen.name}, of {shape}. Give shapes for all parameters of all blocks"
                )

    def _zeros(self, parts: Sequence[Part], like: Tensor) -> list[Part]:
        """Blocks of zeros for what is in no other one."""
        found = []
        for name, rows in self._uncovered(parts):
            shape = self.layout.shapes[name]
            if rows is not None:
                view = View.rows(shape, *rows)
                seen, shape = Seen(name, view), view.inner
            else:
                seen = Seen(name)
            size = torch.Size(shape).numel()
            found.append(Part(Diagonal({name: shape}, like.new_zeros(size)), {name: seen}))
        return found

    def _uncovered(self, parts: Sequence[Part]) -> Iterable[tuple[str, tuple[int, int] | None]]:
        """The parameters, and rows of them, that are in no part.

        Errors: `NNJError` for what is in two.
        """
        for name, shape in self.layout.shapes.items():
            every = [
                seen.view for part in parts for seen in part.seen.values() if seen.name == name
            ]
            if not every:
                yield name, None
                continue
            rows = shape[0] if shape else 1
            ends = sorted((0, rows) if v is None else (v.start, v.stop) for v in every)
            at = 0
            for start, stop in ends:
                if start < at:
                    raise NNJError(
                        f"two blocks of a matrix have rows of {name} in common. Give each "
                        "parameter to one of them"
                    )
                if start > at:
                    yield name, (at, start)
                at = stop
            if at < rows:
                yield name, (at, rows)

    # -- vectors -----------------------------------------------------------------------------------

    def _given(self, part: Part, named: Mapping[str, Tensor]) -> Tensor:
        """What a part sees of (*shape, k) by name: (P', k)."""
        own = {}
        for name, seen in part.seen.items():
            t = named[seen.name]
            own[name] = t if seen.view is None else seen.view.put(t.movedim(-1, 0)).movedim(0, -1)
        return part.matrix.layout.join(own)

    def _put(self, part: Part, v: Tensor, named: Mapping[str, Tensor]) -> None:
        """Write (P', k) of a part to where it sees it."""
        for name, t in part.matrix.layout.split(v).items():
            seen = part.seen[name]
            if seen.view is None:
                named[seen.name].copy_(t)
            else:
                rows = seen.view.back(t.movedim(-1, 0)).movedim(0, -1)
                named[seen.name][seen.view.start : seen.view.stop] = rows

    def _by_part(self, ask: Any, v: Tensor) -> Tensor:
        """(P, k) of what `ask(part, v')` makes of (P', k) for each part."""
        out = v.new_empty(v.shape)
        given, named = self.layout.split(v), self.layout.split(out)
        for part in self.parts:
            self._put(part, ask(part, self._given(part, given)), named)
        return out

    def _own(self, part: Part, damping: Mapping[str, float]) -> dict[str, float]:
        return {own: damping[seen.name] for own, seen in part.seen.items()}

    @override
    def matmul(self, v: Tensor) -> Tensor:
        return self._by_part(lambda part, v: part.matrix.matmul(v), v)

    @override
    def diagonal(self) -> Tensor:
        some = torch.empty(self.layout.size, 1, dtype=self.dtype, device=self.device)
        return self._by_part(lambda part, v: part.matrix.diagonal()[:, None], some)[:, 0]

    @override
    def trace(self) -> Tensor:
        return self._sum(part.matrix.trace() for part in self.parts)

    @override
    def eigenvalues(self) -> Tensor:
        return torch.cat([part.matrix.eigenvalues() for part in self.parts]).sort().values

    @override
    def frobenius_norm(self) -> Tensor:
        return self._sum(part.matrix.frobenius_norm().square() for part in self.parts).sqrt()

    @override
    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        d = self.layout.damping(damping)
        ask = lambda part, v: part.matrix.solve(v, self._own(part, d))
        return self.on_columns(lambda v: self._by_part(ask, v), v)

    @override
    def logdet(self, damping: Damping = 0.0) -> Tensor:
        d = self.layout.damping(damping)
        return self._sum(part.matrix.logdet(self._own(part, d)) for part in self.parts)

    @override
    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        d = self.layout.damping(damping)
        return self._by_part(lambda part, z: part.matrix.root(z, self._own(part, d)), z)

    @override
    def inverse(self, damping: Damping = 0.0) -> Matrix:
        d = self.layout.damping(damping)
        return self._with([Part(p.matrix.inverse(self._own(p, d)), p.seen) for p in self.parts])

    # -- matrices ----------------------------------------------------------------------------------

    @override
    def times(self, c: float) -> Matrix:
        return self._with([Part(part.matrix * c, part.seen) for part in self.blocks])

    @override
    def plus(self, other: Matrix) -> Matrix | None:
        if isinstance(other, Diagonal):
            named = self.layout.split(other.d[:, None])
            theirs: list[Matrix] = [
                Diagonal(p.matrix.layout.shapes, self._given(p, named)[:, 0]) for p in self.parts
            ]
        elif isinstance(other, BlockDiagonal) and self._alike(other):
            theirs = [part.matrix for part in other.parts]
        else:
            return None
        both = zip(self.parts, theirs, strict=True)
        return self._with([Part(part.matrix + matrix, part.seen) for part, matrix in both])

    def _alike(self, other: BlockDiagonal) -> bool:
        """Whether both have blocks of the same parameters."""
        mine, theirs = ([(p.seen, p.matrix.layout) for p in m.parts] for m in (self, other))
        return mine == theirs

    @override
    def is_apart(self, names: Collection[str]) -> bool:
        inside = set(names)
        of_parts = ({seen.name for seen in part.seen.values()} for part in self.blocks)
        return all(not of & inside or of <= inside for of in of_parts)

    @override
    def restricted(self, names: Sequence[str]) -> Matrix:
        shapes = {name: s for name, s in self.layout.shapes.items() if name in names}
        parts = []
        for part in self.parts:
            seen = {own: s for own, s in part.seen.items() if s.name in names}
            if seen:
                parts.append(Part(part.matrix.restricted(list(seen)), seen))
        only = parts[0] if len(parts) == 1 else None
        if only is not None and list(only.seen.items()) == [(n, Seen(n)) for n in shapes]:
            return only.matrix
        return self._with(parts, shapes)

    @override
    def contract(
        self, factor: Factors, other: Factors | None = None, pairs: Pairs = "all"
    ) -> Tensor:
        other = factor if other is None else other
        self._check_factors(factor, other)
        found = []
        for part in self.blocks:
            first = part.factors(factor)
            second = first if other is factor else part.factors(other)
            if first and second:
                found.append(part.matrix.contract(first, second, pairs))
        if not found:
            return kernel_sum(factor, {}, pairs, next(iter(other.values())))
        return torch.stack(found).sum(0)

    @override
    def state(self) -> dict[str, Any]:
        parts = []
        for part in self.blocks:
            seen = {
                own: [s.name, None if s.view is None else vars(s.view)]
                for own, s in part.seen.items()
            }
            parts.append({"matrix": part.matrix, "seen": seen})
        like = torch.zeros(0, dtype=self.dtype, device=self.device)
        return {"shapes": self.layout.shapes, "parts": parts, "like": like}

    @classmethod
    @override
    def from_state(cls, state: dict[str, Any]) -> Self:
        parts = []
        for part in state["parts"]:
            seen = {
                own: Seen(name, None if view is None else View(**view))
                for own, (name, view) in part["seen"].items()
            }
            parts.append(Part(part["matrix"], seen))
        return cls(state["shapes"], parts, state["like"])

    def _with(
        self, parts: Sequence[Part], shapes: Mapping[str, Sequence[int]] | None = None
    ) -> BlockDiagonal:
        like = torch.zeros(0, dtype=self.dtype, device=self.device)
        found = BlockDiagonal(self.layout.shapes if shapes is None else shapes, parts, like)
        found.block_limit = self.block_limit
        return found

    def _sum(self, found: Iterable[Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.stack([zero, *found]).sum()


def joined(shapes: Mapping[str, Sequence[int]], parts: Sequence[Part]) -> Matrix:
    """Blocks over parameters of some shapes as one matrix: the only one, where it is all of it."""
    if len(parts) == 1:
        ((matrix, seen),) = parts
        whole = {name: tuple(shape) for name, shape in shapes.items()}
        if list(seen.items()) == [(name, Seen(name)) for name in whole]:
            return matrix
    return BlockDiagonal(shapes, parts)


def _part(part: Matrix | Part) -> Part:
    if isinstance(part, Part):
        return part
    return Part(part, {name: Seen(name) for name in part.layout.shapes})


def _seen(factor: Factor, view: View | None) -> Factor:
    """B in the entries of a view."""
    if view is None:
        return factor
    if isinstance(factor, ViewFactor):
        for own, part in factor.parts:
            if own == view:
                return part
    if view.plain:
        return factor.rows(view.start, view.stop)
    return DenseFactor(view.put(factor.dense()))

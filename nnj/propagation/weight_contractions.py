"""J M J^T, kernels and the diagonal of J^T M J' in the weights, from the factors at the parameters:
J, which has P entries for each output and sample, is not formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from nnj.jacobians.factor import Factor, Pairs
from nnj.jacobians.patches import Patches
from nnj.jacobians.shared_columns import SharedColumns, Unit
from nnj.loss_hessian.base import LossHessian
from nnj.matrices.matrix import Matrix
from nnj.propagation.backward import Sink
from nnj.propagation.chunking import columns_at_once
from nnj.propagation.last_layer import LastLayerColumns
from nnj.propagation.linearize import Linearization

Meet = Callable[[Tensor, Factor, Factor], None]
MEMORY = 1 << 28  # bytes that columns which walk together may take


# -- metrics ---------------------------------------------------------------------------------------


class DiagonalMetric:
    """M = diag(m), or the identity: each parameter for itself.

    Args:
        scales: m at each parameter, (*shape), or (N, *shape) with one for each sample; None is the
            identity.
    """

    def __init__(self, scales: Mapping[Tensor, Tensor] | None = None):
        self.scales = scales

    @classmethod
    def of(cls, at: Linearization[Any], m: Tensor | None) -> DiagonalMetric:
        """That of m, (N, P); None is the identity."""
        if m is None:
            return cls()
        alike = m.stride(0) == 0
        parts = at.by_leaf((m[:1] if alike else m)[None])
        return cls({leaf: t[0, 0] if alike else t[0] for leaf, t in parts.items()})

    def is_apart(self, leaves: set[Tensor]) -> bool:
        """Whether M is zero between these parameters and all others."""
        return True

    def meet(self, p: Tensor, factor: Factor, other: Factor, pairs: Pairs) -> Tensor:
        """The share of one parameter."""
        if self.scales is not None:
            other = other.scale(self.scales[p].to(factor.dtype))
        return factor.kernel(other, pairs)

    def contract(
        self, factors: Mapping[Tensor, Factor], other: Mapping[Tensor, Factor], pairs: Pairs
    ) -> Tensor | None:
        """B M B'^T of all parameters; None if it is zero for want of any."""
        shares = [self.meet(p, f, other[p], pairs) for p, f in factors.items() if p in other]
        return torch.stack(shares).sum(0) if shares else None

    def summing(
        self, add: Callable[[Tensor], None], pairs: Pairs
    ) -> tuple[Sink, Callable[[], None]]:
        """What takes the factors of some columns, one after the other, and what ends them."""
        return lambda p, factor: add(self.meet(p, factor, factor, pairs)), lambda: None


class MatrixMetric:
    """M of `nnj.matrices`.

    Args:
        names: of the parameters.
    """

    def __init__(self, matrix: Matrix, names: Mapping[Tensor, str]):
        self.matrix, self.names = matrix, names

    def is_apart(self, leaves: set[Tensor]) -> bool:
        return self.matrix.is_apart({self.names[leaf] for leaf in leaves})

    def contract(
        self, factors: Mapping[Tensor, Factor], other: Mapping[Tensor, Factor], pairs: Pairs
    ) -> Tensor | None:
        if not factors or not other:
            return None
        first = {self.names[p]: f for p, f in factors.items()}
        second = first if other is factors else {self.names[p]: f for p, f in other.items()}
        return self.matrix.contract(first, second, pairs)

    def summing(
        self, add: Callable[[Tensor], None], pairs: Pairs
    ) -> tuple[Sink, Callable[[], None]]:
        factors: dict[Tensor, Factor] = {}

        def end() -> None:
            found = self.contract(factors, factors, pairs)
            if found is not None:
                add(found)

        return factors.__setitem__, end


AnyMetric = DiagonalMetric | MatrixMetric


# -- J M J^T ---------------------------------------------------------------------------------------


def pushed_forward(at: Linearization[Any], metric: AnyMetric, to_diag: bool) -> Tensor:
    """J M J^T, (N, out, out), or its diagonal (N, out)."""
    dtype = functools.reduce(torch.promote_types, [at.y.dtype, *(p.dtype for p in at.leaves)])
    shape = (at.n, at.out) if to_diag else (at.n, at.out, at.out)
    total = at.y.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    pairs: Pairs = "row" if to_diag else "sample"

    def add(part: Tensor, found: Tensor) -> None:
        part += found.mT if to_diag else found

    last = _last_layer(at, metric)
    if last is not None:
        found = metric.contract(dict(last.factors), dict(last.factors), pairs)
        if found is not None:
            add(total, found)
    start = 0
    for k, send in _columns(at, last, together=not to_diag):
        part = total[:, start : start + k]
        take, end = metric.summing(functools.partial(add, part), pairs)
        send(take)
        end()
        start += k
    return total.to(dtype)


def _columns(
    at: Linearization[Any], last: LastLayerColumns | None, together: bool
) -> Iterator[tuple[int, Callable[[Sink], None]]]:
    """The unit cotangents, as many at a time as walk together: how many, and what sends them."""
    if at.sweep is None:
        return
    size = at.out if together else max(1, columns_at_once(at.sweep, MEMORY)[0])
    if last is None:
        for u in at.basis().split(size):
            yield len(u), functools.partial(at.factors, u)
        return
    steps = at.sweep.graph.steps[len(last.steps) :]
    for v in last.walked(size) if steps else ():
        yield len(v), functools.partial(_sent, at, last, v, steps)


def _sent(
    at: Linearization[Any], last: LastLayerColumns, v: Tensor, steps: Any, take: Sink
) -> None:
    assert at.sweep is not None
    at.sweep.run({last.edge: v}, len(v), take, steps)


def _last_layer(at: Linearization[Any], metric: AnyMetric) -> LastLayerColumns | None:
    """The last layers, behind which columns are rows of their Jacobian; None where they are none,
    or M couples them with others.
    """
    if at.sweep is None or at.sweep.hooks is not None or at.wrt == "input":
        return None
    last = LastLayerColumns(at.sweep, UnitHessian(at.y), set(), factor=_unit_factor)
    apart = metric.is_apart({p for p, _ in last.factors})
    return last if last.useful and apart else None


class UnitHessian(LossHessian):
    """H = S = I in the outputs of a model: the unit cotangents as columns of a loss.

    Args:
        y: the output, (N, *outputs).
    """

    closed_form = True

    def __init__(self, y: Tensor):
        out = math.prod(y.shape[1:])
        super().__init__([tuple(y.shape)], y, out, out, len(y))

    @override
    def columns(self, start: int, stop: int) -> Tensor:
        eye = torch.eye(self.block, dtype=self.dtype, device=self.device)[start:stop]
        return eye[:, None, None].expand(-1, self.rows, 1, -1)

    @override
    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        for part in rows.split(size):
            yield part[:, None].expand(-1, self.rows, -1)


def _unit_factor(
    hessian: LossHessian, patches: Patches, shape: tuple[int, ...], dtype: torch.dtype
) -> SharedColumns:
    like = torch.empty(0, dtype=dtype, device=hessian.device)
    return SharedColumns(patches, Unit(0, hessian.block, hessian.block), shape, like)


# -- J M J'^T between all samples ------------------------------------------------------------------


def kernel(at: Linearization[Any], other: Linearization[Any], metric: AnyMetric) -> Tensor:
    """(N, out, N', out')."""
    partner = dict(zip(other.leaves, at.leaves, strict=True))
    total = at.y.new_zeros(at.out, at.n, other.out, other.n)
    columns = 0
    for to, there in _factors_of_groups(other):
        theirs = {partner[p]: f for p, f in there.items()}
        rows = 0
        for of, mine in _factors_of_groups(at):
            found = metric.contract(mine, theirs, "all")
            if found is not None:
                total[rows : rows + of, :, columns : columns + to] = found
            rows += of
        columns += to
    return total.permute(1, 0, 3, 2)


def kernel_by_output(at: Linearization[Any], other: Linearization[Any]) -> Tensor:
    """The same between equal outputs alone, (N, N', out)."""
    partner = dict(zip(other.leaves, at.leaves, strict=True))
    total = at.y.new_zeros(at.out, at.n, other.n)
    size = min(len(u) for u in (basis(at)[0], basis(other)[0]))
    for start in range(0, at.out, size):
        there: dict[Tensor, Factor] = {}
        other.factors(other.basis()[start : start + size], there.__setitem__)
        theirs = {partner[p]: f for p, f in there.items()}

        def add(p: Tensor, f: Factor, start: int = start, theirs: Any = theirs) -> None:
            for i in range(f.k) if p in theirs else ():
                one, two = f.columns(slice(i, i + 1)), theirs[p].columns(slice(i, i + 1))
                total[start + i] += one.kernel(two)[0, :, 0]

        at.factors(at.basis()[start : start + size], add)
    return total.permute(1, 2, 0)


def _factors_of_groups(at: Linearization[Any]) -> Iterator[tuple[int, dict[Tensor, Factor]]]:
    """How many unit cotangents, and the factors of them."""
    for u in basis(at):
        found: dict[Tensor, Factor] = {}
        at.factors(u, found.__setitem__)
        yield len(u), found


# -- the diagonal of J^T M J' ----------------------------------------------------------------------


def diagonal_pulled_back(
    at: Linearization, m: Tensor | None, other: Linearization | None = None
) -> Tensor:
    """The diagonal of J^T M J', (N, in or P), with J' at another point.

    Args:
        m: (N, out, out), or (N, out) for a diagonal; None for the identity.
        other: the point of J', by default that of J.
    """
    wide = torch.promote_types(at.y.dtype, torch.float32)
    total = at.y.new_empty(at.n, at.size, dtype=wide)
    shares = dict(zip(at.leaves, total.split(at.leaf_sizes, 1), strict=True))
    written: set[Tensor] = set()

    def add(leaf: Tensor, left: Factor, right: Factor) -> None:
        found = left.square_sum(True) if right is left else left.inner(right, True)
        found, share = found.reshape(at.n, -1), shares[leaf]
        share.add_(found) if leaf in written else share.copy_(found)
        written.add(leaf)

    for u in basis(at):
        if other is not None:
            _meet(at, u, other, _times(u, m), add)
        elif m is None or m.dim() == 2:
            c = None if m is None else (_flat(u) * m).sum(-1)
            _meet_itself(at, u, c, add)
        else:
            _meet(at, u, at, _times(u, m), add)
    for leaf in shares.keys() - written:
        shares[leaf].zero_()
    return total.to(at.y.dtype)


def _meet_itself(at: Linearization, u: Tensor, c: Tensor | None, add: Meet) -> None:
    """Rows u of the identity meet those of a diagonal metric: themselves, with the weights c of
    (k, N).
    """
    at.factors(u, lambda leaf, f: add(leaf, f, f if c is None else f.scale_rows(c)))


def _meet(at: Linearization, u: Tensor, other: Linearization, v: Tensor, add: Meet) -> None:
    """Rows u at a point meet rows v at another, or the same one, to which they go together."""
    if other is at:
        first, second = slice(0, len(u)), slice(len(u), 2 * len(u))
        both = torch.cat([u, v])
        at.factors(both, lambda leaf, f: add(leaf, f.columns(first), f.columns(second)))
        return
    there: dict[Tensor, Factor] = {}
    other.factors(v, there.__setitem__)
    partner = dict(zip(at.leaves, other.leaves, strict=True))

    def take(leaf: Tensor, f: Factor) -> None:
        if partner[leaf] in there:  # else it is zero
            add(leaf, f, there[partner[leaf]])

    at.factors(u, take)


def basis(at: Linearization) -> tuple[Tensor, ...]:
    """The unit cotangents, as many at a time as walk together."""
    size = at.out if at.sweep is None else columns_at_once(at.sweep, MEMORY)[0]
    groups: tuple[Tensor, ...] = at.basis().split(max(1, size))
    return groups


def _times(u: Tensor, m: Tensor | None) -> Tensor:
    """Rows u of the identity, (k, N, *outputs), times M."""
    if m is None:
        return u
    flat = _flat(u)
    found = flat * m if m.dim() == 2 else (flat.transpose(0, 1) @ m).transpose(0, 1)
    return found.reshape(u.shape)


def _flat(u: Tensor) -> Tensor:
    """Cotangents as (k, N, out); outputs without axes are one number."""
    return u.flatten(2) if u.dim() > 2 else u[..., None]

"""Metrics: what a product is given, checked, and what it asks of them.

On d numbers of each sample a metric is None (the identity), a diagonal (N, d), a matrix (N, d, d),
or, on parameters, the list of the blocks of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.propagation.linearize import Linearization, Slot, parameters_by_module

Metric = Tensor | Sequence[Tensor] | None  # as users give it; without the sample axis one for all


class Block(NamedTuple):
    """The metric among the parameters at some positions of the flattened P."""

    positions: list[int]
    matrix: Tensor  # (N, P_l, P_l)


Checked = Tensor | list[Block] | None


# -- what users give -------------------------------------------------------------------------------


def slot_of(wrt: str) -> Slot:
    """ "input" or "weight". Errors: `NNJError` for any other wrt."""
    if wrt not in ("input", "weight", "weights"):
        raise NNJError(f"wrt={wrt!r}; expected 'input' or 'weight'")
    return "input" if wrt == "input" else "weight"


def given(name: str, t: Any, at: Linearization[Any], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """t, if it is a tensor of one of the shapes, on the device and in the dtype of y."""
    if not isinstance(t, Tensor):
        raise NNJError(f"{name} is {type(t).__name__}, expected a tensor")
    if tuple(t.shape) not in shapes:
        expected = " or ".join(str(s) for s in dict.fromkeys(shapes))
        raise NNJError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
    if t.dtype != at.y.dtype or t.device != at.y.device:
        raise NNJError(f"{name} is {t.dtype} on {t.device}, expected {at.y.dtype} on {at.y.device}")
    return t


def metric_on_outputs(matrix: Any, at: Linearization[Any], from_diag: bool) -> Tensor | None:
    """As (N, out, out), or (N, out) with from_diag; None for the identity."""
    return _metric(matrix, at, at.out, from_diag)


def metric_on_inputs(matrix: Metric, at: Linearization[Any], from_diag: bool) -> Checked:
    """The same on what J is in, of which parameters may have blocks."""
    if not isinstance(matrix, (list, tuple)):
        return _metric(matrix, at, at.size, from_diag)
    if at.wrt == "input" or from_diag:
        raise NNJError("matrix is a list of blocks, which is for wrt='weight' without from_diag")
    positions = positions_by_module(at)
    if len(positions) != len(matrix):
        raise NNJError(
            f"matrix has {len(matrix)} blocks, expected {len(positions)}, one for each module that "
            "owns parameters"
        )
    blocks = []
    for number, (index, block) in enumerate(zip(positions, matrix, strict=True)):
        d = len(index)
        m = given(f"block {number} of matrix", block, at, [(at.n, d, d), (d, d)])
        blocks.append(Block(index, m.expand(at.n, d, d)))
    return blocks


def _metric(matrix: Any, at: Linearization[Any], d: int, from_diag: bool) -> Tensor | None:
    if matrix is None:
        return None
    shapes = [(at.n, d), (d,)] if from_diag else [(at.n, d, d), (d, d)]
    m = given("matrix (a diagonal, from_diag=True)" if from_diag else "matrix", matrix, at, shapes)
    return m.expand(at.n, *m.shape) if m.dim() == len(shapes[1]) else m


# -- blocks of parameters --------------------------------------------------------------------------


def positions_by_module(at: Linearization[Any]) -> list[list[int]]:
    """For the block of each module the positions of its parameters in the flattened P."""
    starts, total = {}, 0
    for p, size in zip(at.params, at.sizes, strict=True):
        starts[p] = range(total, total + size)
        total += size
    return [[i for p in own for i in starts[p]] for own in parameters_by_module(at.module)]


def take(j: Tensor, index: list[int]) -> Tensor:
    """Columns of J; a slice where they follow one another."""
    if index and index == list(range(index[0], index[-1] + 1)):
        return j[..., index[0] : index[-1] + 1]
    return j[..., index]


# -- what products ask -----------------------------------------------------------------------------


def times(m: Tensor | None, j: Tensor) -> Tensor:
    """M J for J of (N, d, p)."""
    if m is None:
        return j
    return m[..., None] * j if m.dim() == 2 else m @ j


def times_transposed(j: Tensor, m: Checked) -> Tensor:
    """J M for J of (N, k, d)."""
    if m is None:
        return j
    if isinstance(m, list):
        out = torch.zeros_like(j)
        for index, block in m:
            out[..., index] = take(j, index) @ block
        return out
    return j * m[:, None] if m.dim() == 2 else j @ m


def is_diagonal(m: Checked) -> bool:
    """Whether all of a metric is its diagonal."""
    return m is None or (isinstance(m, Tensor) and m.dim() == 2)


def diagonal_of(m: Checked, at: Linearization[Any], d: int) -> Tensor:
    """The diagonal of a metric on d numbers, (N, d)."""
    if m is None:
        return at.y.new_ones(at.n, d)
    if isinstance(m, Tensor):
        return m if m.dim() == 2 else m.diagonal(dim1=1, dim2=2)
    diagonal = at.y.new_zeros(at.n, d)
    for index, block in m:
        diagonal[:, index] = block.diagonal(dim1=1, dim2=2)
    return diagonal


def dense_on_outputs(m: Tensor | None, at: Linearization[Any]) -> Tensor:
    """A metric on the outputs as a matrix, (N, out, out)."""
    if m is None:
        eye = torch.eye(at.out, dtype=at.y.dtype, device=at.y.device)
        return eye.expand(at.n, -1, -1)
    return m.diag_embed() if m.dim() == 2 else m


def part_of(m: Checked, at: Linearization[Any], index: list[int]) -> Tensor:
    """The metric among the parameters at some positions, (N, p, p)."""
    if m is None or isinstance(m, Tensor):
        if is_diagonal(m):
            return diagonal_of(m, at, at.size)[:, index].diag_embed()
        assert m is not None
        return m[:, torch.tensor(index)[:, None], index]
    part = at.y.new_zeros(at.n, len(index), len(index))
    for positions, block in m:
        place = {position: i for i, position in enumerate(positions)}
        here = [(i, place[position]) for i, position in enumerate(index) if position in place]
        mine, theirs = (torch.tensor(side, dtype=torch.long) for side in _unzipped(here))
        part[:, mine[:, None], mine] = block[:, theirs[:, None], theirs]
    return part


def _unzipped(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [a for a, _ in pairs], [b for _, b in pairs]

"""Metrics that a product is given: None, a diagonal (N, d), full (N, d, d), or blocks of
modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.propagation.linearize import Linearization, parameters_by_module

Metric = Tensor | Sequence[Tensor] | None


def slot_of(wrt: str) -> str:
    """ "input" or "weight". Errors: `NNJError` for any other wrt."""
    if wrt not in ("input", "weight", "weights"):
        raise NNJError(f"wrt={wrt!r}; expected 'input' or 'weight'")
    return "input" if wrt == "input" else "weight"


def _given(name: str, t: Any, at: Linearization, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """t, if it is a tensor of one of the shapes, on the device and in the dtype of y."""
    if not isinstance(t, Tensor):
        raise NNJError(f"{name} is {type(t).__name__}, expected a tensor")
    if tuple(t.shape) not in shapes:
        expected = " or ".join(str(s) for s in dict.fromkeys(shapes))
        raise NNJError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
    if t.dtype != at.y.dtype or t.device != at.y.device:
        raise NNJError(f"{name} is {t.dtype} on {t.device}, expected {at.y.dtype} on {at.y.device}")
    return t


def _metric(matrix: Any, at: Linearization, d: int, from_diag: bool) -> Tensor | None:
    """A metric over d numbers as (N, d, d), or (N, d) with from_diag; None for the identity."""
    if matrix is None:
        return None
    shapes = [(at.n, d), (d,)] if from_diag else [(at.n, d, d), (d, d)]
    m = _given("matrix (a diagonal, from_diag=True)" if from_diag else "matrix", matrix, at, shapes)
    return m.expand(at.n, *m.shape) if m.dim() == len(shapes[1]) else m


def _rows(at: Linearization, m: Tensor | None, u: Tensor) -> Tensor:
    """u M for unit cotangents u (k, N, *outputs): (k, N, *outputs)."""
    flat = u.reshape(*u.shape[:2], -1)
    if m is None:
        return u
    flat = flat * m if m.dim() == 2 else (flat.transpose(0, 1) @ m).transpose(0, 1)
    return flat.reshape(u.shape)


def _blocks(at: Linearization, joint: bool) -> list[list[int]]:
    """For each block the positions of its parameters in the flattened P."""
    starts, total = {}, 0
    for p, size in zip(at.params, at.sizes, strict=True):
        starts[id(p)] = (total, total + size)
        total += size
    if joint:
        return [list(range(total))]
    return [
        [i for p in own for i in range(*starts[id(p)])] for own in parameters_by_module(at.module)
    ]


def _take(j: Tensor, index: list[int]) -> Tensor:
    """Columns of J; a slice where they follow one another."""
    if index and index == list(range(index[0], index[-1] + 1)):
        return j[..., index[0] : index[-1] + 1]
    return j[..., index]


def _block_metric(matrix: Metric, at: Linearization, from_diag: bool) -> Any:
    """A metric on input or parameters: None, (N, d), (N, d, d), or [(positions, (N, P_l, P_l)),
    …].
    """
    if not isinstance(matrix, (list, tuple)):
        return _metric(matrix, at, at.size, from_diag)
    if at.wrt == "input" or from_diag:
        raise NNJError("matrix is a list of blocks, which is for wrt='weight' without from_diag")
    index = _blocks(at, joint=False)
    if len(index) != len(matrix):
        raise NNJError(
            f"matrix has {len(matrix)} blocks, expected {len(index)}, one for each module that "
            "owns parameters"
        )
    found = []
    for number, (i, block) in enumerate(zip(index, matrix, strict=True)):
        d = len(i)
        m = _given(f"block {number} of matrix", block, at, [(at.n, d, d), (d, d)])
        found.append((i, m.expand(at.n, d, d)))
    return found


def _apply(j: Tensor, m: Any) -> Tensor:
    """J M for J of (N, k, d)."""
    if m is None:
        return j
    if isinstance(m, list):
        out = torch.zeros_like(j)
        for index, block in m:
            out[..., index] = _take(j, index) @ block
        return out
    return j * m[:, None] if m.dim() == 2 else j @ m

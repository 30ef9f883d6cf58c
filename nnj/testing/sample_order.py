"""Which sample each entry of a model's output belongs to, by running every sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nnj.testing.describe import call_with

NEAR = 1e-9  # of the largest entry


def samples_of_entries(model: nn.Module, x: Any, output: Tensor, axis: int) -> tuple[int, Tensor]:
    """The number of samples, and the sample of each entry of the output, found by running every
    sample alone.

    Errors: AssertionError if no order of rows explains what they give alone.
    """
    n = next(
        t.shape[min(axis, t.dim() - 1)]
        for t in tree_leaves(x)
        if isinstance(t, Tensor) and t.dim() > 0
    )
    alone, nearest = _alone(model, x, output, n, axis), float("inf")
    for place, order in _orders(output, n):
        parts = [output.index_select(place, (order == m).nonzero()[:, 0]) for m in range(n)]
        if any(a.shape != b.shape for a, b in zip(parts, alone, strict=True)):
            continue
        off = max(float((a - b).abs().max()) for a, b in zip(parts, alone, strict=True))
        if off <= NEAR * max(1.0, float(output.abs().max())):
            by_row = order.reshape(-1, *[1] * (output.dim() - place - 1))
            return n, by_row.expand(output.shape).flatten()
        nearest = min(nearest, off)
    permuted = _permuted(output, alone)
    if permuted:
        raise AssertionError(
            "the model gives its samples in another order than it was given them: what sample "
            f"{permuted[0]} gives alone is row {permuted[1]} among the others, which batch_grad "
            "takes for another sample. Undo the permutation in the model"
        )
    raise AssertionError(
        "samples influence one another: among the others they give something else than alone, off "
        f"by {nearest:.3g}. Batch norm in training mode does this; use model.eval()"
    )


def _permuted(output: Tensor, alone: list[Tensor]) -> tuple[int, int] | None:
    """A sample and the row where it is, if rows are what samples give alone, in another order."""
    n = len(alone)
    for place, size in enumerate(output.shape):
        if size != n or any(a.dim() <= place or a.shape[place] != 1 for a in alone):
            continue
        rows = output.movedim(place, 0).reshape(n, -1)
        ones = torch.stack([a.flatten() for a in alone])
        if ones.shape != rows.shape:
            continue
        same = torch.cdist(ones.double(), rows.double(), p=torch.inf) <= NEAR * max(
            1.0, float(output.abs().max())
        )
        if bool((same.sum(0) == 1).all() and (same.sum(1) == 1).all()):
            moved = (same.to(torch.uint8).argmax(1) != torch.arange(n)).nonzero()[:, 0]
            if len(moved):
                return int(moved[0]), int(same[moved[0]].to(torch.uint8).argmax())
    return None


def _alone(model: nn.Module, x: Any, output: Tensor, n: int, axis: int) -> list[Tensor]:
    """What each sample gives alone."""
    with torch.no_grad():
        again = call_with(model, x)
        assert torch.allclose(again, output, rtol=NEAR, atol=NEAR), (
            "the model gives another output when it is called again: it draws random numbers, or "
            "keeps a state. Use model.eval()"
        )
        try:
            return [
                call_with(model, tree_map(lambda t, m=m: _part(t, n, m, axis), x)) for m in range(n)
            ]
        except (RuntimeError, ValueError, IndexError) as error:
            raise AssertionError(
                f"samples influence one another, or the model does not take one alone: {error}"
            ) from error


def _orders(output: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """Along which axis n samples may lie, and the sample of each of its entries: those of a sample
    together, or every n-th one.
    """
    numbers = torch.arange(n)
    for axis, size in enumerate(output.shape):
        if size % n == 0:
            yield axis, numbers.repeat_interleave(size // n)
            yield axis, numbers.repeat(size // n)


def _part(t: Any, n: int, m: int, axis: int) -> Any:
    """Sample m of an argument that has n samples."""
    has = isinstance(t, Tensor) and t.dim() > 0 and t.shape[min(axis, t.dim() - 1)] == n
    return t.narrow(min(axis, t.dim() - 1), m, 1) if has else t

"""What the checks share: double precision, comparison, and how entries can belong to samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nnj.jacobians.sample_index import SampleIndex

TOLERANCE: dict[str, Any] = dict(rtol=1e-8, atol=1e-9)


def double(value: Any) -> Any:
    """The tensors in a value, detached and in double precision; what is not of floating point stays
    as it is.
    """

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)

    return tree_map(one, value)


def same(name: str, found: Tensor, expected: Tensor) -> None:
    """Errors: AssertionError that names what is wrong."""
    try:
        torch.testing.assert_close(found, expected, **TOLERANCE)
    except AssertionError as error:
        raise AssertionError(f"{name} is wrong: {error}") from None


def sample_indices(
    n: int, outputs: tuple[int, ...], device: torch.device
) -> dict[str, tuple[SampleIndex, Tensor]]:
    """Ways in which the entries of (n, *outputs) can belong to samples, each with the sample of
    every entry written out.
    """
    by_row = (n, *[1] * len(outputs))
    samples, order = max(1, n // 2), torch.arange(n, device=device)
    token_major, ragged = (order % samples).reshape(by_row), torch.randint(-1, 3, (n,)).to(device)
    ways = {"one row a sample": (SampleIndex(n), order.reshape(by_row))}
    if n % 2 == 0:
        ways["sample-major"] = (SampleIndex(n // 2), (order // 2).reshape(by_row))
    ways["token-major"] = (SampleIndex(samples, token_major), token_major)
    ways["any order"] = (SampleIndex(3, ragged.reshape(by_row)), ragged.reshape(by_row))
    for axis, size in enumerate(outputs, start=1):
        shape = [1] * (len(outputs) + 1)
        shape[axis] = size
        along = torch.randint(-1, 2, (size,)).to(device).reshape(shape)
        ways[f"samples along axis {axis}"] = (SampleIndex(2, along), along)
    return {name: (index, of.expand(n, *outputs)) for name, (index, of) in ways.items()}

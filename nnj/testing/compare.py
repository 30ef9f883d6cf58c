"""What the checks share: double precision, and comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnj.jacobians.sample_index import SampleIndex

TOLERANCE: dict[str, Any] = dict(rtol=1e-8, atol=1e-9)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach().clone()
    return value


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    try:
        torch.testing.assert_close(found, expected, **TOLERANCE)
    except AssertionError as error:
        raise AssertionError(f"{name} is wrong: {error}") from None


def _owners(n: int, outputs: tuple[int, ...]) -> dict[str, tuple[SampleIndex, Tensor]]:
    """Ways in which entries can belong to samples, each with the owner of every entry written
    out.
    """
    whole = lambda rows: rows.reshape(n, *[1] * len(outputs)).expand(n, *outputs)
    rows = {"one row a sample": (n, torch.arange(n))}
    if n % 2 == 0:
        rows["sample-major"] = (n // 2, torch.arange(n) // 2)
    ways = {name: (SampleIndex(m), whole(of)) for name, (m, of) in rows.items()}
    m = max(1, n // 2)
    ways["token-major"] = (
        SampleIndex(m, (torch.arange(n) % m).reshape(n, *[1] * len(outputs))),
        whole(torch.arange(n) % m),
    )
    ragged = torch.randint(-1, 3, (n,))
    ways["any order"] = (SampleIndex(3, ragged.reshape(n, *[1] * len(outputs))), whole(ragged))
    for axis in range(len(outputs)):
        shape = [1] * (len(outputs) + 1)
        shape[axis + 1] = outputs[axis]
        of = torch.randint(-1, 2, (outputs[axis],)).reshape(shape)
        ways[f"samples along axis {axis + 1}"] = (SampleIndex(2, of), of.expand(n, *outputs))
    return ways

"""Whether what several processes have is what it should be: by names, to 1e-10 or bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.over_ranks import ROWS


def wrong(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Where two results differ by more than 1e-10."""
    if found.keys() != expected.keys():
        yield f"others: {sorted(found.keys() ^ expected.keys())}"
    for key in found.keys() & expected.keys():
        a, b = found[key], expected[key]
        if not isinstance(a, Tensor):
            if a != (b if isinstance(b, str) else pytest.approx(b, rel=1e-10)):
                yield f"{key}: {a}, expected {b}"
        elif a.shape != b.shape:
            yield f"{key}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        elif not torch.allclose(a, b, rtol=1e-10, atol=1e-12):
            yield f"{key}: off by {float((a - b).abs().max()):.1e}"


def same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(t, other[key]) if isinstance(t, Tensor) else t == other[key]
        for key, t in one.items()
    )


def is_row(key: str) -> bool:
    return key.split()[0] in ROWS

"""Which tests of many alike `.ci/run` has alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(every: Iterable[Any], part: int = 3) -> list[Any]:
    """Of the values of a parameter one in `part`; the others are slow."""
    slow = pytest.mark.slow
    return [v if i % part == 0 else pytest.param(v, marks=slow) for i, v in enumerate(every)]

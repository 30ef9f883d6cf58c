"""Damping by the names of modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nnj import NNJError
from nnj.matrices.layout import Layout

LAYOUT = Layout({"x": (2,), "a.weight": (2, 3), "a.b.bias": (2,), "ab.bias": ()})


def test_the_most_particular_name_counts() -> None:
    found = LAYOUT.damping({"": 1.0, "a": 2.0, "a.b": torch.tensor(3.0)})
    assert found == {"x": 1.0, "a.weight": 2.0, "a.b.bias": 3.0, "ab.bias": 1.0}
    assert LAYOUT.damping(0) == dict.fromkeys(LAYOUT.shapes, 0.0)
    assert LAYOUT.below("a") == ["a.weight", "a.b.bias"]


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, True, "1", None, torch.ones(2)])
def test_what_is_no_damping(value: Any) -> None:
    for damping in (value, {"": 1.0, "a": value}):
        with pytest.raises(NNJError, match="a finite number that is not negative"):
            LAYOUT.damping(damping)


def test_names_that_say_too_little_or_too_much() -> None:
    with pytest.raises(NNJError, match=r"says nothing of x, ab.bias. Give a number for every"):
        LAYOUT.damping({"a": 1.0})
    with pytest.raises(NNJError, match=r"'a.c' is the name of no module .*did you mean 'a"):
        LAYOUT.damping({"": 1.0, "a.c": 1.0})

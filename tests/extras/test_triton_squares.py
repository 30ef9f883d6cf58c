"""Squares in one kernel of Triton, in its interpreter: that it is right, not that it is fast."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nnj.jacobians import outer_squares
from nnj.jacobians.outer_squares import explicit_squares
from nnj.jacobians.patches import Patches

pytestmark = pytest.mark.usefixtures("seeded")
NAME = "nnj.extras.triton_squares"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The file, read anew under the interpreter, which is chosen when a kernel is defined."""
    pytest.importorskip("triton", reason="the kernel is tested where Triton is installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    former = sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
    if former is not None:
        sys.modules[NAME] = former


SIZES = [
    (3, 4, 1, 5, 7, 6),
    (2, 3, 2, 70, 20, 40),  # more than a tile of outputs, and of places
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 16, 65, 33),
    (2, 0, 1, 3, 4, 5),
    (0, 2, 1, 3, 4, 5),
]


def columns_and_patches(sizes: tuple[int, ...], transposed: bool) -> tuple[Tensor, Tensor]:
    k, n, g, o, i, l = sizes
    if transposed:
        return torch.randn(k, n, g, l, o).mT, torch.randn(n, g, l, i).mT
    return torch.randn(k, n, g, o, l), torch.randn(n, g, i, l)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_squares(kernel: Any, sizes: tuple[int, ...], transposed: bool, per_sample: bool) -> None:
    v, u = columns_and_patches(sizes, transposed)
    expected = (v.double() @ u.double().mT).square().sum(0 if per_sample else (0, 1))
    found = kernel.squares(v, u, per_sample)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("programs", [1, 5, 10**6])
def test_samples_are_divided(kernel: Any, monkeypatch: Any, programs: int) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    v, u = columns_and_patches((2, 7, 1, 3, 4, 5), False)
    expected = (v @ u.mT).square().sum((0, 1))
    torch.testing.assert_close(kernel.squares(v, u, False), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_it_takes_some_samples_at_a_time(kernel: Any, monkeypatch: Any, per_sample: bool) -> None:
    monkeypatch.setattr(outer_squares, "_fused", lambda v: kernel.squares)
    monkeypatch.setattr(outer_squares, "SQUARED_ON_GPU", 2 * 4 * 5)
    v, u = columns_and_patches((2, 7, 1, 3, 4, 5), True)
    seen = []
    found = explicit_squares(
        v, Patches(lambda rows: seen.append(rows) or u[rows], 7, 4), per_sample
    )
    assert len(seen) == 4
    torch.testing.assert_close(found, (v @ u.mT).square().sum(0 if per_sample else (0, 1)))


def test_it_is_tried_before_it_is_believed(kernel: Any) -> None:
    cpu = torch.device("cpu")
    assert outer_squares._is_right(kernel.squares, cpu)
    assert not outer_squares._is_right(lambda *given: 1.001 * kernel.squares(*given), cpu)


def test_one_that_fails_is_named_and_left() -> None:
    def fails(*given: Any) -> Tensor:
        raise RuntimeError("no compiler")

    with pytest.warns(UserWarning, match=r"products of torch on cpu, .* RuntimeError: no compiler"):
        assert not outer_squares._is_right(fails, torch.device("cpu"))


def test_nothing_of_it_is_read_on_a_cpu() -> None:
    former = sys.modules.pop(NAME, None)
    v, u = columns_and_patches((2, 3, 1, 4, 5, 6), False)
    explicit_squares(v, Patches.of(u))
    assert NAME not in sys.modules
    if former is not None:
        sys.modules[NAME] = former

"""What ranks compare of one model: found are other numbers, and not what rounding makes of them."""

from __future__ import annotations

import pytest
import torch

import nnj
from nnj.recording.replicas import check_prints, prints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (40, 30), (0, 2)])
def test_other_numbers_are_found_and_roundings_are_not(dtype, shape):
    draw = lambda seed: torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )
    one, other = draw(0), draw(1)
    rounded = one * (1 + torch.finfo(dtype).eps)
    check_prints("parameter", [prints([("w", t)]) for t in (one, one.clone(), rounded)])
    if one.numel():
        with pytest.raises(nnj.NNJError, match="buffer 'w' has other numbers on rank 2 than"):
            check_prints("buffer", [prints([("w", t)]) for t in (one, one, other)])


def test_masks_are_compared_and_what_has_no_numbers_is_not():
    masks = [torch.tensor([True, False]), torch.tensor([True, True])]
    with pytest.raises(nnj.NNJError, match="'mask' has other numbers on rank 1"):
        check_prints("buffer", [prints([("mask", t)]) for t in masks])
    assert prints([("w", torch.empty(3, device="meta"))]) == {}
    nan = torch.tensor([float("nan")])
    check_prints("parameter", [prints([("w", nan)])] * 2)
    with pytest.raises(nnj.NNJError):
        check_prints("parameter", [prints([("w", t)]) for t in (nan, nan.nan_to_num())])

"""A sample is a row of the batch axis of the model's output, whatever rows the loss is given: every
quantity is right for it, or refused."""

from __future__ import annotations

import pytest

import nnj
from tests.support.cases.whose_rows import SUMS, WHOSE
from tests.support.collecting import QUANTITIES, collected


@pytest.mark.parametrize("name", WHOSE)
def test_right(name):
    assert collected(WHOSE[name], *QUANTITIES) == []


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_right_and_shares_refused(name):
    assert collected(SUMS[name], "ggn_diag", "ggn_block") == []
    with pytest.raises(nnj.NNJError, match=r"batch_grad: .*\. .*[gG]ive"):
        collected(SUMS[name], "batch_grad")

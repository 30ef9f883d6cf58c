"""What is asked for, checked before anything is collected."""

from __future__ import annotations

import pytest

import nnj
from nnj.collecting.request import Request


def test_a_source_of_columns_that_there_is_not():
    class Odd(nnj.Quantity):
        source = "hessian"

        def parameter(self, factor, total_columns):
            return factor.square_sum()

    with pytest.raises(
        nnj.PluginError,
        match=r"^the quantity 'odd' has source='hessian', expected 'exact', 'signs' or 'gradient'$",
    ):
        Request({"odd": Odd()})

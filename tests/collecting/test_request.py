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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": "x"}, r"^tol='x': what may be lost of the trace is a number from 0 to below 1$"),
        ({"tol": None}, r"^tol=None: what may be lost of the trace is a number"),
        ({"memory": "x"}, r"^memory='x': the bytes that columns may take are a number"),
        ({"memory": None}, r"^memory=None: the bytes that columns may take are a number"),
        ({"memory": -5}, r"^memory=-5: the bytes that columns may take are a number"),
        ({"generator": 3}, r"^ggn_diag_mc: generator=3 is no torch\.Generator\. Give torch\.Gener"),
        ({"block_limit": "a"}, r"^block_limit='a': the largest P is a number$"),
        ({"modules": 3}, r"^modules= takes a list of torch\.nn\.Modules, not int$"),
        ({"modules": []}, r"^modules=\[\] names no module to collect at\. Leave it out"),
    ],
)
def test_options_of_another_kind(options, message):
    with pytest.raises(nnj.NNJError, match=message):
        nnj.collect("ggn_diag", "ggn_block", "ggn_diag_mc", **options)


def test_signs_need_neither_a_generator_nor_a_number_of_draws_of_the_class():
    class Plain(nnj.Quantity):
        source = "signs"

        def parameter(self, factor, total_columns):
            return factor.square_sum()

    assert Request({"plain": Plain()}).quantities["plain"].generator is None
    odd = Plain()
    odd.draws = 0
    with pytest.raises(nnj.NNJError, match=r"^plain: 0 draws; their number is a whole number"):
        Request({"plain": odd})

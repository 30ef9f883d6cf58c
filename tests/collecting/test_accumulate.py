"""The accumulator: sums, rows behind one another with zeros between them, and what it keeps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import Contribution, ExactColumns


class Sums(nnj.Quantity):
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        raise AssertionError

    def end_pass(self, state: Any) -> Tensor:
        return 2 * state


class Each(Sums):
    per_sample = True


QUANTITIES = {"sums": Sums(), "each": Each()}


def of(call: int, n: int, given: dict[str, dict[Tensor, Tensor]], *known: Tensor) -> Contribution:
    made = Contribution(frozenset({call}), n)
    made.holders = dict.fromkeys([*known, *(p for found in given.values() for p in found)])
    made.states = {name: dict(found) for name, found in given.items()}
    return made


def param(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_losses_of_the_same_samples_are_added_and_others_come_behind():
    p, q = param(0, 0), param(0)
    total = Accumulator(QUANTITIES)
    row = lambda *rows: {"each": {p: torch.tensor(rows).double()}}
    second = of(5, 2, row([5, 6], [7, 8]), q)
    first = of(3, 1, row([1, 2]), q)
    same = of(3, 1, row([10, 20]), q)
    total.add_pass([second, first, same])  # forward calls say what comes first
    assert total.value("each", p).tolist() == [[11, 22], [5, 6], [7, 8]]
    assert (total.samples, total.passes) == (3, 1)
    assert total.value("each", q) is None
    assert {holder for holder, _ in total.values("each")} == {p, q}


@pytest.mark.parametrize("first", [None, 1.0])
def test_what_is_known_of_some_samples_alone_is_not_the_sum_of_all(first):
    """A state that is None stands for samples of which nothing is known."""
    p, total = param(0, 0), Accumulator(QUANTITIES)
    states = [None if known is None else torch.ones(2).double() for known in (first, None, 1.0)]
    total.add_pass([of(0, 2, {"sums": {p: states[0]}})])
    with pytest.raises(nnj.NNJError, match="states of two passes have other f"):
        total.add_pass([of(1, 2, {"sums": {p: states[1 if first else 2]}})])
    total.add_pass([of(2, 2, {"sums": {p: states[0]}})])
    assert (total.value("sums", p) is None) == (first is None)


def test_zeros_where_a_pass_did_not_come():
    p, q, r = param(0), param(0, 0), param(0)
    total = Accumulator(QUANTITIES)
    total.add_pass([of(0, 2, {"each": {p: torch.ones(2, 1).double()}}, q, r)])
    total.add_pass([of(1, 1, {"each": {q: torch.ones(1, 2).double()}}, r)])
    assert total.value("each", p).tolist() == [[1], [1], [0]]
    assert total.value("each", q).tolist() == [[0, 0], [0, 0], [1, 1]]
    total.add_pass([of(2, 1, {"each": {p: torch.ones(1, 1).double()}}, r)])
    assert total.value("each", p).tolist() == [[1], [1], [0], [1]]
    assert total.value("each", q).tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert total.value("each", r) is None
    assert total.value_or_zeros("each", r).tolist() == [[0]] * 4
    assert total.value_or_zeros("sums", r).tolist() == [0]


def test_no_zeros_of_a_shape_that_nobody_knows():
    p, r = param(0, 0), param(0)
    total = Accumulator(QUANTITIES)
    total.add_pass([of(0, 1, {"sums": {p: torch.ones(3, 3).double()}}, r)])
    assert total.value_or_zeros("sums", p).shape == (3, 3)
    assert total.value_or_zeros("sums", r) is None


def test_sums_are_wide_and_results_have_the_dtype_of_the_parameter():
    p = param(0, dtype=torch.bfloat16)
    total = Accumulator(QUANTITIES)
    for call in range(300):  # in bfloat16 256 + 1 is 256
        total.add_pass([of(call, 1, {"sums": {p: torch.ones(1)}})])
    assert total.value("sums", p).item() == 300 and total.value("sums", p).dtype == torch.bfloat16
    assert total.value("sums", p, 1 / 300).item() == 1


def test_what_was_given_out_does_not_change():
    p = param(0)
    total = Accumulator(QUANTITIES)
    one = {"sums": {p: torch.ones(1).double()}, "each": {p: torch.ones(1, 1).double()}}
    total.add_pass([of(0, 1, one)])
    before = [total.value(name, p) for name in QUANTITIES]
    total.add_pass([of(1, 1, one)])
    assert [t.tolist() for t in before] == [[1], [[1]]]
    assert total.value("each", p) is total.value("each", p)  # joined once


def test_rows_keep_no_other_columns_alive():
    """A factor may be a view of all columns of a chunk."""
    p, chunk = param(0), torch.zeros(100, 2, 1).double()
    total = Accumulator(QUANTITIES)
    total.add_pass([of(0, 2, {"each": {p: chunk[7]}})])
    found = total.value("each", p)
    assert found.untyped_storage().nbytes() == found.nbytes


def test_results_go_with_their_parameter():
    p, q = param(0), param(0)
    total = Accumulator(QUANTITIES)
    total.add_pass([of(0, 1, {"sums": {p: torch.ones(1).double(), q: torch.ones(1).double()}})])
    del p
    gc.collect()
    assert [holder for holder, _ in total.values("sums")] == [q]


def test_contributions():
    p = param(0)
    one, two = (of(0, 1, {"sums": {p: torch.full((1,), v).double()}}) for v in (3.0, 5.0))
    one.exact, two.exact = ExactColumns(4, 2.0, 0.5), ExactColumns(9, 6.0, 0.5)
    one.absorb(two, QUANTITIES, -1)
    one.end(QUANTITIES)
    assert one.at("sums")[p].tolist() == [-4] and one.at("each") == {}
    assert one.exact == ExactColumns(9, 8.0, 1.0) and one.exact.deficit == 0.125
    assert ExactColumns().deficit == 0


@pytest.mark.parametrize("calls", [((0,), (1,)), ((0, 1), (1, 2)), ((), ())])
def test_the_same_samples(calls):
    """Those of a forward call that both losses share; two losses without a model may share all."""
    one, two = (Contribution(frozenset(c), 2) for c in calls)
    assert one.of_same_samples(two) == (calls != ((0,), (1,)))
    assert not one.of_same_samples(Contribution(frozenset(calls[0]), 3))

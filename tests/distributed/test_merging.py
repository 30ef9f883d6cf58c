"""Who hands over to whom; what ranks then have is in tests/whole/test_over_owners.py."""

import itertools

import pytest

from nnj.distributed.merging import _transfers


@pytest.mark.parametrize("size", range(1, 10))
def test_all_comes_to_the_root_in_the_order_of_ranks_and_each_hands_over_once(size):
    for root in range(size):
        held, sent = {rank: [rank] for rank in range(size)}, []
        for source, target in _transfers(range(size), root):
            sent.append(source)
            both = held.pop(source), held[target]
            held[target] = [*both[0], *both[1]] if source < target else [*both[1], *both[0]]
        assert held == {root: list(range(size))}
        assert sorted(sent) == [rank for rank in range(size) if rank != root]


def test_ranks_that_have_nothing_are_left_out():
    for there in itertools.combinations(range(5), 3):
        met = {rank for pair in _transfers(there, there[1]) for rank in pair}
        assert met == set(there)


def test_nobody_waits_long():
    """The longest way to a root, in steps of which each waits for those before it at both ends."""
    ready = dict.fromkeys(range(64), 0)
    for source, target in _transfers(range(64), 17):
        ready[target] = max(ready[source], ready[target]) + 1
    assert ready[17] == 6

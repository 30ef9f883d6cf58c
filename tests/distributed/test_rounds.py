"""Ranks, here threads, that need things in orders of their own."""

import random
import threading

import pytest

from nnj.distributed import rounds
from nnj.distributed.rounds import Rounds


class Threads:
    """What ranks say, of threads."""

    def __init__(self, size):
        self.size, self.said = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def of(self, rank):
        def numbers(mine):
            self.said[rank] = list(mine)
            self.barrier.wait()
            found = list(self.said)
            self.barrier.wait()
            return found

        return type("Rank", (), {"numbers": staticmethod(numbers)})()


def together(size, job):
    """What each rank gives; raises what any has raised."""
    found, threads = [None] * size, Threads(size)

    def run(rank):
        try:
            found[rank] = job(rank, threads.of(rank))
        except Exception as error:
            found[rank] = error
            threads.barrier.abort()

    every = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join(30)
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found


@pytest.mark.parametrize("seed", range(20))
def test_all_do_what_any_needs_in_one_order_whatever_each_asks_for(seed):
    size, choose = 3, random.Random(seed)
    wanted = [[choose.randrange(5) for _ in range(choose.randrange(8))] for _ in range(size)]

    def job(rank, ranks):
        done, mine = [], []

        def act(what, needed):
            done.append(what)
            if needed:
                mine.append(what)

        every = Rounds(ranks, act, lambda: 0, lambda: done.append("shared"))
        for what in wanted[rank]:
            before = len(mine)
            every.need(what)
            assert mine[before:] == [what]  # when it goes on, it is there
        every.end()
        return done, mine

    found = together(size, job)
    assert len({tuple(done) for done, _ in found}) == 1
    assert [mine for _, mine in found] == wanted


def test_ranks_in_step_do_each_thing_once():
    def job(rank, ranks):
        done = []
        every = Rounds(ranks, lambda what, _: done.append(what), lambda: 0, lambda: None)
        for what in (3, 1, 2):
            every.need(what)
        every.end()
        return done

    assert together(2, job) == [[3, 1, 2]] * 2


def test_what_waits_is_shared_where_all_have_something_and_nobody_is_in_the_middle_of_a_step():
    def job(rank, ranks):
        waits, log = [rounds.BUCKET if rank == 0 else 0], []

        def share():
            log.append("shared")
            waits[0] = 0

        every = Rounds(ranks, lambda what, _: log.append(what), lambda: waits[0], share)
        if rank == 0:
            every.offer()
            every.need(7)
        else:
            every.need(8)  # in the middle of a step, while rank 0 offers
            waits[0] = 1
        every.end()
        return log

    assert together(2, job) == [[8, 7, "shared"]] * 2


def test_little_that_waits_is_not_worth_a_round():
    def job(rank, ranks):
        said = []
        every = Rounds(ranks, lambda *_: None, lambda: 5, lambda: said.append("shared"))
        every.offer()  # alone
        every.end()
        return said

    assert together(2, job) == [[], []]

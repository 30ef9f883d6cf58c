"""Of models that `fully_shard` shards what is no sum, Kronecker factors and what strangers merge,
goes to the rank that owns it while columns walk, and is what one process has.

One test for each group of processes, since these take seconds to start; it lists all that is wrong.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.over_owners import cases
from tests.support.processes import together
from tests.support.same_results import wrong

OWNED = ("kfac", "numbers")  # of each module on one rank


def is_owned(key: str) -> bool:
    return key.split()[0] in OWNED


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_no_sum_goes_to_its_owner_in_the_pass(size):
    ranks, said = together("tests.support.over_owners:of_several", size=size), []
    for name, case in cases(size).items():
        alone = ranks[0][name][1]
        for rank, found in enumerate(ranks):
            over, _, counts = found[name]
            there = {k: t for k, t in alone.items() if k in over or not is_owned(k)}
            said += [f"{name}, rank {rank}: {w}" for w in wrong(over, there)]
            if (counts["at its end"] > 0) != case.late:
                said.append(f"{name}, rank {rank}: merged {counts}")
        said += _not_on_one(name, alone, [found[name][0] for found in ranks])
    assert not said, "\n".join(said)
    _check_odd(size, ranks)


def _not_on_one(name, alone, ranks):
    """What is owned, and not on one rank."""
    owned = sorted(k for k in alone if is_owned(k))
    there = sorted(k for found in ranks for k in found if is_owned(k))
    return [] if owned == there else [f"{name}: {owned} is not on one rank each, but {there}"]


def _check_odd(size, ranks):
    alone = ranks[0]["models"][1]
    assert not _not_on_one("models", alone, [found["models"][0] for found in ranks])
    for rank, found in enumerate(ranks):
        over = found["models"][0]
        assert not list(wrong(over, {k: alone[k] for k in over}))
        said, same = found["refused"]
        assert "unwilling: these do not merge" in said and said.startswith("rank ")
        assert same, rank
        assert found["refused first"].startswith("rank 1: CrossEntropyLoss: the scalar is not")
        assert all(found["once"])
        assert len(found["unknown"]) == 4
        for said in found["unknown"]:
            assert "sometimes: what ranks have at" in said and "has other forms" in said
        layer = 8 * (12 * 12 + 13 * 13 + 1)
        for waited, counts in found["held"]:
            assert 0 < waited <= layer, (waited, layer)
            assert counts == {"in the pass": 6, "at its end": 0}


def test_owners_have_about_as_much():
    alone = together("tests.support.over_owners:owners", size=3)
    assert alone[0] == alone[1] == alone[2]
    assert torch.tensor(alone[0]).bincount(minlength=3).tolist() == [2, 2, 2]

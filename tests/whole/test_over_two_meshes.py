"""Models that `fully_shard` shards over one dimension of ranks, and tensor parallelism distributes
over another: what is collected and fitted is that of one process, placed as parameters are, and
training is bit for bit as without nnj.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.over_ranks import SHARDS
from tests.support.over_two_meshes import DATA, WAYS
from tests.support.processes import together
from tests.support.same_results import is_row, same_bits, wrong

OWNED = ("kfac", "ekfac")  # of each module on one of the ranks over which data are split


def is_owned(key: str) -> bool:
    return key.split()[0] in OWNED


@pytest.mark.slow
def test_results_over_two_dimensions_of_ranks_are_those_of_one_process():
    ranks = together("tests.support.over_two_meshes:of_four", size=4)
    said = [f"rank {i}: {w}" for i, found in enumerate(ranks) for w in _wrong_on_rank(found)]
    for name in WAYS:
        owned = sorted(k for k in ranks[0]["ways"][name]["alone"] if is_owned(k))
        for shared in (0, 1):  # of each model, by its ranks
            mine = [found["ways"][name]["found"]["results"] for found in ranks[shared::2]]
            there = sorted(k for results in mine for k in results if is_owned(k))
            if owned != there:
                said.append(f"{name}: each of {owned} is on one rank, and not {there}")
    assert not said, "\n".join(said)
    for found in ranks:
        _check_odd(found)
        # those that share a model draw the same, with other seeds
        assert torch.equal(found["draws"][0], ranks[0]["draws"][0])


def _wrong_on_rank(of_rank: dict[str, Any]) -> list[str]:
    said, mine = [], of_rank["data"]
    rows = 2 * sum(SHARDS[:mine]), 2 * SHARDS[mine]
    for name in WAYS:
        plain, found, alone = (of_rank["ways"][name][kind] for kind in ("plain", "found", "alone"))
        expected = {k: v.narrow(0, *rows) if is_row(k) else v for k, v in alone.items()}
        there = {k: v for k, v in expected.items() if k in found["results"] or not is_owned(k)}
        said += [f"{name}: {w}" for w in wrong(found["results"], there)]
        bits = [k for k in ("grad 0", "grad 1", "state") if not same_bits(found[k], plain[k])]
        said += [f"{name}: {k} is not bit for bit the same" for k in bits]
        said += [f"{name}: {w}" for w in _wrongly_placed(found)]
    return said


def _wrongly_placed(found: dict[str, Any]) -> list[str]:
    """Diagonals that are not placed as parameters, and rows not as the parts of a model."""
    said = []
    for key, at in found["placed"].items():
        name, _, place = key.partition(" ")
        like = found["like"].get(place)
        if name == "ggn_diag" and at != like:
            said.append(f"{key} is placed {at}, expected {like}")
        if name == "batch_grad":
            # over the ranks that share a model one axis on, and not over those that split the data
            rows = None if len(like) == 1 else (like[1].replace("1", "2").replace("0", "1"),)
            if at != rows:
                said.append(f"{key} is placed {at}, expected {rows}")
    return said


def _check_odd(found: dict[str, Any]) -> None:
    """Fits, rows of all ranks, and draws."""
    over, every, one, mine = found["fitted"]
    one = {k: t[mine] if k.startswith("batch_grad ") else t for k, t in one.items()}
    assert not list(wrong(over, {k: t for k, t in one.items() if k in over or not is_owned(k)}))
    assert not list(wrong(every, one))
    for rows, grad in found["gathered"].values():
        assert len(rows) == sum(SHARDS[:DATA]) and torch.allclose(rows.sum(0), grad)
    *said, right = found["strange"]
    assert all("Say entrywise=False" in refused for refused in said) and right == "right"
    # with one seed, ranks that have other data draw another thing: else it would be that of one
    assert not torch.allclose(*found["draws"])

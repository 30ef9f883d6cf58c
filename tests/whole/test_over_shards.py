"""Models that `fully_shard` shards: what is collected and fitted is that of one process that has
the batches of all ranks, each rank with a part of it, and training is bit for bit as without nnj.

One test for each group of processes, since these take seconds to start; it lists all that is wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nnj
from tests.support.over_ranks import SHARDS, data, net, share
from tests.support.over_shards import Way, ways
from tests.support.processes import together
from tests.support.same_results import is_row, same_bits, wrong

OWNED = ("kfac", "ekfac")  # of each module on one rank


def is_owned(key: str) -> bool:
    return key.split()[0] in OWNED


def wrongly_placed(found: dict[str, Any]) -> list[str]:
    """Results of parameters that are not placed as these are, and others not by rows."""
    said = []
    for key, at in found["placed"].items():
        name, _, place = key.partition(" ")
        if name.startswith(("batch_", "kfac", "noise")) or place == "of the context":
            continue
        expected = found["like"].get(place, ("S(0)",))
        if at is None or [str(a).replace("Shard(dim=0)", "S(0)") for a in at] != [
            str(a).replace("Shard(dim=0)", "S(0)") for a in expected
        ]:
            said.append(f"{key} is placed {at}, expected {expected}")
    return said


def wrong_on_rank(way: Way, rank: int, of_rank: dict[str, Any]) -> list[str]:
    """What is wrong on one rank, but for what another one has."""
    plain, found, alone = (of_rank[kind] for kind in ("plain", "found", "alone"))
    batches = 1 if "batch_grad_dot" in way.names else 2
    mine = batches * sum(SHARDS[:rank]), batches * SHARDS[rank]
    results = {k: v for k, v in found["results"].items() if not k.startswith("batch_grad_dot")}
    expected = {k: v.narrow(0, *mine) if is_row(k) else v for k, v in alone.items()}
    said = wrong(results, {k: v for k, v in expected.items() if k in results or not is_owned(k)})
    bits = [k for k in ("grad 0", "grad 1", "state") if not same_bits(found[k], plain[k])]
    return [*said, *wrongly_placed(found), *(f"{k} is not bit for bit the same" for k in bits)]


@pytest.mark.parametrize("size", [2, 3])
def test_results_of_sharded_models_are_those_of_one_process(size):
    """Of two processes also fits, and what is refused."""
    of_ranks = together("tests.support.over_shards:of_several", size=size)
    ranks = [found["ways"] for found in of_ranks]
    said = []
    for name, way in ways(size).items():
        for rank in range(size):
            said += [
                f"{name}, rank {rank}: {w}" for w in wrong_on_rank(way, rank, ranks[rank][name])
            ]
        owned = {k for k in ranks[0][name]["alone"] if is_owned(k)}
        owners = [k for r in ranks for k in r[name]["found"]["results"] if k in owned]
        if sorted(owners) != sorted(owned):
            said.append(f"{name}: each of {sorted(owned)} is on one rank, and not {sorted(owners)}")
    assert not said, "\n".join(said)
    if size == 2:
        _check_odd(size, [found["odd"] for found in of_ranks])


def _check_odd(size: int, ranks: list[Any]) -> None:
    """Fits are those of one process, and what is refused is refused on all ranks."""
    every = len(data())
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        for rank in range(size):
            (loss(model(share(rank, 0)[0]), share(rank, 0)[1]) / size).backward()
    for rank, found in enumerate(ranks):
        for scale in ("sum", "mean"):
            over, one, rows = found[scale]
            mine = list(range(rank, every, size))
            one = {k: t[mine] if k.startswith("batch_grad ") else t for k, t in one.items()}
            assert rows == len(mine)
            there = {k: t for k, t in one.items() if k in over or not is_owned(k)}
            assert not list(wrong(over, there))
        (over, read, one), merged = found["whole fit"]
        mine = list(range(rank, every, size))
        one = {k: t[mine] if k.startswith("batch_grad") else t for k, t in one.items()}
        assert not list(wrong(over, one)) and not list(wrong(read, one))
        assert list(over) == list(one) and not list(wrong(*merged))
        refused, precise = found["refused"], found["mixed precision"]
        assert refused["said"].startswith("rank 1: CrossEntropyLoss: the scalar is not linear")
        assert refused["grad"].keys() == dict(net().named_parameters()).keys()
        assert torch.allclose(refused["later"], model.head.weight.ggn_diag, rtol=1e-10)
        for name, t in precise["found"].items():
            off = (t - precise["alone"][name].float()).norm() / t.norm()
            assert t.dtype == torch.float32 and off < 2e-2, (name, off)
        for rows, grad in found["gathered"].values():
            assert len(rows) == sum(SHARDS[:size]) and torch.allclose(rows.sum(0), grad)
        later, said = found["world"]
        assert torch.allclose(later, model.head.weight.ggn_diag, rtol=1e-10)
        assert "is spread over ranks" in said
        assert len(found["parts of fit"]) == 5
        assert all("of which each rank has a part" in said for said in found["parts of fit"])
        _check_memory(*found["memory"])
        assert not list(wrong(*found["two models"]))
        for name, text in SAID.items():
            assert text in found[name], (rank, name, found[name])
    for kind in OWNED:
        owned = {k for k in ranks[0]["sum"][1] if k.startswith(f"{kind} ")}
        owners = [k for found in ranks for k in found["sum"][0] if k in owned]
        assert sorted(owners) == sorted(owned)


def _check_memory(passes: dict[str, Any], every: int, samples: int) -> None:
    """Two units at most are whole, and one result waits; a pass that is known makes each unit whole
    once for each chunk of columns, but for the first layer, whose weight nothing reads.
    """
    layer = 8 * (12 * 12 + 12)
    assert every == 6 * layer // 8 and samples == 6
    for name, (_, whole, most, waited) in passes.items():
        assert (whole, most) == (0, 2), (name, whole, most)
        assert 0 < waited <= layer, (name, waited)
    assert passes["known"][0] == 5 < passes["first"][0]
    assert passes["in chunks"][0] == 12 * 5


SAID = {
    "partly": "parameter 'conv.weight' is in no unit of fully_shard",
    "then plain": "a pass comes after one of a sharded model",
    "alone": "group= says another thing",
    "factors": "set_gradient_divide_factor gives units of the model other factors",
    "no batch": "rank 1 has no batch, and a sharded model is called on all ranks",
    "products": "a parameter is a DTensor",
}

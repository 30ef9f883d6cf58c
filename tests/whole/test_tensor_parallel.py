"""Models under tensor parallelism: each rank walks with its part of a layer, and results are those
of the whole model on one process, placed as the parameters are; training is bit for bit as without
nnj.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.support.over_ranks import SHARDS
from tests.support.processes import together
from tests.support.same_results import is_row, same_bits, wrong
from tests.support.tensor_parallel import WAYS


def test_results_under_tensor_parallelism_are_those_of_the_whole_model():
    size = 2
    of_ranks = together("tests.support.tensor_parallel:of_several", size=size)
    ranks, said = [found["ways"] for found in of_ranks], []
    for name in WAYS:
        for rank in range(size):
            plain, found, alone = (ranks[rank][name][k] for k in ("plain", "found", "alone"))
            said += [f"{name}, rank {rank}: {w}" for w in wrong(found["results"], alone)]
            said += [
                f"{name}, rank {rank}: {kind} is not bit for bit what it is without nnj"
                for kind in ("grad 0", "grad 1", "state")
                if not same_bits(found[kind], plain[kind])
            ]
            for place, at in found["like"].items():  # also of those that are on all ranks
                if found["placed"][f"ggn_diag {place}"] != at:
                    said.append(f"{name}: ggn_diag of {place} is not placed as it is")
                rows = None if at is None else [a.replace("0", "1") if "S" in a else a for a in at]
                if at == ("S(0)",) and list(found["placed"][f"batch_grad {place}"]) != rows:
                    said.append(f"{name}: batch_grad of {place} is not placed one axis on")
    assert not said, "\n".join(said)
    _check_odd([found["odd"] for found in of_ranks])


def _check_odd(ranks: list[Any]) -> None:
    """Fits, draws, and what is refused."""
    for found in ranks:
        fits, (gathered, read, one, merged, expected), said = found["fitted"]
        assert not list(wrong(*fits))
        assert not [*wrong(gathered, one), *wrong(read, one), *wrong(merged, expected)]
        assert "of which this rank has a part" in said[0] and "a posterior wants whole" in said[1]
        first, *others = found["draws"]
        assert all(torch.equal(first, other) for other in others)
        for name, text in SAID.items():
            assert text in found[name], (name, found[name])


SAID = {
    "gathered outputs": "a DTensor goes in or out where nnj takes none",
    "sequence": "takes part where nnj takes none",
    "products": "a parameter is a DTensor",
    "same group": "group= has ranks that share a model by tensor parallelism",
    "strange": "Say entrywise=False",
}


def test_two_dimensions_of_ranks():
    """Split data and tensor parallelism; and hybrid shards."""
    for found in together("tests.support.tensor_parallel:odd", size=4):
        over, one, mine = found["two dimensions"]
        rows = sum(SHARDS[:mine]), SHARDS[mine]
        one = {k: t.narrow(0, *rows) if is_row(k) else t for k, t in one.items()}
        assert not list(wrong(over, one))
        assert not list(wrong(*found["hybrid"]))

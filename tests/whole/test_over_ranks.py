"""Two and three processes as one: what is collected and fitted over ranks is that of one process
that differentiates the mean of their losses, or reads all of the data.

One test for each group of processes, since these take seconds to start; it lists all that is wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nnj
from tests.support import over_ranks
from tests.support.over_ranks import EVERY, SHARDS, net, share, ways
from tests.support.processes import together
from tests.support.same_results import is_row, same_bits, wrong


@pytest.mark.parametrize("size", [2, 3])
def test_over_ranks_results_are_those_of_one_process(size):
    """Of two processes also what else happens to ranks."""
    found = together("tests.support.over_ranks:of_several", size=size)
    _check_ways(size, [of_rank["ways"] for of_rank in found])
    _check_fits(size, [of_rank["fits"] for of_rank in found])
    if size == 2:
        _check_odd(size, [of_rank["odd"] for of_rank in found])


def _check_ways(size: int, ranks: list[Any]) -> None:
    """Results are those of the mean of the losses, and training is as without nnj."""
    said = []
    for name, way in ways(size).items():
        for rank in range(size):
            plain, found, alone = (ranks[rank][name][k] for k in ("plain", "found", "alone"))
            results, rows = dict(found["results"]), {k: v for k, v in alone.items() if is_row(k)}
            where = f"{name}, rank {rank}"
            mine = 2 * sum(SHARDS[:rank]), 2 * SHARDS[rank]
            expected = {k: v.narrow(0, *mine) if is_row(k) else v for k, v in alone.items()}
            said += [f"{where}: {what}" for what in wrong(results, expected)]
            if "rows" in found:
                every = {
                    key.split()[1]: t for key, t in rows.items() if key.startswith("batch_grad ")
                }
                said += [f"{where}, gathered: {what}" for what in wrong(found["rows"], every)]
            if found["samples"] != 2 * sum(SHARDS[:size]):
                said.append(f"{where}: {found['samples']} samples")
            for kind in ("grad 0", "grad 1", "state"):
                if not same_bits(found[kind], plain[kind]):
                    said.append(f"{where}: {kind} is not bit for bit what it is without nnj")
        first = ranks[0][name]["found"]
        for rank in range(1, size):
            other = ranks[rank][name]["found"]
            if way.group != "no wrapper" and not same_bits(first["state"], other["state"]):
                said.append(f"{name}: replicas differ")
            sums = [
                {k: v for k, v in found["results"].items() if not is_row(k)}
                for found in (first, other)
            ]
            if not same_bits(*sums):
                said.append(f"{name}: results differ between ranks in bits")
    assert not said, "\n".join(said)


def _check_odd(size: int, ranks: list[Any]) -> None:
    """All ranks hear of what one refuses."""
    for rank, found in enumerate(ranks):
        first = found["refused first"]
        assert "passes" in first  # it is raised at the end of the `with`
        assert first["said"].startswith("rank 1: CrossEntropyLoss: the scalar is not linear")
        assert {*first["grad"]} == {name for name, _ in net().named_parameters()}
        assert torch.equal(first["later"], ranks[0]["refused first"]["later"])
        said, trained = found["pipeline"]
        assert ("the model is a stage of torch.distributed" if rank else "no extended loss") in said
        assert trained
        for name, text in SAID.items():
            assert text in found[name], (rank, name, found[name])
    assert ranks[0]["left"].startswith("NNJError: nnj.collect: rank 0 waits")
    assert "rank 1 has left by ValueError: of the user" in ranks[0]["left"]
    assert ranks[1]["left"] == "ValueError: of the user"
    for found in ranks:
        assert not list(wrong(*found["branches"]))
        assert not list(wrong(*found["no rows"]))
    _check_no_data(ranks)
    _check_join(ranks)
    _check_without_wrapper(ranks)
    one, both = ranks[0]["draws"]
    other = 2 * both - one  # of rank 1, had both drawn the same
    assert torch.allclose(one, ranks[1]["draws"][0])
    assert not torch.allclose(one, other, rtol=1e-3) and bool((other >= 0).all())
    for rank, found in enumerate(ranks):  # of its own samples alone
        model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
        with nnj.collect("batch_grad_dot") as context:
            (loss(model(share(rank, 0)[0]), share(rank, 0)[1]) / size).backward()
        assert torch.allclose(found["dot"], context.batch_grad_dot, rtol=1e-10)


SAID = {
    "nowhere": "nothing was collected for ggn_diag",
    "other model": "rank 1 has collected at another model than rank 0",
    "other options": "rank 1 collects other quantities than rank 0, or with other options",
    "other modules": "rank 1 has other modules= than rank 0",
    "hook": "rank 0: the model is under DistributedDataParallel with a communication hook",
    "join by what is left": "rank 0: join(divide_by_initial_world_size=False) divides gradients",
    "mixed": "rank 0: some parameters, or calls of the model, are under DistributedDataParallel",
    "left out": "rank 0: some parameters, or calls of the model, are under Distributed",
    "other numbers": "parameter 'twice.bias' has other numbers on rank 1 than on rank 0",
    "checked": "largest relative error",
    "compiled": "nnj.compile makes a graph of one process",
    "ekfac": "have eigenvectors of their own",
    "no degree": "cubes: Cubes does not say how it grows with the loss",
    "failing": "the quantity 'failing' failed with KeyError",
}


def _check_no_data(ranks: list[Any]) -> None:
    """Rank 0 had no sample, and has the results of rank 1."""
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "kfac"):
        (loss(model(share(1, 0)[0]), share(1, 0)[1]) / 2).backward()
    expected = over_ranks.results(model, ("ggn_diag", "kfac"))
    rows = {name: SHARDS[1] for name, _ in model.named_parameters()}
    for found in ranks:
        facts = {"rows": rows, "samples": SHARDS[1]}
        assert not list(wrong(found["no data"], expected | facts))


def _check_join(ranks: list[Any]) -> None:
    """Rank r had r + 1 batches, and W stays what it was."""
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        for rank in range(2):
            for i in range(rank + 1):
                (loss(model(share(rank, i)[0]), share(rank, i)[1]) / 2).backward()
    for found in ranks:
        assert torch.allclose(found["join"], model.head.weight.ggn_diag, rtol=1e-10)


def _check_without_wrapper(ranks: list[Any]) -> None:
    """Calls beside a wrapper, and replays, in a `with` that says the group."""
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        for rank in range(2):
            (loss(model(share(rank, 0)[0]), share(rank, 0)[1]) / 2).backward()
    once = model.head.weight.ggn_diag
    for found in ranks:
        assert torch.allclose(found["mixed in a group"], 2 * once, rtol=1e-10)
        replays, replayed = found["compiled inside"]
        assert replays > 0 and torch.allclose(replayed, once, rtol=1e-10)


def test_a_rank_that_dies_is_told_of_in_time():
    said, _ = together("tests.support.over_ranks:dying", seconds=60, dies=1)
    assert "rank 0 waits for the others of its group of 2, and not all came" in said


def _check_fits(size: int, ranks: list[Any]) -> None:
    """A fit over ranks is that of all data."""
    every = len(over_ranks.data())
    for rank, found in enumerate(ranks):
        for scale in ("sum", "mean"):
            over, one, rows, runs = found[scale]
            mine = list(range(rank, every, size))
            one = {k: t[mine] if k.startswith("batch_grad ") else t for k, t in one.items()}
            assert not list(wrong(over, one))
            assert rows == len(mine) and runs == ranks[0][scale][3] and len(runs) == 1
        assert not list(wrong(found["empty"], found["empty alone"]))
        over, one = ({k: v[i] for k, v in found["operators"].items()} for i in range(2))
        assert not list(wrong(over, one))
        assert found["apart"] == len(range(rank, every, size))
        assert ("pads its shards" in found["padded"]) == (every % size > 0)
        assert (
            "rank 1: CrossEntropyLoss: the output of the model has entries that are not finite"
            in found["one fails"]
        )
        assert "of a loader" in found["one leaves"]
        assert found["one leaves"].startswith("ValueError" if rank == 1 else "NNJError")
        assert "rank 1 fits" in found["other loss"]
        assert "buffer '0.running_mean' has other numbers on rank 1" in found["other buffers"]
        assert "ranks 0 and 1 have read the same 11 samples" in found["same data"]
        assert "parameter '1.weight' has other numbers on rank 1" in found["other weights"]
        assert "the loader gave no samples" in found["nothing"]


def test_parts_are_merged_without_any_group(tmp_path):
    data = over_ranks.data()
    loss, parts = nn.CrossEntropyLoss(), []
    for i, part in enumerate((range(0, 7), range(7, 7), range(7, 11))):
        batches = [data[list(part)]] if part else []
        if batches:
            nnj.fit(net(), loss, batches, "kfac", "batch_grad", scale="mean").save(
                tmp_path / f"{i}.pt"
            )
            parts.append(nnj.Fit.load(tmp_path / f"{i}.pt"))
    merged = nnj.Fit.merge(parts)
    whole = nnj.fit(net(), loss, [data[:]], "kfac", "batch_grad", scale="mean")
    assert not list(wrong(over_ranks.fitted(merged), over_ranks.fitted(whole)))


def test_two_ranks_of_one_run_are_not_merged():
    fit = nnj.fit(net(), nn.CrossEntropyLoss(), [over_ranks.data()[:]], "ggn_diag")
    fit.runs = ["one"]
    with pytest.raises(nnj.NNJError, match="fits of one run over ranks"):
        nnj.Fit.merge([fit, fit])


def test_a_group_is_one():
    model, loss = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())
    for group in ("world", True, 3):
        with pytest.raises(nnj.NNJError, match="no process group is there"):
            nnj.collect("ggn_diag", group=group)
    with nnj.collect("batch_grad", group=False) as context:
        loss(model(share(0, 0)[0]), share(0, 0)[1]).backward()
    rows = context.gather("batch_grad")  # of this process
    assert {name: len(t) for name, t in rows.items()} == {
        name: SHARDS[0] for name, _ in model.named_parameters()
    }
    with nnj.collect("ggn_diag") as context:
        loss(model(share(0, 0)[0]), share(0, 0)[1]).backward()
    with pytest.raises(nnj.NNJError, match="has no rows of samples"):
        context.gather("ggn_diag")


def test_every_quantity_is_tried():
    assert {*EVERY, "ekfac", "ggn_diag_mc"} >= {
        entry.key for entry in nnj.registry.manager.manager().entries("quantity")
    }

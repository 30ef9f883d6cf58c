"""Two processes: what is collected is that of the loss of each, and they train on as without nnj.

One test for each group of processes, since these take seconds to start; it lists all that is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.data_parallel import STEPS, WAYS, Way, batch, of
from tests.support.oracle import Dense, close, dense
from tests.support.processes import SIZE, together
from tests.support.sharded import CASES, SHARDED, TAKEN


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def halved(z: Tensor, y: Tensor) -> Tensor:
    """The scalar of a step."""
    return 0.5 * nn.functional.cross_entropy(z, y)


def truth(way: Way, rank: int, step: int, state: dict[str, Tensor]) -> Dense:
    """The truth of one step on one rank, by torch.func alone."""
    model, (x, y) = of(way, twin=True), batch(rank, step)
    model.load_state_dict(state)
    return dense(
        model,
        lambda run: [way.pick(run(x), rank)],
        lambda z: halved(z[0], y),
        torch.arange(len(x)).repeat_interleave(3),
    )


def wrong_training(plain: list[Any], collected: list[Any]) -> Iterator[str]:
    """What is not bit for bit what it is without nnj."""
    assert len(plain) == len(collected) == STEPS
    for step, (one, other) in enumerate(zip(plain, collected, strict=True)):
        for kind in ("state", "grad"):
            if one[kind].keys() != other[kind].keys():
                yield f"step {step}: {kind} has other names"
            for key, t in one[kind].items():
                if not same(t, other[kind][key]):
                    yield f"step {step}: {kind} of {key} is another"


def wrong_results(way: Way, rank: int, steps: list[Any]) -> Iterator[str]:
    """What is not that of the loss of a rank."""
    for step, found in enumerate(steps):
        if (step, rank) in way.refused:
            if "not linear in this loss" not in found.get("error", ""):
                yield f"step {step} is not refused: {found.get('error')}"
            continue
        if "error" in found:
            yield f"step {step} is refused: {found['error']}"
            continue
        expected = truth(way, rank, step, found["state"])
        for key, j in expected.jacobian.items():
            diag, shares = found["ggn_diag"][key], found["batch_grad"][key]
            if not j.any():  # the loss of this rank does not reach it
                said = "" if diag is shares is None else "is not None"
            else:
                said = close(diag, expected.diag(key)) or close(shares, expected.batch_grad(key))
            if said:
                yield f"step {step}: {key} {said}"


def wrong_mean(steps: list[list[Any]]) -> Iterator[str]:
    """Where the docstring of collect is wrong about the loss behind the gradients, which is the
    mean over processes.
    """
    batches = [batch(rank, 0) for rank in range(SIZE)]
    expected = dense(
        of(WAYS["plain"]),
        lambda run: [run(x) for x, _ in batches],
        lambda z: sum(halved(o, y) for o, (_, y) in zip(z, batches, strict=True)) / SIZE,
        torch.arange(6 * SIZE).repeat_interleave(3),
    )
    first = [of_rank[0] for of_rank in steps]
    for key, g in first[0]["grad"].items():
        diag = sum(found["ggn_diag"][key] for found in first) / SIZE
        shares = torch.cat([found["batch_grad"][key] for found in first]) / SIZE
        for said in (
            close(diag, expected.diag(key)),
            close(shares, expected.batch_grad(key)),
            close(shares.sum(0), g),
        ):
            if said:
                yield f"{key} {said}"


def test_distributed_data_parallel():
    ranks, wrong = together("tests.support.data_parallel:all_of_it"), list[str]()
    for name, way in WAYS.items():
        for rank in range(SIZE):
            plain, collected = ranks[rank]["ways"][name]
            found = [*wrong_training(plain, collected), *wrong_results(way, rank, collected)]
            if way.products:
                found += [
                    said
                    for one, other in zip(plain, collected, strict=True)
                    if (said := close(other["jacobian"], one["jacobian"]))
                ]
            wrong += [f"{name}, rank {rank}: {said}" for said in found]
        for one, other in zip(*(ranks[rank]["ways"][name][1] for rank in range(SIZE)), strict=True):
            if not all(torch.equal(t, other["state"][key]) for key, t in one["state"].items()):
                wrong.append(f"{name}: replicas differ")
    wrong += wrong_mean([ranks[rank]["ways"]["plain"][1] for rank in range(SIZE)])
    assert not wrong, "\n".join(wrong)
    for of_rank in ranks:
        said = of_rank["refused"]
        assert said["fit"].startswith("parts of the model are under DistributedDataParallel")
        assert "mixed_precision=" in said["mixed_precision"]
        assert "torch.autocast" in said["mixed_precision"]


def test_sharded_and_distributed_models_are_refused_and_train_on():
    ranks, wrong = together("tests.support.sharded:all_ways"), list[str]()
    for way in CASES:
        expected = "is sharded by FSDP 1" if way[1] in SHARDED else "a parameter is a DTensor"
        remedy = "under DistributedDataParallel"
        if way[1] in TAKEN:
            expected = remedy = ""
        for rank in range(SIZE):
            for step, (plain, refused) in enumerate(zip(*ranks[rank][way], strict=True)):
                where = f"{', '.join(way)}, rank {rank}, step {step}"
                if not torch.equal(plain[0], refused[0]):
                    wrong.append(f"{where}: the value is another")
                if all(g is None for g in plain[1]) or not all(map(same, plain[1], refused[1])):
                    wrong.append(f"{where}: gradients are others")
                said = refused[2]
                if bool(said) != bool(expected) or expected not in said or remedy not in said:
                    wrong.append(f"{where}: it says {refused[2]!r}")
    assert not wrong, "\n".join(wrong)


def test_a_process_that_fails_says_why():
    with pytest.raises(AssertionError, match=r"ended with \[[01], 1\](.|\n)*of a test"):
        together("tests.support.over_ranks:failing", seconds=60)


def test_a_process_that_hangs_is_ended():
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ended with \[[^]]*, None\]"):
        together("tests.support.over_ranks:hanging", seconds=4)
    assert time.monotonic() - began < 120

"""Two processes: what is collected is that of the loss of each, and p.grad is that of plain
DistributedDataParallel.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.data_parallel import STEPS, WAYS, Way, batch, of
from tests.support.oracle import Dense, close, dense
from tests.support.processes import SIZE, together
from tests.support.sharded import CASES, SHARDED


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return together("tests.support.data_parallel:all_ways")


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("name", WAYS)
def test_training_goes_on_as_without_nnj(trained, name):
    for rank in range(SIZE):
        plain, collected = trained[rank][name]
        assert len(plain) == len(collected) == STEPS
        for step, (one, other) in enumerate(zip(plain, collected, strict=True)):
            for kind in ("state", "grad"):
                assert one[kind].keys() == other[kind].keys()
                for key, t in one[kind].items():
                    assert same(t, other[kind][key]), f"{kind} of {key}, step {step}, rank {rank}"
    for one, other in zip(trained[0][name][1], trained[1][name][1], strict=True):
        assert all(torch.equal(t, other["state"][k]) for k, t in one["state"].items())


def truth(way: Way, rank: int, step: int, state: dict[str, Tensor]) -> Dense:
    """The truth of one step on one rank, by torch.func alone."""
    model, (x, y) = of(way, twin=True), batch(rank, step)
    model.load_state_dict(state)
    return dense(
        model,
        lambda run: [way.pick(run(x), rank)],
        lambda z: 0.5 * nn.CrossEntropyLoss()(z[0], y),
        torch.arange(len(x)).repeat_interleave(3),
    )


@pytest.mark.parametrize("name", WAYS)
def test_results_are_those_of_the_loss_of_each_process(trained, name):
    way = WAYS[name]
    for rank in range(SIZE):
        for step, found in enumerate(trained[rank][name][1]):
            if (step, rank) in way.refused:
                assert "not linear in this loss" in found["error"]
                continue
            assert "error" not in found, found["error"]
            expected = truth(way, rank, step, found["state"])
            for key, j in expected.jacobian.items():
                if not j.any():  # the loss of this rank does not reach it
                    assert found["ggn_diag"][key] is found["batch_grad"][key] is None
                else:
                    assert close(found["ggn_diag"][key], expected.diag(key)) == ""
                    assert close(found["batch_grad"][key], expected.batch_grad(key)) == ""


def test_the_mean_of_all_processes_is_that_of_the_loss_behind_the_gradients(trained):
    """As the docstring of collect says: of the mean of all losses."""
    way, steps = WAYS["plain"], [trained[rank]["plain"][1] for rank in range(SIZE)]
    batches = [batch(rank, 0) for rank in range(SIZE)]
    expected = dense(
        of(way),
        lambda run: [run(x) for x, _ in batches],
        lambda z: sum(
            0.5 * nn.CrossEntropyLoss()(o, y) / SIZE for o, (_, y) in zip(z, batches, strict=True)
        ),
        torch.arange(6 * SIZE).repeat_interleave(3),
    )
    for key, g in steps[0][0]["grad"].items():
        found = [step[0]["ggn_diag"][key] for step in steps]
        assert close(sum(found) / SIZE, expected.diag(key)) == ""
        shares = torch.cat([step[0]["batch_grad"][key] for step in steps]) / SIZE
        assert close(shares, expected.batch_grad(key)) == ""
        assert close(shares.sum(0), g) == ""


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.products])
def test_products_of_a_model_under_it(trained, name):
    for rank in range(SIZE):
        for one, other in zip(*trained[rank][name], strict=True):
            assert close(other["jacobian"], one["jacobian"]) == ""


@pytest.fixture(scope="module")
def sharded() -> list[dict[Any, Any]]:
    return together("tests.support.sharded:all_ways")


@pytest.mark.parametrize("way", CASES, ids=" ".join)
def test_a_sharded_or_distributed_model_is_refused_and_trains_on(sharded, way):
    for rank in range(SIZE):
        for plain, refused in zip(*sharded[rank][way], strict=True):
            assert torch.equal(plain[0], refused[0])
            assert any(g is not None for g in plain[1])
            assert all(same(g, h) for g, h in zip(plain[1], refused[1], strict=True))
            assert re.search(
                r"is sharded by FSDP" if way[1] in SHARDED else r"^a parameter is a DTensor",
                refused[2],
            )
            assert "under DistributedDataParallel" in refused[2]


def test_what_is_refused():
    for said in together("tests.support.data_parallel:refused"):
        assert said["fit"].startswith("the model is under DistributedDataParallel")
        assert "model.module" in said["fit"]
        assert "mixed_precision=" in said["mixed_precision"]
        assert "torch.autocast" in said["mixed_precision"]

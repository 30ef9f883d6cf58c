"""When an error of a backward pass is raised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.collecting.accumulate import Accumulator
from nnj.collecting.passes import LAPS
from tests.support.collecting import X, Y, pair

queue = torch.autograd.Variable._execution_engine.queue_callback


@pytest.mark.parametrize("depth", [1, 2, 4, LAPS + 1])
def test_what_others_have_queued_is_done_before(depth):
    """As DDP does it: a hook queues what queues what writes p.grad."""
    model, loss = pair()
    done: list[int] = []

    def again(left: int) -> None:
        done.append(left)
        if left > 1:
            queue(lambda: again(left - 1))

    p = next(model.parameters())
    p.register_post_accumulate_grad_hook(lambda p: queue(lambda: again(depth)))
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag"):
        with pytest.raises(nnj.NNJError, match="not linear in this loss"):
            value.exp().backward()
    assert done == [*range(depth, 0, -1)]


def test_an_error_in_adding_up_waits_too(monkeypatch):
    model, loss = pair()
    done: list[int] = []
    p = next(model.parameters())
    p.register_post_accumulate_grad_hook(lambda p: queue(lambda: done.append(1)))

    def add_pass(self, contributions):
        raise ValueError("no sum")

    monkeypatch.setattr(Accumulator, "add_pass", add_pass)
    with nnj.collect("ggn_diag"):
        with pytest.raises(ValueError, match="no sum"):
            loss(model(X), Y).backward()
    assert done == [1]
    plain = nn.CrossEntropyLoss()(model(X), Y)
    for p, g in zip(
        model.parameters(), torch.autograd.grad(plain, list(model.parameters())), strict=True
    ):
        assert torch.equal(p.grad, g)

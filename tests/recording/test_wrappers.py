"""Engines that nnj cannot follow are known by their names, without being imported, and refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import nnj
from nnj.testing import check_model

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(4) % 2
ENGINE = """
from torch import nn

class DeepSpeedEngine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)

class PipelineEngine(DeepSpeedEngine):
    pass
"""


@pytest.fixture
def deepspeed(monkeypatch):
    """A module with engines of the names of DeepSpeed's."""
    found = types.ModuleType("deepspeed.runtime.engine")
    exec(ENGINE, vars(found))
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    return found


def linear() -> nn.Module:
    return nn.Linear(3, 2).double()


@pytest.mark.parametrize("kind", ["DeepSpeedEngine", "PipelineEngine"])
def test_an_engine_of_deepspeed_is_refused_by_its_class(deepspeed, kind):
    engine, loss = getattr(deepspeed, kind)(linear()), nn.CrossEntropyLoss()
    for ask in (
        lambda: nnj.extend(engine),
        lambda: nnj.fit(engine, loss, [(X, Y)], "ggn_diag"),
        lambda: nnj.compile(engine, loss, "ggn_diag"),
    ):
        with pytest.raises(nnj.NNJError, match="runs in an engine of DeepSpeed, which"):
            ask()


@pytest.mark.parametrize("make", [linear, lambda: nn.Sequential(linear(), nn.Tanh())])
def test_a_model_that_an_engine_calls_is_refused_and_trains_on(deepspeed, make):
    model, loss = nnj.extend(make()), nnj.extend(nn.CrossEntropyLoss())
    engine, passes = deepspeed.DeepSpeedEngine(model), 0
    with pytest.raises(nnj.NNJError, match="runs in an engine of DeepSpeed, which"):
        with nnj.collect("ggn_diag"):
            for _ in range(2):  # other ranks wait for both
                loss(engine(X), Y).backward()
                passes += 1
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    with nnj.collect("ggn_diag"):  # without it
        (2 * loss(model(X), Y)).backward()
    assert passes == 2
    assert all(torch.allclose(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


def test_a_class_of_flat_parameters_is_refused_before_anything_is_read():
    class FullyShardedDataParallel(nn.Linear):
        pass

    model, loss = nn.Sequential(FullyShardedDataParallel(3, 2)).double(), nn.CrossEntropyLoss()
    for ask in (
        lambda: nnj.fit(model, loss, None, "ggn_diag"),
        lambda: nnj.compile(model, loss, "ggn_diag"),
        lambda: nnj.GGN(model, loss, None),
        lambda: nnj.HessianOperator(model, loss, None),
        lambda: check_model(model, loss, X, Y),
    ):
        with pytest.raises(nnj.NNJError, match="is sharded by FSDP 1 .*fully_shard, or collect"):
            ask()

"""Every plain value in the attributes of modules is a guard, every tensor an input."""

from __future__ import annotations

import functools
import math
import types

import numpy as np
import pytest
import torch
from torch import nn

import nnj
from nnj.compiling.guards import State


class Part(nn.Module):
    """Something of each kind in its attributes."""

    slope = 2.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.mask = torch.ones(2)
        self.temperature, self.steps, self.mode, self.absent = 1.0, 3, "sum", None
        self.sizes, self.table, self.names = [1, [2, 3]], {"a": 1}, {"x"}
        self.config = types.SimpleNamespace(scale=1.0, inner=types.SimpleNamespace(depth=2))
        self.activation = torch.relu
        self.scaled = functools.partial(torch.mul, other=2.0)
        self.numbers = np.ones(2)
        self.kept = [torch.zeros(2)]

    def forward(self, x):
        return x * self.weight


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()
        self.hidden = [Part()]  # no part for torch


def read(*modules, **options):
    state = State(modules, **options)
    state.finish()
    return state


CHANGES = {
    "float": lambda p: setattr(p, "temperature", 0.1),
    "sign of zero": lambda p: setattr(p, "absent", -0.0),
    "int to float": lambda p: setattr(p, "steps", 3.0),
    "int to bool": lambda p: setattr(p, "steps", True),
    "str": lambda p: setattr(p, "mode", "mean"),
    "list inside a list": lambda p: p.sizes[1].append(4),
    "dict": lambda p: p.table.update(a=2),
    "set": lambda p: p.names.add("y"),
    "configuration": lambda p: setattr(p.config, "scale", 2.0),
    "configuration inside": lambda p: setattr(p.config.inner, "depth", 3),
    "function": lambda p: setattr(p, "activation", torch.tanh),
    "partial": lambda p: p.scaled.keywords.update(other=3.0),
    "numpy": lambda p: p.numbers.__setitem__(0, 5.0),
    "mode": lambda p: p.eval(),
    "new": lambda p: setattr(p, "another", 1),
    "gone": lambda p: delattr(p, "mode"),
    "tensor to number": lambda p: setattr(p, "mask", 1.0),
    "frozen": lambda p: p.weight.requires_grad_(False),
    "dtype": lambda p: p.to(torch.float64),
    "shape": lambda p: setattr(p, "mask", torch.ones(3)),
    "strides": lambda p: setattr(p, "kept", [torch.zeros(2, 2).t()[0]]),
    "one tensor in two places": lambda p: setattr(p, "mask", p.mean),
    "a hook": lambda p: p.register_forward_hook(lambda *args: None),
    "a hook on a parameter": lambda p: p.weight.register_hook(lambda g: None),
    "forward": lambda p: setattr(p, "forward", lambda x: x),
    "part": lambda p: p.add_module("more", nn.ReLU()),
}


@pytest.mark.parametrize("where", ["part", "hidden"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what, where):
    whole = Whole()
    state = read(whole)
    assert state.refused is None
    assert state.now() is not None
    CHANGES[what](whole.part if where == "part" else whole.hidden[0])
    assert state.now() is None


def test_values_of_tensors_and_other_tensors_are_no_change():
    whole = Whole()
    state, part = read(whole), whole.part
    with torch.no_grad():
        part.weight.add_(1)
    part.mask = torch.full((2,), 7.0)
    part.kept[0] = torch.full((2,), 8.0)
    whole.load_state_dict({k: v + 1 for k, v in whole.state_dict().items()}, assign=True)
    now = state.now()
    assert now is not None
    assert any(t is part.weight for t in now)
    assert any(t is part.mask for t in now) and any(t is part.kept[0] for t in now)
    part.temperature = float("1.0")  # an equal one
    assert state.now() is not None


def test_a_value_of_the_class_is_one_of_its_modules(monkeypatch):
    state = read(Whole())
    monkeypatch.setattr(Part, "slope", 3.0)
    assert state.now() is None


def test_a_forward_of_torchs_that_is_replaced(monkeypatch):
    state = read(nn.Linear(2, 2))
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: x)
    assert state.now() is None


def test_nan_is_itself_and_results_are_ignored():
    m = nn.Linear(2, 2)
    m.limit = math.nan
    state = read(m, ignored=("ggn_block",))
    m.ggn_block = torch.ones(1)
    assert state.now() is not None
    m.limit = 1.0
    assert state.now() is None


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.register_forward_hook(lambda *args: None), "has a hook"),
        (lambda m: m.register_full_backward_hook(lambda *args: None), "has a hook"),
        (lambda m: m.weight.register_hook(lambda g: g), "has a hook"),
        (lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None), "has a hook"),
        (lambda m: setattr(m, "kept", m.weight * 2), "was computed before"),
        (lambda m: m.add_module("part", torch.jit.script(nn.ReLU())), "scripted"),
        (lambda m: setattr(m, "kept", torch.eye(2).to_sparse()), "layout"),
        (lambda m: setattr(m, "kept", m.__dict__.setdefault("nest", nested(20))), "in containers"),
    ],
)
def test_what_no_graph_could_stand_for_is_refused(change, said):
    m = nn.Linear(2, 2)
    change(m)
    assert said in read(m).refused


def nested(depth):
    return [nested(depth - 1)] if depth else []


def test_own_hooks_are_none():
    m = nnj.extend(nn.Linear(2, 2))
    assert "hook" in read(m).refused
    assert read(m, is_own=lambda hook: True).refused is None


def test_the_difference_is_named():
    whole = Whole()
    state = State([whole])
    state.finish()
    tensors = state.tensors
    assert state.difference(tensors) is None
    whole.part.steps = 4
    assert state.difference(tensors).endswith("steps")
    whole.part.steps = 3
    whole.part.mask = torch.ones(2)
    assert state.difference(tensors).endswith("mask")

"""What plugins may claim, and who wins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.registry.manager import PluginManager
from tests.support.distributions import Plugin, load, refusal


def test_a_conflict(fakes):
    fakes.claim("nnj", version="1.0", entries={"nnj-linear": "nnj_fake"})
    fakes.claim("nnj-rival")
    assert refusal() == (
        "torch.nn.Linear is claimed twice: by 'nnj-linear' (nnj 1.0) and by 'nnj-rival' (nnj-rival "
        "0.1). Disable one of them with NNJ_DISABLED_PLUGINS=nnj-linear or "
        "NNJ_DISABLED_PLUGINS=nnj-rival. A plugin that means to take over a class registers with "
        "replace=True"
    )


@pytest.mark.parametrize("name", ["nnj-a", "nnj-z"], ids=["loaded first", "loaded last"])
def test_a_replacement_wins(fakes, name):
    fakes.claim("nnj-linear")
    fakes.claim(name, more=", replace=True")
    assert load().find("layer", nn.Linear).source.plugin == name


@pytest.mark.parametrize("name", ["nnj-a", "nnj-m", "nnj-z"])
def test_a_replacement_settles_the_conflict_of_two_others(fakes, name):
    fakes.claim("nnj-l")
    fakes.claim("nnj-n")
    fakes.claim(name, more=", replace=True")
    assert load().find("layer", nn.Linear).source.plugin == name


def test_two_replacements(fakes):
    for name in ("nnj-a", "nnj-b", "nnj-c"):
        fakes.claim(name, more=", replace=True" if name != "nnj-b" else "")
    assert refusal() == (
        "torch.nn.Linear is replaced twice: by 'nnj-a' (nnj-a 0.1) and by 'nnj-c' (nnj-c 0.1). "
        "Disable one of them with NNJ_DISABLED_PLUGINS=nnj-a or NNJ_DISABLED_PLUGINS=nnj-c"
    )


def test_nothing_is_kept_of_a_plugin_that_is_refused():
    manager = PluginManager(load=False)
    manager.register(Plugin(lambda register: register(nn.Linear, print)), "first")
    with pytest.raises(
        nnj.PluginError,
        match=r"^torch\.nn\.Linear is claimed twice: by 'first' and by 'second'\. A plugin",
    ):
        manager.register(
            Plugin(lambda register: (register(nn.ReLU, print), register(nn.Linear, print))),
            "second",
        )
    assert [entry.key for entry in manager.entries("layer")] == [nn.Linear]


def test_one_class_may_be_a_layer_and_a_loss():
    manager = PluginManager(load=False)
    manager.register(
        Plugin(
            lambda register: register(nn.MSELoss, print),
            losses=lambda register: register(nn.MSELoss, repr),
        )
    )
    assert manager.find("layer", nn.MSELoss).rule is print
    assert manager.find("loss", nn.MSELoss).rule is repr


class OfModules(nnj.Quantity):
    def module(self, factors, params):
        return torch.zeros(1)


@pytest.mark.parametrize(
    "plugin, message",
    [
        (
            Plugin(lambda register: register("relu", print)),
            "registers the layer relu, but it is not a class",
        ),
        (
            Plugin(losses=lambda register: register(len, print)),
            "registers the loss <built-in function len>, but it is not a class",
        ),
        (
            Plugin(quantities=lambda register: register("ggn diag", print)),
            "registers the quantity ggn diag, but its name is not an identifier",
        ),
        (
            Plugin(quantities=lambda register: register(nn.ReLU, print)),
            "registers the quantity torch.nn.ReLU, but its name is not an identifier",
        ),
        (
            Plugin(lambda register: register(nn.ReLU, 1)),
            "registers the layer torch.nn.ReLU, but its rule 1 cannot be called",
        ),
        (
            Plugin(lambda register: register(nn.ReLU, print, uses="z")),
            "registers the layer torch.nn.ReLU, but uses='z', expected 'x', 'y', 'xy' or ''",
        ),
        (
            Plugin(lambda register: register(nn.ReLU, print, node=nn.ReLU)),
            "registers the layer torch.nn.ReLU, but "
            "node=<class 'torch.nn.modules.activation.ReLU'>, "
            "expected the name of a node of autograd",
        ),
        (
            Plugin(losses=lambda register: register(nn.MSELoss, print, reference=3)),
            "registers the loss torch.nn.MSELoss, but when=None and reference=3 must be callable",
        ),
        (
            Plugin(lambda register: register(object, print)),
            "registers the layer builtins.object, but every class is one",
        ),
        (
            Plugin(quantities=lambda register: register("grad", print)),
            "registers the quantity grad, but each nn.Parameter has an attribute of that name",
        ),
        (
            Plugin(quantities=lambda register: register("forward", OfModules)),
            "registers the quantity forward, but each nn.Module has an attribute of that name",
        ),
    ],
    ids=[
        "layer",
        "loss",
        "name",
        "quantity",
        "rule",
        "uses",
        "node",
        "reference",
        "object",
        "of parameters",
        "of modules",
    ],
)
def test_a_claim_that_makes_no_sense(plugin, message):
    with pytest.raises(nnj.PluginError) as caught:
        PluginManager(load=False).register(plugin, "mine")
    assert str(caught.value) == f"plugin 'mine' {message}."


def test_half_a_jacobian():
    for body in ({}, {"vjp": lambda self, u: u}, {"jvp": lambda self, v: v}):
        with pytest.raises(TypeError, match=r"^Half must define dense, or both jvp and vjp$"):
            type("Half", (nnj.Jacobian,), body)
    type("Whole", (nnj.Jacobian,), {"dense": lambda self: None})
    type("Both", (nnj.Jacobian,), {"jvp": lambda self, v: v, "vjp": lambda self, u: u})

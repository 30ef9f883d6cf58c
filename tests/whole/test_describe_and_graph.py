"""What `python -m nnj` says of each module is what the graph of a backward pass does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nnj
from nnj.errors import NNJError
from nnj.graph.builder import Graph
from nnj.recording.records import edge_of, tensors
from nnj.testing.describe import AUTOGRAD, Line, call_with, lines
from tests.support.cases import CASES, EITHER
from tests.support.oracle import build, data_of, losses_of, run


class Own(nn.Module):
    """The fallback's: a computed weight, and parts without parameters."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.w, self.parts = nn.Parameter(torch.eye(4) + 0.1), nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x @ self.w.softmax(0))


class Centred(Own):
    """No row is a function of its own input alone: autograd's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Twice(nn.Module):
    """Calls a layer once as it is, and once with its input overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.linear = nn.GELU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        y = self.act(z)
        z.detach().add_(1)
        return self.act(y)


def pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    own = layer.forward
    layer.forward = lambda x: own(x).sin()
    return layer


def hooked(before: bool) -> nn.Module:
    layer = nn.Linear(4, 4)
    if before:
        layer.register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    else:
        layer.register_forward_hook(lambda m, args, y: 2 * y)
    return layer


def images(*shape: int) -> Tensor:
    return torch.randn(3, *shape)


MODELS: dict[str, tuple[Any, Any]] = {
    "max pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Unflatten(1, (3, 4)),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        lambda: images(2, 10, 10),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(16, 2)),
        lambda: images(1, 5, 5, 5),
    ),
    "batch norm in eval": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(),
        lambda: images(4),
    ),
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        lambda: images(4),
    ),
    "one layer each": (
        lambda: nn.Sequential(
            nn.Linear(4, 4),
            pruned(),
            replaced(),
            hooked(True),
            hooked(False),
            parametrizations.weight_norm(nn.Linear(4, 4), dim=None),
            nn.SiLU(inplace=True),
            nn.ReLU(inplace=True),
            nn.Identity(),
            nn.Dropout(0.5),
            nn.Dropout(0.0).eval(),
            nn.Linear(4, 4).requires_grad_(False),
        ),
        lambda: images(4),
    ),
    "the fallback": (
        lambda: nn.Sequential(
            Own(nn.Tanh(), nn.GELU()),
            nn.Sequential(Own(nn.Tanh())),
            Centred(nn.Tanh()),
            Centred(nn.Tanh(), nn.Flatten(), nn.Identity()),
            Own(nn.Linear(4, 4), nn.Tanh()),
        ),
        lambda: images(4),
    ),
    "the whole model is the fallback's": (lambda: Own(nn.Tanh()), lambda: images(4)),
    "called twice": (Twice, lambda: images(4)),
}


def first_call(name: str) -> tuple[nn.Module, Any]:
    """A model, and the arguments of its first call."""
    if name in MODELS:
        torch.manual_seed(0)
        make, data = MODELS[name]
        return make(), data()
    case = CASES[name] if name in CASES else EITHER[name]
    model, seen = build(case), []

    def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(m.forward).bind(*args, **kwargs)
        seen.append(bound.arguments if args and kwargs else kwargs or args)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    run(case, model, losses_of(case))
    handle.remove()
    return build(case), seen[0] if seen else data_of(case)[:1]


def edges(model: nn.Module, x: Any) -> tuple[dict[nn.Module, list[Any]], list[Any]]:
    """The edge of what each module's forward gave, and those of the model's outputs; then the
    model is extended.
    """
    found: dict[nn.Module, list[Any]] = {}
    handles = [
        m.register_forward_hook(
            lambda m, args, y: found.setdefault(m, []).extend(
                [edge_of(y)] if isinstance(y, Tensor) and y.grad_fn is not None else []
            ),
            prepend=True,
        )
        for m in model.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    nnj.extend(model)
    torch.manual_seed(0)
    y = call_with(model, x)
    for handle in handles:
        handle.remove()
    y = vars(y) if isinstance(y, SimpleNamespace) else y
    return found, [edge for t in tensors(y) if (edge := edge_of(t)) is not None]


def differences(model: nn.Module, said: list[Line], x: Any) -> Iterator[str]:
    """What the graph of a call does otherwise than was said."""
    paths = {module: path for path, module in model.named_modules()}
    made, roots = edges(model, x)
    refused = any(line.rule == "refused" for line in said)
    try:
        graph = Graph(roots, lambda p: True, paths)
    except NNJError:
        if not refused:
            yield "the graph refuses a layer"
        return
    if refused:
        yield "the graph refuses nothing"
    at = {edge: step for step in graph.steps for edge in step.into}
    for line in said:
        module = model.get_submodule(line.path)
        by_rule = [s for s in graph.steps if s.record is not None and s.record.module is module]
        reached = [at[edge] for edge in made.get(module, []) if edge in at]
        by_nodes = [step for step in reached if step.record is None]
        if line.rule in (AUTOGRAD, "loss") or not line.plugin:
            wrong = bool(by_rule)
        elif "declined in" in line.note:
            wrong = not (by_rule and by_nodes)
        elif line.note:  # not called, or nothing to be differentiated
            wrong = bool(by_rule)
        else:
            wrong = bool(by_nodes) or bool(reached) != bool(by_rule)
        if line.note.startswith("inside of"):
            wrong = wrong or bool(by_nodes)
        if wrong:
            yield f"{line}: {len(by_rule)} by the rule, {by_nodes} by nodes"


@pytest.mark.parametrize("name", [*MODELS, *CASES, *EITHER])
def test_the_graph_does_what_was_said(name):
    model, x = first_call(name)
    torch.manual_seed(0)
    said = lines(model, x)
    assert list(differences(model, said, x)) == []


def said_of(name: str) -> dict[str, tuple[str, str]]:
    return {line.path: (line.rule, line.note) for line in lines(*first_call(name))}


def test_what_is_said_of_max_pools():
    """A pooling on images is autograd's, whose node has saved the indices; others have a rule."""
    found, by_node = said_of("max pools"), "declined: autograd's node has saved what its rule"
    assert found["2"][0] == AUTOGRAD and found["2"][1].startswith(by_node)
    assert found["6"] == ("max_pool", "")
    assert said_of("volumes")["1"] == ("max_pool", "")
    model, _ = first_call("max pools")
    uncalled = {line.path: (line.rule, line.note) for line in lines(model)}
    assert uncalled["2"] == (
        AUTOGRAD,
        by_node.removeprefix("declined: ") + " would have to find again",
    )
    assert uncalled["6"] == ("max_pool", "")


def test_what_is_said_of_parts_of_a_layer():
    found = said_of("the fallback")
    inside = ("", "inside of '0', whose rule speaks for it")
    assert found["0"] == ("fallback", "") and found["0.parts.0"] == found["0.parts.1"] == inside
    assert found["2"][0] == AUTOGRAD and found["2.parts.0"][0] == AUTOGRAD
    assert found["4"][0] == AUTOGRAD and found["4.parts.0"] == ("linear", "")


def test_what_is_said_of_a_layer_that_is_called_twice():
    reason = "declined in 1 of 2 calls: what its rule reads was written over in place"
    assert said_of("called twice")["act"] == ("from_x", reason)

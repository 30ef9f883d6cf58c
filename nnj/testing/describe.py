"""Which rule each module of a model gets, before anything is collected: where time will go, and
what will be refused.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.graph.acceptance import confirmed, working_point
from nnj.recording.extend import temporarily_extended
from nnj.recording.module_hook import is_leaf_layer
from nnj.recording.records import Record, tensors
from nnj.registry.claim import Entry
from nnj.registry.layer_rules import ask_rule, find_rule, undescribed
from nnj.registry.loss_rules import is_loss
from nnj.registry.manager import manager

AUTOGRAD = "autograd"


@dataclass
class Line:
    """One module: its path and class, the rule that it gets with the plugin, and what is to be said
    of it.
    """

    path: str
    kind: str
    rule: str
    plugin: str
    note: str = ""


@dataclass
class _Call:
    x: Any
    y: Any
    node: Any
    number: int


def load(spec: str) -> tuple[nn.Module, Any]:
    """The model behind `module:callable`, and its input if the callable gives (model, input); else
    None.

    Errors: `NNJError` if there is no such thing, or it is no model.
    """
    where, _, name = spec.partition(":")
    if not where or not name:
        raise NNJError(f"MODEL is 'module:callable', not {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise NNJError(f"{spec} is not there: {error}") from error
    made: Any = found if isinstance(found, nn.Module) or not callable(found) else found()
    model, x = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise NNJError(
            f"{spec} gives {type(model).__name__}, expected a torch.nn.Module, or a tuple of it "
            "and its input"
        )
    return model, x


def lines(model: nn.Module, x: Any = None) -> list[Line]:
    """A line for each module of a model, in the order of `named_modules`.

    Args:
        model: it is not changed, but for what a call of it changes.
        x: an input, or a tuple of its arguments, or a dict of them by name: the model is called
            once, and each rule is asked what it says of its call.

    Errors: what the model raises; `PluginError` for a rule that is broken.
    """
    calls = None if x is None else _calls(model, x)
    return [
        _line(path, module, None if calls is None else calls.get(id(module), []))
        for path, module in model.named_modules()
    ]


def call_with(model: Callable[..., Any], x: Any) -> Any:
    """The model at an input, a tuple of arguments, or a dict of named ones."""
    return (
        model(**x)
        if isinstance(x, dict)
        else model(*x)
        if isinstance(x, (tuple, list))
        else model(x)
    )


def _calls(model: nn.Module, x: Any) -> dict[int, list[_Call]]:
    """The calls of all modules in one forward pass, by the module's id."""
    found: dict[int, list[_Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        given = [*args, *kwargs.values()]
        one = isinstance(y, Tensor) and len(given) == 1 and isinstance(given[0], Tensor)
        node, number = (y.grad_fn, y.output_nr) if isinstance(y, Tensor) else (None, 0)
        found.setdefault(id(module), []).append(
            _Call(given[0] if one else given, y if one else tensors(y), node, number)
        )

    with temporarily_extended(model), torch.enable_grad():
        handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
        try:
            call_with(model, x)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _line(path: str, module: nn.Module, calls: list[_Call] | None) -> Line:
    kind = type(module).__name__
    if is_loss(module):
        return Line(path, kind, "loss", "", "")
    entry = find_rule(module)
    if type(module).forward is nn.Module.forward:
        return Line(path, kind, "", "", "container")
    if entry is None or (entry.key is nn.Module and not is_leaf_layer(module)):
        return Line(path, kind, AUTOGRAD, "", _by_autograd(module, calls))
    rule, plugin = rule_name(entry.rule), entry.source.plugin
    if calls is None:
        return Line(
            path,
            kind,
            rule,
            plugin,
            "if it takes one tensor and gives one" if entry.key is nn.Module else "",
        )
    if not calls:
        return Line(path, kind, rule, plugin, "not called")
    said = [_said(path, module, entry, call) for call in calls]
    refused = next((text for taken, text in said if not taken and text.startswith("refused")), None)
    declined = next((text for taken, text in said if not taken), None)
    if refused is None and declined is None:
        return Line(path, kind, rule, plugin, next((text for _, text in said if text), ""))
    return Line(
        path,
        kind,
        "refused" if refused else AUTOGRAD,
        "" if refused is None else plugin,
        refused or declined or "",
    )


def _by_autograd(module: nn.Module, calls: list[_Call] | None) -> str:
    """What is to be said of a module without a rule."""
    entry = manager().find("layer", type(module))
    reason = "no plugin knows it" if entry is None else undescribed(entry, module)
    bare = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    parts = [reason] if reason else ["container"] if any(True for _ in module.children()) else []
    parts += [f"bare parameters: {', '.join(bare)}"] if bare else []
    parts += ["not called"] if calls == [] else []
    return "; ".join(parts or ["no plugin knows it"])


def _said(path: str, module: nn.Module, entry: Entry, call: _Call) -> tuple[bool, str]:
    """Whether a rule is taken for a call, and what is to be said of it."""
    if not isinstance(call.y, Tensor):
        return False, "declined: it takes or gives several tensors"
    record = None if call.node is None else Record.of(call.node, call.number)
    if call.node is None or (record is None and call.y is call.x):
        return True, "nothing to be differentiated"
    if record is None:
        return (
            False,
            "declined: a hook, or the shapes of its input and output, hide what its rows are",
        )
    point = None if record.stale else working_point(record)
    if point is None:
        why = (
            "what its rule reads was written over in place"
            if record.stale
            else "its parameters are narrower than its tensors"
        )
        return False, f"declined: {why}"
    try:
        slots = ask_rule(entry, module, *point, path)
    except NNJError as error:
        return False, f"refused: {error}"
    if isinstance(slots, str):
        return False, f"declined: {slots}"
    if entry.key is nn.Module and not confirmed(call.node, record, slots, point[1]):
        return False, "declined: for each sample alone it is not what autograd says"
    return True, ""


def text(found: Iterable[Line]) -> str:
    """Lines as a table."""
    rows = [("module", "class", "rule", "plugin", "note")]
    rows += [
        (line.path or "(model)", line.kind, line.rule, line.plugin, line.note) for line in found
    ]
    return columns(rows, widths_of(rows))


def rule_name(rule: Callable[..., Any]) -> str:
    """The name of a rule; one that a function has made goes by the name of that function."""
    while isinstance(rule, functools.partial):
        rule = rule.func
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return name.split(".<locals>")[0]


def widths_of(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column."""
    return [max(map(len, cells)) for cells in zip(*rows, strict=True)]


def columns(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Rows of cells as text, the first one underlined."""
    show = lambda row: "  ".join(
        cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    return "\n".join(
        [show(rows[0]), "  ".join("-" * width for width in widths), *map(show, rows[1:])]
    )

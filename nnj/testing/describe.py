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
from nnj.graph.acceptance import BY_NODE, Accepted, accept
from nnj.recording.extend import register_after_ours, temporarily_extended
from nnj.recording.module_hook import is_leaf_layer
from nnj.recording.records import Record, tensors
from nnj.registry.claim import Entry
from nnj.registry.layer_rules import Declined, find_rule, undescribed
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


Answer = Accepted | Declined | NNJError | None  # the error of a rule that refuses the call


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Attributes:
        around: the calls inside of which it was made, outermost first.
        paths: the names of all modules.
        x, y: what it took and gave: one tensor, or a list of tensors.
        node, number: that of autograd which made y, and which of its outputs y is.
    """

    module: nn.Module
    around: list[_Call]
    paths: dict[nn.Module, str]
    x: Any = None
    y: Any = None
    node: Any = None
    number: int = 0

    @functools.cached_property
    def answer(self) -> Answer:
        """Who speaks for the call; None if nothing is differentiated."""
        if not isinstance(self.y, Tensor):
            return Declined("it takes or gives several tensors")
        record = None if self.node is None else Record.of(self.node, self.number)
        if record is not None and not record.by_rows:
            record = None
        own = record is not None and record.module is self.module
        if self.node is None or (self.y is self.x and not own):
            return None
        if record is not None and not own:
            return Declined("its output is that of a layer around it, for which autograd speaks")
        try:
            return accept(self.node, self.number, self.paths)
        except NNJError as error:
            return error

    @property
    def outer(self) -> nn.Module | None:
        """A module around this one whose rule speaks for all that was computed inside of it."""
        for call in self.around:
            if isinstance(call.answer, Accepted):
                return call.module
        return None


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
    paths = {module: path for path, module in model.named_modules()}
    calls = None if x is None else _calls(model, x, paths)
    return [
        _line(path, module, None if calls is None else calls.get(module, []))
        for module, path in paths.items()
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


def _calls(model: nn.Module, x: Any, paths: dict[nn.Module, str]) -> dict[nn.Module, list[_Call]]:
    """The calls of all modules in one forward pass."""
    found: dict[nn.Module, list[_Call]] = {}
    running: list[_Call] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(_Call(module, list(running), paths))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        call, given = running.pop(), [*args, *kwargs.values()]
        one = isinstance(y, Tensor) and len(given) == 1 and isinstance(given[0], Tensor)
        call.x, call.y = (given[0], y) if one else (given, tensors(y))
        if isinstance(y, Tensor):
            call.node, call.number = y.grad_fn, y.output_nr
        found.setdefault(module, []).append(call)

    with temporarily_extended(model), torch.enable_grad():
        handles: list[Any] = []
        for m in model.modules():
            if not isinstance(m, torch.jit.ScriptModule):
                handles.append(m.register_forward_pre_hook(begin, prepend=True))
                handles.append(register_after_ours(m, end))
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
    if isinstance(module, torch.jit.ScriptModule):
        return Line(path, kind, AUTOGRAD, "", "scripted: it has no calls of layers to hook")
    if type(module).forward is nn.Module.forward:
        return Line(path, kind, "", "", "container")
    if calls:
        first, calls = calls[0], [call for call in calls if call.outer is None]
        if first.outer is not None and not calls:
            name = first.paths[first.outer] or type(first.outer).__name__
            return Line(path, kind, "", "", f"inside of '{name}', whose rule speaks for it")
    entry = find_rule(module)
    if entry is None or (entry.is_fallback and not is_leaf_layer(module)):
        return Line(path, kind, AUTOGRAD, "", _by_autograd(module, calls))
    answers = None if calls is None else [call.answer for call in calls]
    return _by_rule(path, kind, entry, answers)


def _by_rule(path: str, kind: str, entry: Entry, answers: list[Answer] | None) -> Line:
    """The line of a module with a rule, with what is said of each of its calls."""
    rule, plugin, note = rule_name(entry.rule), entry.source.plugin, ""
    if answers is None and entry.node:
        return Line(path, kind, AUTOGRAD, "", BY_NODE)
    if answers is None:
        note = (
            "if it takes one tensor, gives one, and its weights are computed"
            if entry.is_fallback
            else ""
        )
    elif not answers:
        note = "not called"
    else:
        for answer in answers:
            if isinstance(answer, NNJError):
                return Line(path, kind, "refused", plugin, f"refused: {answer}")
        declined = [answer for answer in answers if isinstance(answer, Declined)]
        if declined and not any(isinstance(answer, Accepted) for answer in answers):
            return Line(path, kind, AUTOGRAD, "", f"declined: {declined[0].reason}")
        if declined:
            note = f"declined in {len(declined)} of {len(answers)} calls: {declined[0].reason}"
        elif None in answers:
            note = "nothing to be differentiated"
    return Line(path, kind, rule, plugin, note)


def _by_autograd(module: nn.Module, calls: list[_Call] | None) -> str:
    """What is to be said of a module without a rule."""
    entry = manager().find("layer", type(module))
    known = Declined("no plugin knows it") if entry is None else undescribed(entry, module)
    bare = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    holds = any(True for _ in module.children())
    parts = [known.reason] if known else ["container"] if holds else []
    parts += [f"bare parameters: {', '.join(bare)}"] if bare else []
    parts += ["not called"] if calls == [] else []
    return "; ".join(parts or ["no plugin knows it"])


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

    def show(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip()

    return "\n".join(
        [show(rows[0]), "  ".join("-" * width for width in widths), *map(show, rows[1:])]
    )

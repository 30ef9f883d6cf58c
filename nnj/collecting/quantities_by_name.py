"""Quantities by the names under which results stand: installed ones with their options, and those
that are given themselves.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nnj.collecting.quantity import Quantity, Whole, named
from nnj.errors import NNJError, PluginError
from nnj.registry.manager import manager


@functools.cache
def _options(rule: Callable[..., Any]) -> list[str]:
    """The keyword arguments of a quantity."""
    return [p for p in inspect.signature(rule).parameters if p not in ("args", "kwargs")]


@functools.cache
def _needed(rule: Callable[..., Any]) -> list[str]:
    """Those that have no default."""
    known = inspect.signature(rule).parameters
    return [option for option in _options(rule) if known[option].default is inspect.Parameter.empty]


def make(wanted: tuple[str | Quantity, ...], options: dict[str, Any]) -> dict[str, Quantity]:
    """Quantities by name: those named with the options that they declare, and those given.

    Errors: `NNJError` for unknown names and options, and for two of one name.
    """
    made: dict[str, Quantity] = {}
    declared: set[str] = set()
    for one in wanted:
        if isinstance(one, Quantity):
            name, quantity = _given(one), one
        else:
            name, quantity = one, _installed(one, options, declared)
        if name in made and (quantity is not made[name] or not isinstance(one, Quantity)):
            _check_twice(name, one, wanted)
        made[name] = quantity
    for option in options:
        if option not in declared:
            known = sorted({*declared, "modules", "memory", "tol", "signed", "verify", "group"})
            raise NNJError(
                f"unknown option {option!r} for {', '.join(made)}{_close(option, known)}. Known: "
                f"{', '.join(known)}"
            )
    return made


def _installed(name: Any, options: dict[str, Any], declared: set[str]) -> Quantity:
    """A quantity by its name, with those of the options that it declares."""
    entry = manager().quantity(name) if isinstance(name, str) else None
    if entry is None:
        known = sorted(e.key for e in manager().entries("quantity"))
        raise NNJError(f"unknown quantity {name!r}{_meant(name, known)}. Known: {', '.join(known)}")
    accepted = _options(entry.rule)
    declared.update(accepted)
    missing = [option for option in _needed(entry.rule) if option not in options]
    if missing:
        said = ", ".join(f"{option}=..." for option in missing)
        raise NNJError(f"{name} has options that must be given: nnj.collect({name!r}, {said})")
    made = entry.rule(**{k: v for k, v in options.items() if k in accepted})
    if not isinstance(made, Quantity):
        raise PluginError(
            f"plugin {entry.source} gives {type(made).__name__} for the quantity {name!r}, "
            "expected a nnj.Quantity"
        )
    return made


def _given(quantity: Quantity) -> str:
    """The name of a quantity that is given itself. Errors: `NNJError` if no attribute can have
    it.
    """
    name = named(quantity)
    holder = quantity.place if quantity.place is nn.Module else nn.Parameter
    if not name.isidentifier() or (quantity.place is not Whole and hasattr(holder, name)):
        raise NNJError(
            f"results of {type(quantity).__name__} cannot stand under {name!r}, which is no "
            f"identifier, or an attribute of every nn.{holder.__name__}. Set its `name`"
        )
    return name


def _check_twice(name: str, one: str | Quantity, wanted: tuple[str | Quantity, ...]) -> None:
    """Errors: `NNJError` for two quantities of one name, of which one was given itself."""
    if isinstance(one, Quantity) or any(
        isinstance(w, Quantity) and named(w) == name for w in wanted
    ):
        raise NNJError(
            f"two quantities are called {name!r}, and results stand under one name. Set the `name` "
            "of one"
        )


def _meant(given: Any, known: list[str]) -> str:
    """What to give in the place of what is no name."""
    if isinstance(given, type) and issubclass(given, Quantity):
        return f" (a class: give its name, or an instance, {given.__name__}(...))"
    if isinstance(given, (list, tuple, set, frozenset)):
        return " (several names are arguments of their own: 'ggn_diag', 'batch_grad')"
    return _close(str(given), known)


def _close(word: str, known: list[str]) -> str:
    match = max(known, key=lambda name: _likeness(word.lower(), name), default="")
    return f" (did you mean {match!r}?)" if _likeness(word.lower(), match) >= 0.6 else ""


def _likeness(word: str, name: str) -> float:
    """From 0 to 1. Other tools have the same words in another order: diag_ggn, grad_batch."""
    in_order = ["_".join(sorted(words.split("_"))) for words in (word, name)]
    return max(difflib.SequenceMatcher(None, *both).ratio() for both in ((word, name), in_order))

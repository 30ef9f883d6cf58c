"""Loads one plugin: checks its version, imports it, calls its hooks, and names it when it is
broken.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import pluggy
from torch import nn

from nnj._version import __version__
from nnj.errors import PluginError
from nnj.registry import hookspecs
from nnj.registry.blame import fact, remedy
from nnj.registry.claim import DISABLED, GROUP, HOOKS, Entry, Source, full_name
from nnj.registry.versions import fits, required


def source_of(point: metadata.EntryPoint) -> Source:
    """Where the claims of an entry point come from."""
    if point.dist is None:
        return Source(point.name)
    return Source(point.name, point.dist.name, point.dist.version)


def check_version(point: metadata.EntryPoint, source: Source) -> None:
    """Errors: `PluginError` if the plugin was written for another version of nnj. pip leaves it
    where it is when nnj is upgraded beside it.
    """
    wanted = required((point.dist.requires or ()) if point.dist else ())
    if not fits(__version__, wanted):
        raise PluginError(
            f"plugin {source} was written for another version: it asks for nnj{wanted}, and this "
            f"is nnj {__version__}. Install a {source.distribution} that goes with it, or disable "
            f"the plugin with {DISABLED}={source.plugin}"
        )


def import_plugin(point: metadata.EntryPoint, source: Source) -> Any:
    """The module or object behind an entry point. Errors: `PluginError`."""
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # one that exits would take the user's program with it
        origin = f", from {source.distribution} {source.version}" if source.distribution else ""
        raise PluginError(
            f"plugin '{point.name}' ({point.value}{origin}) cannot be imported: {fact(error)}."
            f"{remedy(source)}"
        ) from error


def claims_of(plugin: Any, source: Source) -> list[Entry]:
    """What one plugin claims: its hooks are called with a `register` that takes notes.

    Errors: `PluginError` if it does not fit, or claims what cannot be claimed.
    """
    # one for each plugin, so that one that is broken spoils no other
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=source.plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"plugin {source} does not fit nnj {__version__}: {_misfit(manager, plugin) or error}. "
            f"nnj.registry.hookspecs says what there is.{remedy(source)}"
        ) from error
    claims: list[Entry] = []
    for table, hook in HOOKS.items():
        try:
            getattr(manager.hook, hook)(register=_registrar(table, source, claims))
        except (PluginError, KeyboardInterrupt):
            raise
        except BaseException as error:  # as above
            raise PluginError(
                f"plugin {source} failed in {hook}: {fact(error)}.{remedy(source)}"
            ) from error
    if not claims:
        warnings.warn(
            f"plugin {source} registers nothing: does it implement a hook of "
            f"nnj.registry.hookspecs with @nnj.hookimpl?{remedy(source)}",
            stacklevel=2,
        )
    return claims


def _misfit(manager: pluggy.PluginManager, plugin: Any) -> str | None:
    """Which hook of a plugin this version of nnj does not have, or gives other arguments; None if
    it is something else.
    """
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS.values():
            return f"it implements {hook}, which is no hook of this version"
        takes = [
            p.name
            for p in inspect.signature(getattr(plugin, name)).parameters.values()
            if p.default is p.empty
        ]
        if set(takes) - {"register"}:
            return f"its {hook} takes ({', '.join(takes)}), and this version gives (register)"
    return None


def _registrar(table: str, source: Source, claims: list[Entry]) -> Callable[..., None]:
    """The `register` that a hook is given: it checks a claim and takes it down."""

    def register(
        key: Any,
        rule: Callable[..., Any],
        *,
        uses: str = "xy",
        replace: bool = False,
        when: Callable[[Any], bool] | None = None,
        reference: Callable[..., Any] | None = None,
        node: str = "",
        **unknown: Any,
    ) -> None:
        entry = Entry(key, rule, source, uses, table, replace, when, reference, node)
        fault = _fault(entry, unknown)
        if fault is not None:
            raise PluginError(
                f"plugin {source} registers the {table} {full_name(key)}, but "
                f"{fault}.{remedy(source)}"
            )
        claims.append(entry)

    return register


def _fault(entry: Entry, unknown: Iterable[str]) -> str | None:
    """What is wrong with a claim, if anything; `unknown` are options that `register` has not."""
    if unknown:
        return f"nnj {__version__} knows no option {', '.join(map(repr, unknown))} of register"
    if entry.table == "quantity":
        if not (isinstance(entry.key, str) and entry.key.isidentifier()):
            return "its name is not an identifier"
        of_modules = getattr(entry.rule, "place", None) is nn.Module
        holder = nn.Module if of_modules else nn.Parameter
        if hasattr(holder, entry.key):
            return f"each nn.{holder.__name__} has an attribute of that name"
    elif not isinstance(entry.key, type):
        return "it is not a class"
    elif entry.key is object:
        return "every class is one"
    if not callable(entry.rule):
        return f"its rule {entry.rule!r} cannot be called"
    return _fault_of_options(entry)


def _fault_of_options(entry: Entry) -> str | None:
    """What is wrong with how a rule is registered, if anything."""
    if entry.uses not in ("", "x", "y", "xy"):
        return f"uses={entry.uses!r}, expected 'x', 'y', 'xy' or ''"
    if not all(given is None or callable(given) for given in (entry.when, entry.reference)):
        return f"when={entry.when!r} and reference={entry.reference!r} must be callable"
    if not isinstance(entry.node, str):
        return f"node={entry.node!r}, expected the name of a node of autograd"
    return None


def raise_all(errors: list[PluginError]) -> None:
    """Errors: all of them as one; nothing happens if there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PluginError("\n".join(map(str, errors))) from errors[0]

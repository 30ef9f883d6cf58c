"""Loads one plugin: its version, its import, its hooks; says whose fault it is when it is
broken.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pluggy

from nnj._version import __version__
from nnj.errors import PluginError
from nnj.registry import hookspecs
from nnj.registry.claim import DISABLED, GROUP, HOOKS, Entry, Source, _fact, _remedy, full_name
from nnj.registry.versions import fits, required


def _check_version(point: metadata.EntryPoint, source: Source) -> None:
    """pip leaves a plugin where it is when nnj is upgraded beside it, so what its distribution asks
    for is looked at here.
    """
    wanted = required((point.dist.requires or ()) if point.dist else ())
    if not fits(__version__, wanted):
        raise PluginError(
            f"plugin {source} was written for another version: it asks for nnj{wanted}, and this "
            f"is nnj {__version__}. Install a {source.distribution} that goes with it, or disable "
            f"the plugin with {DISABLED}={source.plugin}"
        )


def _import(point: metadata.EntryPoint, source: Source) -> Any:
    try:
        return point.load()
    except (
        Exception,
        SystemExit,
    ) as error:  # a module that exits would take the user's program with it
        origin = f", from {source.distribution} {source.version}" if source.distribution else ""
        raise PluginError(
            f"plugin '{point.name}' ({point.value}{origin}) cannot be imported: {_fact(error)}."
            f"{_remedy(source)}"
        ) from error


def _ask(plugin: Any, source: Source) -> list[Entry]:
    """What one plugin claims: its hooks are called with a `register` that takes notes."""
    # one for each plugin, so that one that is broken spoils no other
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=source.plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"plugin {source} does not fit nnj {__version__}: {_misfit(manager, plugin) or error}. "
            f"nnj.registry.hookspecs says what there is.{_remedy(source)}"
        ) from error
    claims: list[Entry] = []
    for table, hook in HOOKS.items():
        try:
            getattr(manager.hook, hook)(register=_registrar(table, source, claims))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {source} failed in {hook}: {_fact(error)}.{_remedy(source)}"
            ) from error
    if not claims:
        warnings.warn(
            f"plugin {source} registers nothing: does it implement a hook of "
            f"nnj.registry.hookspecs with @nnj.hookimpl?{_remedy(source)}",
            stacklevel=2,
        )
    return claims


def _misfit(manager: pluggy.PluginManager, plugin: Any) -> str:
    """Which hook of a plugin this version of nnj does not have, or gives other arguments; "" if it
    is something else.
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
    return ""


def _registrar(table: str, source: Source, claims: list[Entry]) -> Callable[..., None]:
    def register(
        key: Any,
        rule: Callable[..., Any],
        *,
        uses: str = "xy",
        replace: bool = False,
        when: Callable[[Any], bool] | None = None,
        reference: Callable[..., Any] | None = None,
        **unknown: Any,
    ) -> None:
        fault = ""
        if unknown:
            fault = f"nnj {__version__} knows no option {', '.join(map(repr, unknown))} of register"
        elif table == "quantity" and not (isinstance(key, str) and key.isidentifier()):
            fault = "its name is not an identifier"
        elif table != "quantity" and not isinstance(key, type):
            fault = "it is not a class"
        elif not callable(rule):
            fault = f"its rule {rule!r} cannot be called"
        elif uses not in ("", "x", "y", "xy"):
            fault = f"uses={uses!r}, expected 'x', 'y', 'xy' or ''"
        elif not all(given is None or callable(given) for given in (when, reference)):
            fault = f"when={when!r} and reference={reference!r} are to be called"
        if fault:
            raise PluginError(
                f"plugin {source} registers the {table} {full_name(key)}, but "
                f"{fault}.{_remedy(source)}"
            )
        claims.append(Entry(key, rule, source, uses, table, replace, when, reference))

    return register


def _raise(errors: list[PluginError]) -> None:
    """All errors as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PluginError("\n".join(map(str, errors))) from errors[0]

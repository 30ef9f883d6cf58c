"""The plugin manager: finds plugins, keeps their claims in tables, says whose fault it is when one is broken."""
from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Callable, Iterator

import pluggy

from nnj import hookspecs
from nnj.errors import PluginError, UnsupportedLayer

GROUP = "nnj"
DISABLED = "NNJ_DISABLED_PLUGINS"


@dataclass(frozen=True)
class Source:
    """Where a claim comes from."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"'{self.plugin}'{origin}"


@dataclass(frozen=True)
class Entry:
    """One claim: a class (or the name of a quantity), what it is claimed with, and by whom."""

    key: Any
    rule: Callable[..., Any]
    source: Source
    uses: str = "xy"


def full_name(key: Any) -> str:
    """The name under which an error or a table shows a class or a quantity."""
    if not isinstance(key, type):
        return repr(key)
    name = f"{key.__module__}.{key.__qualname__}"
    return f"torch.nn.{key.__qualname__}" if name.startswith("torch.nn.modules.") else name


class PluginManager:
    """Tables of layers, losses and quantities, filled from entry points at first use. A fresh one knows nothing of others.

    Errors: `PluginError` naming plugin, distribution and version, with all plugins that are broken in one message.
    """

    def __init__(self, load: bool = True):
        self._tables: dict[str, dict[Any, Entry]] = {"layer": {}, "loss": {}, "quantity": {}}
        self._replaced: dict[str, set[Any]] = {"layer": set(), "loss": set(), "quantity": set()}
        self._resolved: dict[tuple[str, type], Entry | None] = {}
        self._lock = threading.RLock()
        self._loaded = not load
        self.disabled: list[str] = []

    # -- loading ------------------------------------------------------------------------------------------------------

    def _entry_points(self) -> list[metadata.EntryPoint]:
        points = {(p.name, p.value): p for p in metadata.entry_points(group=GROUP)}  # one twice on sys.path is one
        return sorted(points.values(), key=lambda p: p.name)

    def load(self) -> None:
        """Import every installed plugin and call its hooks. Called at first use; harmless to call again."""
        with self._lock:
            if self._loaded:
                return
            wanted = [name.strip() for name in os.environ.get(DISABLED, "").split(",") if name.strip()]
            broken, seen = [], {}
            points = self._entry_points()
            unknown = sorted(set(wanted) - {p.name for p in points})
            if unknown:
                warnings.warn(f"{DISABLED} names plugins that are not installed: {', '.join(unknown)}", stacklevel=3)
            for point in points:
                if point.name in wanted:
                    self.disabled.append(point.name)
                    continue
                dist = point.dist
                source = Source(point.name, dist.name if dist else "", dist.version if dist else "")
                try:
                    if point.name in seen:
                        raise PluginError(f"plugin {source} has the same entry name as {seen[point.name]}. Entry names begin "
                                          f"with the name of the distribution; rename one of them")
                    seen[point.name] = source
                    self.register(self._import(point, source), source)
                except PluginError as error:
                    broken.append(str(error))
            if broken:
                for table in self._tables.values():
                    table.clear()
                raise PluginError("\n".join(broken))
            self._loaded = True

    @staticmethod
    def _import(point: metadata.EntryPoint, source: Source) -> Any:
        try:
            return point.load()
        except Exception as error:
            origin = f", from {source.distribution} {source.version}" if source.distribution else ""
            raise PluginError(f"plugin '{point.name}' ({point.value}{origin}) cannot be imported: {error}. "
                              f"Disable it with {DISABLED}={point.name}") from error

    def register(self, plugin: Any, source: Source | str = "unnamed") -> None:
        """Take in one plugin, a module or an object with hooks. Errors: `PluginError`; nothing is kept of a broken one."""
        source = Source(source, "", "") if isinstance(source, str) else source
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        remedy = f"Disable it with {DISABLED}={source.plugin}"
        try:
            manager.register(plugin, name=source.plugin)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {source} does not fit the hooks of nnj: {error}. {remedy}") from error
        claims: list[tuple[str, Entry, bool]] = []
        hooks = (("layer", manager.hook.nnj_register_layers), ("loss", manager.hook.nnj_register_losses),
                 ("quantity", manager.hook.nnj_register_quantities))
        for table, hook in hooks:
            try:
                hook(register=self._registrar(table, source, claims))
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(f"plugin {source} failed while it registered a {table}: "
                                  f"{type(error).__name__}: {error}. {remedy}") from error
        if not claims:
            warnings.warn(f"plugin {source} registers nothing: does it implement a hook of nnj.hookspecs with "
                          f"@nnj.hookimpl?", stacklevel=2)
        with self._lock:
            for table, entry, replace in claims:
                self._claim(table, entry, replace)
            self._resolved.clear()

    @staticmethod
    def _registrar(table: str, source: Source, claims: list[tuple[str, Entry, bool]]) -> Callable[..., None]:
        def register(key: Any, rule: Callable[..., Any], *, uses: str = "xy", replace: bool = False) -> None:
            good = isinstance(key, str) and key.isidentifier() if table == "quantity" else isinstance(key, type)
            if not good:
                what = "an identifier" if table == "quantity" else "a class"
                raise PluginError(f"plugin {source} registers a {table} under {key!r}, which is not {what}")
            if not callable(rule):
                raise PluginError(f"plugin {source} registers {full_name(key)} with {rule!r}, which cannot be called")
            if not set(uses) <= {"x", "y"}:
                raise PluginError(f"plugin {source} registers {full_name(key)} with uses={uses!r}; it may hold x and y")
            claims.append((table, Entry(key, rule, source, uses), replace))

        return register

    def _claim(self, table: str, entry: Entry, replace: bool) -> None:
        known, replaced = self._tables[table], self._replaced[table]
        other = known.get(entry.key)
        if other is None or replace or entry.key in replaced:
            # A replacement wins whichever of the two is loaded first; two replacements are a conflict.
            if replace and entry.key in replaced:
                raise PluginError(f"{full_name(entry.key)} is replaced twice: by {known[entry.key].source} and by "
                                  f"{entry.source}. Disable one of them with {DISABLED}")
            if replace or other is None:
                known[entry.key] = entry
            if replace:
                replaced.add(entry.key)
            return
        raise PluginError(f"{full_name(entry.key)} is claimed twice: by {other.source} and by {entry.source}. Disable one "
                          f"with {DISABLED}={entry.source.plugin}, or let it register with replace=True")

    # -- looking up ---------------------------------------------------------------------------------------------------

    def find(self, table: str, cls: type) -> Entry | None:
        """The claim of the nearest class in the MRO of `cls`."""
        self.load()
        key = (table, cls)
        if key not in self._resolved:
            known = self._tables[table]
            self._resolved[key] = next((known[base] for base in cls.__mro__ if base in known), None)
        return self._resolved[key]

    def quantity(self, name: str) -> Entry | None:
        """The claim of a quantity's name."""
        self.load()
        return self._tables["quantity"].get(name)

    def entries(self, table: str) -> Iterator[Entry]:
        """All claims of a table, sorted by name."""
        self.load()
        return iter(sorted(self._tables[table].values(), key=lambda entry: full_name(entry.key)))

    def unsupported(self, module: Any, path: str) -> UnsupportedLayer:
        """The error for a layer that nobody knows."""
        names = ", ".join(sorted({entry.source.plugin for entry in self.entries("layer")})) or "none"
        off = f" (disabled: {', '.join(self.disabled)})" if self.disabled else ""
        return UnsupportedLayer(f"no plugin knows {type(module).__name__} ('{path}'). Installed: {names}{off}. "
                                f"Enable nnj-fallback, or write a rule for it (see nnj.hookspecs)")


_manager = PluginManager()


def manager() -> PluginManager:
    """The manager in use."""
    return _manager


def use(new: PluginManager) -> PluginManager:
    """Put another manager to use and return the former one (for tests of plugins)."""
    global _manager
    former, _manager = _manager, new
    return former

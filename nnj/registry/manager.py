"""The plugin manager: tables of layers, losses and quantities, filled from entry points at first
use.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

from nnj.errors import PluginError
from nnj.registry.claim import DISABLED, GROUP, HOOKS, Entry, Source, Tables, full_name, settle
from nnj.registry.discovery import check_version, claims_of, import_plugin, raise_all, source_of


class PluginManager:
    """Tables of layers, losses and quantities, filled from entry points at first use. A fresh one
    knows nothing of others.

    Errors: `PluginError` naming plugin, distribution and version, with all plugins that are broken
    in one message. After one, the tables are what they were, and the next use tries again.

    Args:
        load: whether to load the installed plugins; without, the manager knows only what `register`
            is given.
    """

    def __init__(self, load: bool = True):
        self._claims: list[Entry] = []
        self.tables: Tables = {table: {} for table in HOOKS}
        self._found: dict[str, WeakKeyDictionary[type, Entry | None]] = {
            table: WeakKeyDictionary() for table in HOOKS
        }
        self._lock = threading.RLock()
        self._loaded, self._loading = not load, False
        self.disabled: list[str] = []

    # -- loading -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Import every installed plugin and call its hooks. Called at first use; harmless to call
        again.
        """
        if self._loaded:
            return
        with self._lock:
            if self._loaded:
                return
            if self._loading:
                raise PluginError(
                    "nnj was asked for its tables while its plugins were being loaded. A plugin "
                    "only registers; let it use nnj in its rules, not while it is imported"
                )
            self._loading = True
            try:
                self._load()
            finally:
                self._loading = False

    def _load(self) -> None:
        points = sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)
        disabled = {name.strip() for name in os.environ.get(DISABLED, "").split(",")} - {""}
        unknown = disabled - {point.name for point in points}
        if unknown:
            warnings.warn(
                f"{DISABLED} names plugins that are not installed: {', '.join(sorted(unknown))}",
                stacklevel=2,
            )
        claims, broken = list(self._claims), []
        seen: dict[str, Source] = {}
        for point in points:
            if point.name in disabled:
                continue
            source = source_of(point)
            try:
                if point.name in seen:
                    raise PluginError(
                        f"plugin {source} has the same entry name as {seen[point.name]}. Entry "
                        "names begin with the name of the distribution; rename one of them"
                    )
                seen[point.name] = source
                check_version(point, source)
                claims += claims_of(import_plugin(point, source), source)
            except PluginError as error:
                broken.append(error)
        tables, conflicts = settle(claims)
        raise_all(broken + conflicts)
        self._take(claims, tables)
        self._loaded = True
        self.disabled = sorted(disabled - unknown)

    def register(self, plugin: Any, source: Source | str = "unnamed") -> None:
        """Take in one plugin, a module or an object with hooks. Errors: `PluginError`; nothing is
        kept of a broken one.
        """
        with self._lock:
            claims = self._claims + claims_of(
                plugin, Source(source) if isinstance(source, str) else source
            )
            tables, conflicts = settle(claims)
            raise_all(conflicts)
            self._take(claims, tables)

    def _take(self, claims: list[Entry], tables: Tables) -> None:
        self._claims, self.tables = claims, tables
        self._found = {table: WeakKeyDictionary() for table in HOOKS}

    # -- looking up --------------------------------------------------------------------------------

    def find(self, table: str, cls: type) -> Entry | None:
        """The claim of the nearest class in the MRO of `cls`."""
        try:
            return self._found[table][cls]  # empty until the plugins are loaded
        except KeyError:
            self.load()
            known = self.tables[table]
            found = self._found[table][cls] = next(
                (known[base] for base in cls.__mro__ if base in known), None
            )
            return found

    def quantity(self, name: str) -> Entry | None:
        """The claim of a quantity's name."""
        self.load()
        return self.tables["quantity"].get(name)

    def entries(self, table: str) -> Iterator[Entry]:
        """All claims of a table that hold, sorted by name."""
        self.load()
        return iter(sorted(self.tables[table].values(), key=lambda entry: full_name(entry.key)))


in_use = PluginManager()


def manager() -> PluginManager:
    """The manager in use."""
    return in_use


def use(new: PluginManager) -> PluginManager:
    """Put another manager to use and return the former one (for tests of plugins)."""
    global in_use
    former, in_use = in_use, new
    return former

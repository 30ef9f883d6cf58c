"""The plugin manager: finds plugins, keeps their claims in tables, says whose fault it is when one is broken."""
from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

import pluggy

import nnj
from nnj import hookspecs, versions
from nnj.errors import PluginError, UnsupportedLayer

GROUP = "nnj"
DISABLED = "NNJ_DISABLED_PLUGINS"
HOOKS = {"layer": "nnj_register_layers", "loss": "nnj_register_losses", "quantity": "nnj_register_quantities"}


@dataclass(frozen=True)
class Source:
    """Where a claim comes from: the name of an entry point, and its distribution ("" for a plugin registered by hand)."""

    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"'{self.plugin}' ({self.distribution} {self.version})" if self.distribution else f"'{self.plugin}'"


@dataclass(frozen=True)
class Entry:
    """One claim: a class (or the name of a quantity), what it is claimed with, and by whom."""

    key: Any
    rule: Callable[..., Any]
    source: Source
    uses: str = "xy"
    table: str = "layer"
    replace: bool = False
    when: Callable[[Any], bool] | None = None
    reference: Callable[..., Any] | None = None


Tables = dict[str, dict[Any, Entry]]


def full_name(key: Any) -> str:
    """The name under which an error or a table shows a class or a quantity."""
    if not isinstance(key, type):
        return str(key)
    name = f"{key.__module__}.{key.__qualname__}"
    return f"torch.nn.{key.__qualname__}" if name.startswith("torch.nn.modules.") else name


class PluginManager:
    """Tables of layers, losses and quantities, filled from entry points at first use. A fresh one knows nothing of others.

    Errors: `PluginError` naming plugin, distribution and version, with all plugins that are broken in one message. After
    one, the tables are what they were, and the next use tries again.

    Args:
        load: whether to load the installed plugins; without, the manager knows only what `register` is given.
    """

    def __init__(self, load: bool = True):
        self._claims: list[Entry] = []
        self.tables: Tables = {table: {} for table in HOOKS}
        self._found: dict[str, WeakKeyDictionary[type, Entry | None]] = {table: WeakKeyDictionary() for table in HOOKS}
        self._lock = threading.RLock()
        self._loaded, self._loading = not load, False
        self.disabled: list[str] = []

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Import every installed plugin and call its hooks. Called at first use; harmless to call again."""
        if self._loaded:
            return
        with self._lock:
            if self._loaded:
                return
            if self._loading:
                raise PluginError("nnj was asked for its tables while its plugins were being loaded. A plugin only "
                                  "registers; let it use nnj in its rules, not while it is imported")
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
            warnings.warn(f"{DISABLED} names plugins that are not installed: {', '.join(sorted(unknown))}", stacklevel=2)
        claims, broken = list(self._claims), []
        seen: dict[str, Source] = {}
        for point in points:
            if point.name in disabled:
                continue
            source = Source(point.name, point.dist.name, point.dist.version) if point.dist else Source(point.name)
            try:
                if point.name in seen:
                    raise PluginError(f"plugin {source} has the same entry name as {seen[point.name]}. Entry names begin "
                                      f"with the name of the distribution; rename one of them")
                seen[point.name] = source
                _check_version(point, source)
                claims += _ask(_import(point, source), source)
            except PluginError as error:
                broken.append(error)
        tables, conflicts = _settle(claims)
        _raise(broken + conflicts)
        self._take(claims, tables)
        self._loaded = True
        self.disabled = sorted(disabled - unknown)

    def register(self, plugin: Any, source: Source | str = "unnamed") -> None:
        """Take in one plugin, a module or an object with hooks. Errors: `PluginError`; nothing is kept of a broken one."""
        with self._lock:
            claims = self._claims + _ask(plugin, Source(source) if isinstance(source, str) else source)
            tables, conflicts = _settle(claims)
            _raise(conflicts)
            self._take(claims, tables)

    def _take(self, claims: list[Entry], tables: Tables) -> None:
        self._claims, self.tables = claims, tables
        self._found = {table: WeakKeyDictionary() for table in HOOKS}

    # -- looking up ---------------------------------------------------------------------------------------------------

    def find(self, table: str, cls: type) -> Entry | None:
        """The claim of the nearest class in the MRO of `cls`."""
        try:
            return self._found[table][cls]  # empty until the plugins are loaded
        except KeyError:
            self.load()
            known = self.tables[table]
            found = self._found[table][cls] = next((known[base] for base in cls.__mro__ if base in known), None)
            return found

    def quantity(self, name: str) -> Entry | None:
        """The claim of a quantity's name."""
        self.load()
        return self.tables["quantity"].get(name)

    def entries(self, table: str) -> Iterator[Entry]:
        """All claims of a table that hold, sorted by name."""
        self.load()
        return iter(sorted(self.tables[table].values(), key=lambda entry: full_name(entry.key)))

    def unsupported(self, module: Any, path: str, table: str = "layer") -> UnsupportedLayer:
        """The error for a layer (or a loss) that nobody knows."""
        names = ", ".join(sorted({entry.source.plugin for entry in self.entries(table)})) or "none"
        off = f" (disabled: {', '.join(self.disabled)})" if self.disabled else ""
        enable = "Enable what is disabled, or write" if self.disabled else "Write"
        return UnsupportedLayer(f"no plugin knows {type(module).__name__} ('{path}'). Installed: {names}{off}. "
                                f"{enable} a rule for it (see nnj.hookspecs)")


def _check_version(point: metadata.EntryPoint, source: Source) -> None:
    """pip leaves a plugin where it is when nnj is upgraded beside it, so what its distribution asks for is looked at here."""
    wanted = versions.wanted((point.dist.requires or ()) if point.dist else ())
    if not versions.fits(nnj.__version__, wanted):
        raise PluginError(f"plugin {source} was written for another version: it asks for nnj{wanted}, and this is nnj "
                          f"{nnj.__version__}. Install a {source.distribution} that goes with it, or disable the plugin with "
                          f"{DISABLED}={source.plugin}")


def _import(point: metadata.EntryPoint, source: Source) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # a module that exits would take the user's program with it
        origin = f", from {source.distribution} {source.version}" if source.distribution else ""
        raise PluginError(f"plugin '{point.name}' ({point.value}{origin}) cannot be imported: {_fact(error)}."
                          f"{_remedy(source)}") from error


def _ask(plugin: Any, source: Source) -> list[Entry]:
    """What one plugin claims: its hooks are called with a `register` that takes notes."""
    manager = pluggy.PluginManager(GROUP)  # one for each plugin, so that one that is broken spoils no other
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=source.plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {source} does not fit nnj {nnj.__version__}: {_misfit(manager, plugin) or error}. "
                          f"nnj.hookspecs says what there is.{_remedy(source)}") from error
    claims: list[Entry] = []
    for table, hook in HOOKS.items():
        try:
            getattr(manager.hook, hook)(register=_registrar(table, source, claims))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"plugin {source} failed in {hook}: {_fact(error)}.{_remedy(source)}") from error
    if not claims:
        warnings.warn(f"plugin {source} registers nothing: does it implement a hook of nnj.hookspecs with @nnj.hookimpl?"
                      f"{_remedy(source)}", stacklevel=2)
    return claims


def _misfit(manager: pluggy.PluginManager, plugin: Any) -> str:
    """Which hook of a plugin this version of nnj does not have, or gives other arguments; "" if it is something else."""
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS.values():
            return f"it implements {hook}, which is no hook of this version"
        takes = [p.name for p in inspect.signature(getattr(plugin, name)).parameters.values() if p.default is p.empty]
        if set(takes) - {"register"}:
            return f"its {hook} takes ({', '.join(takes)}), and this version gives (register)"
    return ""


def _registrar(table: str, source: Source, claims: list[Entry]) -> Callable[..., None]:
    def register(key: Any, rule: Callable[..., Any], *, uses: str = "xy", replace: bool = False,
                 when: Callable[[Any], bool] | None = None, reference: Callable[..., Any] | None = None, **unknown: Any) -> None:
        fault = ""
        if unknown:
            fault = f"nnj {nnj.__version__} knows no option {', '.join(map(repr, unknown))} of register"
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
            raise PluginError(f"plugin {source} registers the {table} {full_name(key)}, but {fault}.{_remedy(source)}")
        claims.append(Entry(key, rule, source, uses, table, replace, when, reference))

    return register


def _settle(claims: Iterable[Entry]) -> tuple[Tables, list[PluginError]]:
    """Who has what, and the conflicts. The order of the claims is of no account: a replacement always wins."""
    rivals: dict[tuple[str, Any], list[Entry]] = {}
    for entry in claims:
        rivals.setdefault((entry.table, entry.key), []).append(entry)
    tables: Tables = {table: {} for table in HOOKS}
    conflicts = []
    for (table, key), every in rivals.items():
        best = [entry for entry in every if entry.replace] or every
        tables[table][key] = best[0]
        if len(best) > 1:
            conflicts.append(_conflict(best))
    return tables, conflicts


def _conflict(rivals: list[Entry]) -> PluginError:
    verb = "replaced" if rivals[0].replace else "claimed"
    times = "twice" if len(rivals) == 2 else f"{len(rivals)} times"
    by = " and ".join(f"by {entry.source}" for entry in rivals)
    names = " or ".join(f"{DISABLED}={name}" for name in dict.fromkeys(e.source.plugin for e in rivals if e.source.distribution))
    remedy = f". Disable one of them with {names}" if names else ""
    other = "" if rivals[0].replace else ". A plugin that means to take over a class registers with replace=True"
    return PluginError(f"{full_name(rivals[0].key)} is {verb} {times}: {by}{remedy}{other}")


def _fact(error: BaseException) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def _remedy(source: Source) -> str:
    return f" Disable it with {DISABLED}={source.plugin}" if source.distribution else ""


def at_work(source: Source) -> str:
    """Whose a rule is that failed while it was used, and how to go on without it."""
    return f". It is of {source.distribution} {source.version}, and {DISABLED}={source.plugin} disables it" \
        if source.distribution else ""


def _raise(errors: list[PluginError]) -> None:
    """All errors as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PluginError("\n".join(map(str, errors))) from errors[0]


_manager = PluginManager()


def manager() -> PluginManager:
    """The manager in use."""
    return _manager


def use(new: PluginManager) -> PluginManager:
    """Put another manager to use and return the former one (for tests of plugins)."""
    global _manager
    former, _manager = _manager, new
    return former

"""What a plugin claims: a class or a name, the rule for it, and by whom; and which claim holds
where several are for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nnj.errors import PluginError

GROUP = "nnj"
DISABLED = "NNJ_DISABLED_PLUGINS"
HOOKS = {
    "layer": "nnj_register_layers",
    "loss": "nnj_register_losses",
    "quantity": "nnj_register_quantities",
}


@dataclass(frozen=True)
class Source:
    """Where a claim comes from: the name of an entry point, and its distribution
    ("" for a plugin registered by hand).
    """

    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        return (
            f"'{self.plugin}' ({self.distribution} {self.version})"
            if self.distribution
            else f"'{self.plugin}'"
        )


@dataclass(frozen=True)
class Entry:
    """One claim: a class (or the name of a quantity), what it is claimed with, and by whom.

    Attributes:
        key: the class of a layer or a loss, or the name of a quantity.
        rule: for a quantity its class.
        uses: which of x and y a layer's rule reads.
        table: "layer", "loss" or "quantity".
        replace, when, reference, node: as `nnj.registry.hookspecs` says.
        is_fallback: whether it speaks for every module that nobody else knows.
    """

    key: Any
    rule: Callable[..., Any]
    source: Source
    uses: str = "xy"
    table: str = "layer"
    replace: bool = False
    when: Callable[[Any], bool] | None = None
    reference: Callable[..., Any] | None = None
    node: str = ""
    is_fallback: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_fallback", self.key is nn.Module)


Tables = dict[str, dict[Any, Entry]]


def full_name(key: Any) -> str:
    """The name under which an error or a table shows a class or a quantity."""
    if not isinstance(key, type):
        return str(key)
    name = f"{key.__module__}.{key.__qualname__}"
    # where users find them
    for package, public in (("torch.nn.modules.", "torch.nn"), ("nnj.", "nnj")):
        if name.startswith(package):
            return f"{public}.{key.__qualname__}"
    return name


def settle(claims: Iterable[Entry]) -> tuple[Tables, list[PluginError]]:
    """Who has what, and the conflicts. The order of the claims does not matter: a replacement
    always wins.
    """
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
    names = " or ".join(
        f"{DISABLED}={name}"
        for name in dict.fromkeys(e.source.plugin for e in rivals if e.source.distribution)
    )
    remedy = f". Disable one of them with {names}" if names else ""
    other = (
        ""
        if rivals[0].replace
        else ". A plugin that means to take over a class registers with replace=True"
    )
    return PluginError(f"{full_name(rivals[0].key)} is {verb} {times}: {by}{remedy}{other}")

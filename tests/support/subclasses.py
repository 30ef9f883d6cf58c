"""All classes of ours that define an operator: of the library and of its plugins."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import nnj
import nnj_plugins


def _descendants(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _descendants(sub)


def subclasses(cls: type) -> set[type]:
    """The classes below `cls`, however far, in all files of `nnj` and `nnj_plugins`."""
    for package in (nnj, nnj_plugins):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            # what stands on a package of another defines none, and needs that package
            apart = ".integrations." in found.name or ".extras." in found.name
            if not found.name.endswith("__main__") and not apart:
                importlib.import_module(found.name)
    return {c for c in _descendants(cls) if c.__module__.split(".")[0] in ("nnj", "nnj_plugins")}

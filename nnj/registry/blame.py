"""Whose fault it is: the words by which every error about a plugin names it, and says how to go on
without it."""

from __future__ import annotations

from torch import nn

from nnj.errors import PluginError
from nnj.registry.claim import DISABLED, Entry, Source


def fact(error: BaseException) -> str:
    """What happened; the message of an ImportError says it without the name of its class."""
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def remedy(source: Source) -> str:
    """How to do without a plugin that cannot be loaded, as a sentence; "" if it is not installed,
    but was registered by hand.
    """
    return f" Disable it with {DISABLED}={source.plugin}" if source.distribution else ""


def at_work(source: Source) -> str:
    """Whose a rule is that failed while it was used, and how to go on without it."""
    return (
        f". It is of {source.distribution} {source.version}, and {DISABLED}={source.plugin} "
        "disables it"
        if source.distribution
        else ""
    )


def blame(entry: Entry, module: nn.Module, path: str) -> str:
    """Subject of an error about the rule of a layer."""
    return f"plugin '{entry.source.plugin}' (layer '{path or type(module).__name__}')"


def rule_failed(who: str, entry: Entry, error: BaseException) -> PluginError:
    """The error for a rule that raised what no rule should; `who` is its subject."""
    what = f"{type(error).__name__}: {error}"
    kept_back = sorted({"x", "y"} - {*entry.uses})
    if kept_back and "meta" in what:
        what += (
            f" (it was registered with uses={entry.uses!r}, so that it gets the shape alone of "
            f"{' and '.join(kept_back)})"
        )
    return PluginError(f"{who}: the rule failed with {what}{at_work(entry.source)}")

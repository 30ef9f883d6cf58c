"""`python -m nnj`: which layer is handled by which rule of which plugin."""
from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from nnj.errors import PluginError
from nnj.plugins import Entry, PluginManager, full_name, manager


def rule_name(rule: Callable[..., Any]) -> str:
    """The name of a rule; one that a function has made goes by the name of that function."""
    while isinstance(rule, functools.partial):
        rule = rule.func
    name: str = getattr(rule, "__qualname__", type(rule).__qualname__)
    return name.split(".<locals>")[0]


def table(of: PluginManager) -> str:
    """What all plugins have registered, as text: layers, losses and quantities in columns, sorted by name."""
    def row(entry: Entry) -> tuple[str, ...]:
        source = entry.source
        return full_name(entry.key), rule_name(entry.rule), source.plugin, f"{source.distribution} {source.version}".strip()

    blocks = [[(kind, "rule", "plugin", "distribution"), *map(row, of.entries(kind))] for kind in ("layer", "loss", "quantity")]
    widths = [max(len(line[i]) for block in blocks for line in block) for i in range(4)]
    text = lambda line: "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    rule = "  ".join("-" * width for width in widths)
    parts = ["\n".join([text(block[0]), rule, *map(text, block[1:])]) for block in blocks]
    if of.disabled:
        parts.append(f"disabled: {', '.join(of.disabled)}")
    return "\n\n".join(parts)


def main() -> int:
    try:
        print(table(manager()))
        sys.stdout.flush()
    except PluginError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m nnj`: which layer is handled by which rule of which plugin; with a model, which rule
each of its modules gets, and what each quantity would take.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from nnj.errors import NNJError
from nnj.registry.claim import Entry, full_name
from nnj.registry.manager import PluginManager, manager
from nnj.testing import costs
from nnj.testing.describe import columns, lines, load, rule_name, text, widths_of


def table(of: PluginManager) -> str:
    """What all plugins have registered, as text: layers, losses and quantities in columns, sorted
    by name.
    """

    def row(entry: Entry) -> tuple[str, ...]:
        source = entry.source
        return (
            full_name(entry.key),
            rule_name(entry.rule) + (", or autograd" if entry.node else ""),
            source.plugin,
            f"{source.distribution} {source.version}".strip(),
        )

    blocks = [
        [(kind, "rule", "plugin", "distribution"), *map(row, of.entries(kind))]
        for kind in ("layer", "loss", "quantity")
    ]
    widths = widths_of([line for block in blocks for line in block])
    parts = [columns(block, widths) for block in blocks]
    if of.disabled:
        parts.append(f"disabled: {', '.join(of.disabled)}")
    return "\n\n".join(parts)


def _shape(given: str) -> list[int]:
    """Errors: ArgumentTypeError for what is no shape."""
    parts = given.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{given!r} is no shape, such as 4,3,32,32")
    return [int(part) for part in parts]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m nnj", description=__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="module:callable that returns a model, or (model, input)",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        type=_shape,
        help="call the model once with random numbers of this shape, such as 4,3,32,32, and ask "
        "each rule what it says of its call",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] = ()) -> int:
    """0, or 1 with the reason on standard error."""
    asked = _arguments(argv)
    try:
        if asked.model is None:
            print(table(manager()))
        else:
            model, x = load(asked.model)
            x = x if asked.input is None else torch.randn(asked.input)
            print(text(lines(model, x)))
            print(f"\n{costs.text(costs.costs_of(model, x))}")
        sys.stdout.flush()
    except NNJError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

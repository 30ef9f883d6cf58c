"""What the time of an exact GGN diagonal is made of, layer by layer, against the floor of its
multiply-adds.

    python examples/benchmarks/floor.py --rows 2c2d mlp-tanh

With --page its summary goes into the README.md of this folder, too.

The floor is the time that the matrix products and convolutions which nnj asks for would take at the
rate of one large matrix product of this machine, the fastest of several before and after (float32;
nothing is subtracted for the plain forward and backward pass, which are in both). Above it stand
products that are too small or too thin for that rate, squares and other work on each entry, copies,
and Python."""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from typing import Any

import torch
from harness import where
from networks import ROWS
from page import option, publish
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import nnj
from nnj.propagation.backward import Sweep

COPIES = {
    "clone",
    "copy_",
    "_to_copy",
    "cat",
    "stack",
    "contiguous",
    "index",
    "index_put_",
    "gather",
    "scatter",
    "index_add_",
    "select_backward",
    "slice_backward",
    "constant_pad_nd",
    "scatter_add_",
}


class Profile(TorchDispatchMode):
    """Seconds by layer and kind of operation, and multiply-adds by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = "(forward, backward, loss, last layer)"
        self.seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
        self.products: dict[str, float] = collections.defaultdict(float)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = op(*args, **(kwargs or {}))
        seconds, packet = time.perf_counter() - start, op._overloadpacket
        counted = packet in flop_registry
        kind = "products" if counted else "copies" if packet.__name__ in COPIES else "entries"
        self.seconds[self.layer, kind] += seconds
        if counted:
            self.products[self.layer] += (
                flop_registry[packet](*args, **(kwargs or {}), out_val=out) / 2
            )
        return out


def rate(size: int = 2048, repeats: int = 7) -> float:
    """Multiply-adds in a second, of one large matrix product: the fastest, since a floor holds for
    the best moment.
    """
    a, seconds = torch.randn(size, size), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return size**3 / min(seconds)


def profiled(run: Any) -> Profile:
    """One run, each operation charged to the layer at which the sweep stands."""
    profile, step = Profile(), Sweep.cross

    def named(self: Sweep, unit: Any, *args: Any, **kwargs: Any) -> None:
        before = profile.layer
        path = (
            self.graph.paths.get(unit.record.module, "")
            if unit.record is not None
            else "(between layers)"
        )
        profile.layer = (
            f"{path} {type(unit.record.module).__name__}" if unit.record is not None else path
        )
        step(self, unit, *args, **kwargs)
        profile.layer = before

    Sweep.cross = named  # type: ignore[method-assign]
    try:
        with profile:
            run()
    finally:
        Sweep.cross = step  # type: ignore[method-assign]
    return profile


def measure(name: str, repeats: int) -> tuple[str, str, float]:
    """A row of the summary, the table of layers, and the rate of a large matrix product
    meanwhile.
    """
    model, x, y = ROWS[name].make()
    nnj.extend(model)
    loss_func = nnj.extend(nn.CrossEntropyLoss())

    def run() -> None:
        with nnj.collect("ggn_diag"):
            loss_func(model(x), y).backward()

    before, seconds = rate(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    whole = statistics.median(seconds[1:])
    profile = min(
        (profiled(run) for _ in range(min(repeats, 3))), key=lambda p: sum(p.seconds.values())
    )
    speed = max(before, rate())
    kinds = {
        kind: sum(s for (_, k), s in profile.seconds.items() if k == kind)
        for kind in ("products", "entries", "copies")
    }
    floor = sum(profile.products.values()) / speed
    ms = lambda s: f"{1e3 * s:.3g}"
    rest = max(0.0, whole - sum(kinds.values()))
    cells = [
        ROWS[name].text,
        ms(whole),
        ms(floor),
        f"{whole / floor:.1f}",
        *map(ms, kinds.values()),
        ms(rest),
    ]
    summary = f"| {' | '.join(cells)} |"
    lines = [
        f"\n{ROWS[name].text}: milliseconds",
        "| layer | floor | products | entries | copies |",
        "|---" * 5 + "|",
    ]
    layers = list(dict.fromkeys(layer for layer, _ in profile.seconds))
    for layer in sorted(layers, key=lambda l: -sum(profile.seconds[l, k] for k in kinds)):
        cells = [
            ms(profile.products[layer] / speed),
            *(ms(profile.seconds[layer, kind]) for kind in kinds),
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return summary, "\n".join(lines), speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "tiny"]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, speeds = [], []
    for name in args.rows:
        summary, layers, speed = measure(name, args.repeats)
        rows.append(summary)
        speeds.append(speed)
        print(layers, flush=True)
    low, high = (f"{s / 1e9:.0f}" for s in (min(speeds), max(speeds)))
    speed = f"A matrix product of this machine: {low} to {high} billion multiply-adds in a second."
    columns = ("network", "time [ms]", "floor", "time / floor", "products", "entries", "copies")
    head = f"| {' | '.join(columns)} | Python and rest |"
    table = "\n".join([head, "|---" * 8 + "|", *rows])
    if args.page:
        publish("floor", f"{table}\n\n{where(args.threads)}. {speed}")
    print(f"\n{speed}\n\n{table}")


if __name__ == "__main__":
    main()

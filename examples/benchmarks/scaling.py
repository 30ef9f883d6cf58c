"""How time and memory of an exact GGN diagonal grow, beside one gradient: with classes, samples,
width, depth (layers in a chain, residual ones, such as are given the sum of all before them or all
of them side by side, and convolutions) and the tokens of a transformer, one of them at a time.

    python examples/benchmarks/scaling.py --out scaling

writes scaling/table.md, figure.png and results.json, and with --page the README.md of this folder.
harness.py says how it is measured, and how to
get the other tools, of which `--tools nnj backpack` sets some beside nnj. Only at the smallest size
are results compared: the reference is slow.

The exponent a in time ∝ size^a is fitted to the three largest sizes; it is below its limit while
fixed costs matter. Peak memory, beyond that of the gradient, is held against its bound: 1.1 times
`memory=` and the results. In `nnj, memory=2**25` that is an eighth of the default, which small
networks never reach."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from harness import WRONG, Pool, cell, disturbed, machine, median, parser, time_of
from networks import find
from page import publish
from tools import MEMORY, NAMES


class Axis(NamedTuple):
    """What grows.

    Attributes:
        heading: of its panel.
        symbol: of its size.
        sizes: from the smallest on.
    """

    heading: str
    symbol: str
    sizes: list[int]


DEPTHS = [2, 4, 8, 16, 32, 64]
AXES = {  # as in networks.GROWING
    "classes": Axis("classes, MLP", "C", [2, 10, 100, 1000, 10_000, 50_000]),
    "samples": Axis("samples, MLP", "N", [8, 32, 128, 512, 2048]),
    "width": Axis("width, MLP", "width", [64, 128, 256, 512, 1024]),
    "chain": Axis("depth, chain", "depth", DEPTHS),
    "residual": Axis("depth, residual layers", "depth", DEPTHS),
    "sums": Axis("depth, sums of all before", "depth", DEPTHS),
    "concatenated": Axis("depth, all before side by side", "depth", DEPTHS),
    "convolutions": Axis("depth, convolutions", "depth", [2, 4, 8, 16, 32]),
    "tokens": Axis("tokens, transformer", "T", [16, 64, 256, 1024, 2048]),
}
Point = tuple[int, float, float]


def name(axis: str, size: int) -> str:
    """The row for networks.find."""
    return f"{axis}-{size}"


def line(results: dict[str, Any], axis: str, tool: str) -> list[Point]:
    """(size, seconds, bytes) for every size at which the tool gave a result that is not wrong."""
    found = []
    for size in results["sweeps"][axis]:
        r = results["rows"][name(axis, size)][tool]
        if not math.isnan(median(r)) and not r["error"] > WRONG:
            found.append((size, median(r), r["bytes"]))
    return found


def ratios(results: dict[str, Any], axis: str, tool: str) -> list[Point]:
    """The same, with gradients in the place of seconds."""
    gradient = {size: seconds for size, seconds, _ in line(results, axis, "gradient")}
    return [
        (size, seconds / gradient[size], memory)
        for size, seconds, memory in line(results, axis, tool)
    ]


def exponent(points: list[Point]) -> float:
    """a in time ∝ size^a, by least squares of the logarithms at the three largest sizes."""
    points = points[-3:]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(
        [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    ).slope


def bound(tool: str, r: dict[str, Any]) -> float:
    """What the peak of a run may be beyond that of a gradient, in bytes."""
    return 1.1 * MEMORY[tool] + r["results"]


def above(results: dict[str, Any]) -> list[str]:
    """Where the peak is above its bound."""
    return [
        f"{row} ({NAMES[tool]}: {r['bytes'] / 2**20:.0f} of {bound(tool, r) / 2**20:.0f} MiB)"
        for row, tools in results["rows"].items()
        for tool, r in tools.items()
        if tool in MEMORY and r["bytes"] > bound(tool, r)
    ]


def cells(tool: str, r: dict[str, Any], gradient: dict[str, Any]) -> list[str]:
    """Of one tool at one size."""
    if r["failed"] or r["error"] > WRONG or tool not in MEMORY:
        return [cell({**r, "error": 0.0} if math.isnan(r["error"]) else r), "", ""]
    part = f"{r['bytes'] / 2**20:.0f} of {bound(tool, r) / 2**20:.0f}"
    over = r["bytes"] > bound(tool, r)
    return [
        time_of(r),
        f"{median(r) / median(gradient):.1f}",
        f"**{part}**" if over else part,
    ]


def slope(points: list[Point]) -> str:
    a = exponent(points)
    return "–" if math.isnan(a) else f"{a:.2f}"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each size, three columns for each tool."""
    tools = results["tools"]
    head = [f"{NAMES[tool]} | ÷ gradient | MiB" for tool in tools]
    lines = [f"| | gradient | {' | '.join(head)} |", "|" + "---|" * (3 * len(tools) + 2)]
    for axis, sizes in results["sweeps"].items():
        heading, symbol, _ = AXES[axis]
        lines.append(f"| **{heading}** |{' |' * (3 * len(tools) + 1)}")
        for size in sizes:
            row = results["rows"][name(axis, size)]
            found = [c for tool in tools for c in cells(tool, row[tool], row["gradient"])]
            lines.append(
                f"| {symbol} = {size} | {' | '.join([time_of(row['gradient']), *found])} |"
            )
        found = [slope(line(results, axis, "gradient"))]
        for tool in tools:
            found += [
                slope(line(results, axis, tool)),
                slope(ratios(results, axis, tool)),
                "",
            ]
        lines.append(f"| time ∝ {symbol}^a, a = | {' | '.join(found)} |")
    many = above(results)
    text = (
        "MiB: peak memory beyond that of the gradient, of 1.1 times `memory=` and the results. "
        f"{'Above that: ' + '; '.join(many) if many else 'Nowhere is it above that'}. "
        f"{results['machine']}.{disturbed(results['rows'])}"
    )
    return "\n".join([*lines, "", text])


def figure(results: dict[str, Any], path: Path) -> None:
    """A panel for each axis: gradients that a run takes, and its peak memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps, wide = results["sweeps"], min(3, len(results["sweeps"]))
    high = math.ceil(len(sweeps) / wide)
    fig, axes = plt.subplots(high, wide, figsize=(4 * wide, 2.7 * high), squeeze=False)
    for panel in axes.flat[len(sweeps) :]:
        panel.set_visible(False)
    for panel, axis in zip(axes.flat, sweeps, strict=False):
        memory = panel.twinx()
        for i, tool in enumerate(results["tools"]):
            points = ratios(results, axis, tool)
            if not points:
                continue
            sizes, times, peaks = zip(*points, strict=True)
            color = {"nnj": "black", "nnj-lean": "gray"}.get(tool, f"C{i}")
            label = f"{NAMES[tool]}: a = {slope(points)}"
            panel.plot(sizes, times, color=color, marker="o", ms=4, label=label)
            mib = [max(b / 2**20, 1) for b in peaks]
            memory.plot(sizes, mib, color=color, ls=":", marker="x", ms=4)
        for part in (panel, memory):
            part.set_xscale("log")
            part.set_yscale("log")
            part.set_ylim(0.8, 400)
            part.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            part.set_xticks(sweeps[axis], list(map(str, sweeps[axis])), fontsize=7)
        panel.grid(alpha=0.3)
        panel.set_title(f"{AXES[axis].heading} ({AXES[axis].symbol})", fontsize=10)
        panel.legend(fontsize=7, frameon=False)
    fig.suptitle("GGN diagonal: gradients that it takes (lines), and peak memory in MiB (dotted)")
    fig.tight_layout()
    fig.savefig(path, dpi=65)


def main() -> None:
    options = parser(__doc__, ["nnj", "nnj-lean"], "scaling")
    options.set_defaults(repeats=3)
    options.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument(
        "--points", type=int, default=6, help="how many sizes on each axis, the smallest first"
    )
    args = options.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": machine(args),
        "tools": args.tools,
        "rows": {},
        "sweeps": {axis: AXES[axis].sizes[: args.points] for axis in args.axes},
    }
    with Pool(args) as pool:
        for axis, sizes in results["sweeps"].items():
            for size in sizes:
                row = name(axis, size)
                found = results["rows"][row] = pool.measure(row, check=size == sizes[0])
                (out / "results.json").write_text(json.dumps(results, indent=1))
                of_tools = [c for t in args.tools for c in cells(t, found[t], found["gradient"])]
                print(find(row).text, size, time_of(found["gradient"]), *of_tools, flush=True)
    (out / "table.md").write_text(table(results) + "\n")
    if args.figure:
        figure(results, out / "figure.png")
    if args.page:
        publish("scaling", table(results), out / "figure.png" if args.figure else None)
    print("\n" + table(results))


if __name__ == "__main__":
    main()

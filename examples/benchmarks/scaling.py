"""How the cost of an exact GGN diagonal grows with classes C, samples N, width and depth of an MLP,
one of them at a time.

    python examples/benchmarks/scaling.py --out scaling

writes scaling/table.md, figure.png and results.json, and with --page the README.md of this folder.
harness.py says how it is measured, and how to
get the other tools. The exponent a in time ∝ C^a (and so on) is fitted to the three largest sizes;
it is below its limit while fixed costs matter."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from harness import WRONG, Pool, cell, disturbed, machine, median, parser, time_of
from page import publish
from tools import NAMES

BASE = {"N": 32, "C": 16, "width": 128, "depth": 4}
SWEEPS = {
    "C": [4, 16, 64, 256, 1024],
    "N": [8, 32, 128, 512, 2048],
    "width": [64, 128, 256, 512, 1024],
    "depth": [2, 4, 8, 16, 32],
}


def name(axis: str, size: int) -> str:
    """The row for networks.find."""
    return "mlp-" + "-".join(f"{key}{value}" for key, value in {**BASE, axis: size}.items())


def line(results: dict[str, Any], axis: str, tool: str) -> list[tuple[int, float, float]]:
    """(size, seconds, bytes) for every size at which the tool is right."""
    found = []
    for size in results["sweeps"][axis]:
        r = results["rows"][name(axis, size)][tool]
        if not math.isnan(median(r)) and (tool == "gradient" or r["error"] <= WRONG):
            found.append((size, median(r), r["bytes"]))
    return found


def exponent(points: list[tuple[int, float, float]]) -> float:
    """a in time ∝ size^a, by least squares of the logarithms at the three largest sizes."""
    points = points[-3:]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(
        [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    ).slope


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each size, a column for each tool."""
    tools = results["tools"]
    lines = [
        f"| | gradient | {' | '.join(NAMES[t] for t in tools)} |",
        "|" + "---|" * (len(tools) + 2),
    ]
    for axis, sizes in results["sweeps"].items():
        for size in sizes:
            row = results["rows"][name(axis, size)]
            lines.append(
                f"| {axis} = {size} | "
                f"{' | '.join([time_of(row['gradient']), *(cell(row[t]) for t in tools)])} |"
            )
        slopes = [exponent(line(results, axis, tool)) for tool in ("gradient", *tools)]
        lines.append(
            f"| time ∝ {axis}^a, a = | "
            f"{' | '.join('–' if math.isnan(a) else f'{a:.2f}' for a in slopes)} |"
        )
    base = ", ".join(f"{key} = {value}" for key, value in BASE.items())
    text = (
        f"MLP with ReLU, {base} where nothing else is said. "
        f"{results['machine']}.{disturbed(results['rows'])}"
    )
    return "\n".join([*lines, "", text])


def figure(results: dict[str, Any], path: Path) -> None:
    """A column of panels for each axis: time, and memory below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = results["sweeps"]
    fig, axes = plt.subplots(
        2,
        len(sweeps),
        figsize=(3.2 * len(sweeps) + 1.5, 6),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for column, axis in zip(axes.T, sweeps, strict=True):
        for i, tool in enumerate(("gradient", *results["tools"])):
            sizes, seconds, memory = (
                zip(*line(results, axis, tool), strict=True)
                if line(results, axis, tool)
                else ((), (), ())
            )
            style = {
                "color": {"gradient": "gray", "nnj": "black"}.get(tool, f"C{i}"),
                "marker": "o",
                "ms": 4,
            }
            column[0].plot(sizes, [1e3 * s for s in seconds], label=NAMES.get(tool, tool), **style)
            if tool != "gradient":
                column[1].plot(sizes, [max(b / 2**20, 0.5) for b in memory], **style)
        for panel in column:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
        column[1].set_xlabel(axis)
    axes[0, 0].set_ylabel("time [ms]")
    axes[1, 0].set_ylabel("peak memory beyond\na gradient [MiB]")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    base = ", ".join(f"{key} = {value}" for key, value in BASE.items())
    fig.suptitle(f"Exact GGN diagonal of an MLP, one size at a time; else {base}")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__, ["nnj", "backpack"], "scaling")
    options.set_defaults(repeats=3)
    options.add_argument("--axes", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    options.add_argument(
        "--points", type=int, default=5, help="how many sizes on each axis, the smallest first"
    )
    args = options.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": machine(args),
        "tools": args.tools,
        "rows": {},
        "sweeps": {axis: SWEEPS[axis][: args.points] for axis in args.axes},
    }
    with Pool(args) as pool:
        for row in dict.fromkeys(
            name(axis, size) for axis, sizes in results["sweeps"].items() for size in sizes
        ):
            found = results["rows"][row] = pool.measure(row)
            (out / "results.json").write_text(json.dumps(results, indent=1))
            print(row, *(f"{NAMES[t]}: {cell(found[t])}" for t in args.tools), sep="; ", flush=True)
    (out / "table.md").write_text(table(results) + "\n")
    if args.figure:
        figure(results, out / "figure.png")
    if args.page:
        publish("scaling", table(results), out / "figure.png" if args.figure else None)
    print("\n" + table(results))


if __name__ == "__main__":
    main()

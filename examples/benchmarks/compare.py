"""The exact GGN diagonal of cross entropy by every tool that has one: agreement, time and memory,
in a table and a figure. Or another quantity, by --quantity.

    python examples/benchmarks/compare.py --out results
    python examples/benchmarks/compare.py --quantity kfac --rows mlp-digits 3c3d --out kfac

writes results/table.md, figure.png and results.json, and with --page the README.md of this folder.
harness.py says how it is measured, and how to
get the other tools."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from harness import WRONG, Pool, cell, disturbed, machine, median, parser, time_of
from networks import ROWS
from page import publish
from quantities import QUANTITIES
from tools import NAMES

NOTHING: dict[str, Any] = {"times": [], "failed": "", "bytes": math.nan}


def ratios(row: dict[str, dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """nnj's time and memory over those of the fastest tool that is right, and its memory over that
    of the leanest.
    """
    right = {
        tool: r
        for tool, r in row.items()
        if tool not in ("nnj", "nnj-compiled", "nnj-lean", "gradient")
        and median(r) > 0
        and r["error"] <= WRONG
    }
    mine = row.get("nnj", NOTHING)
    if not right or math.isnan(median(mine)):
        return {}
    fast, lean = (
        min(right, key=lambda t: median(right[t])),
        min(right, key=lambda t: right[t]["bytes"]),
    )
    return {
        "time": (fast, median(mine) / median(right[fast])),
        "compiled": (fast, median(row.get("nnj-compiled", NOTHING)) / median(right[fast])),
        "memory": (fast, mine["bytes"] / max(right[fast]["bytes"], 2**20)),
        "leanest": (lean, mine["bytes"] / max(right[lean]["bytes"], 2**20)),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each network, a column for each tool."""
    tools = results["tools"]
    names = [NAMES[t] for t in tools]
    lines = [
        f"| network | N | C | gradient | {' | '.join(names)} | nnj ÷ fastest: time | compiled "
        "| memory |",
        "|" + "---|" * (len(names) + 7),
    ]
    for name, row in results["rows"].items():
        spec, best = ROWS[name], ratios(row)
        last = [
            f"{best[key][1]:.2g} ({NAMES[best[key][0]]})" if best and best[key][1] > 0 else "–"
            for key in ("time", "compiled", "memory")
        ]
        cells = [time_of(row["gradient"]), *(cell(row[t]) for t in tools), *last]
        lines.append(
            f"| {' | '.join([spec.text, str(spec.shape[0]), str(spec.classes), *cells])} |"
        )
    return "\n".join([*lines, "", results["machine"] + "." + disturbed(results["rows"])])


def figure(results: dict[str, Any], path: Path) -> None:
    """Time and memory of each tool, a group of points for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, tools = results["rows"], results["tools"]
    fig, axes = plt.subplots(1, 2, figsize=(12, 0.75 * len(rows) + 1.8), sharey=True)
    for axis, key, title in (
        (axes[0], "time", "time [s]"),
        (axes[1], "bytes", "peak memory beyond a gradient [MiB]"),
    ):
        for i, tool in enumerate(tools):
            xs, ys, bad = [], [], []
            for line, row in enumerate(rows.values()):
                r = row[tool]
                x = median(r) if key == "time" else max(r["bytes"] / 2**20, 0.5)
                if not math.isnan(median(r) + x):
                    xs.append(x)
                    ys.append(line + 0.3 * (i / max(len(tools) - 1, 1) - 0.5))
                    bad.append(not r["error"] <= WRONG)
            color = "black" if tool == "nnj" else f"C{i}"
            axis.scatter(
                xs,
                ys,
                s=[70 if tool == "nnj" else 45] * len(xs),
                color=color,
                label=NAMES[tool],
                zorder=3,
                marker="D" if tool == "nnj" else "o",
            )
            for x, y, wrong in zip(xs, ys, bad, strict=True):
                if wrong:
                    axis.annotate(
                        "wrong",
                        (x, y),
                        xytext=(6, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
        axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(
        range(len(rows)),
        [f"{ROWS[n].text}\nN = {ROWS[n].shape[0]}, C = {ROWS[n].classes}" for n in rows],
    )
    axes[0].invert_yaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    what = "GGN diagonal" if results["quantity"] == "ggn_diag" else results["quantity"]
    fig.suptitle(
        f"Exact {what} of cross entropy: what is missing was refused, too slow or too large"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__, [tool for tool in NAMES if tool != "nnj-lean"], "benchmark")
    options.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[r for r in ROWS if r != "tiny"]
    )
    options.add_argument("--quantity", choices=QUANTITIES, default="ggn_diag")
    args = options.parse_args()
    args.tools = [tool for tool in args.tools if tool in QUANTITIES[args.quantity]]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(args), "tools": args.tools, "rows": {}}
    results["quantity"] = args.quantity
    for row in args.rows:
        with Pool(args) as pool:
            results["rows"][row] = pool.measure(row)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(table({**results, "rows": {row: results["rows"][row]}}).splitlines()[2], flush=True)
    (out / "table.md").write_text(table(results) + "\n")
    if args.figure:
        figure(results, out / "figure.png")
    if args.page:
        whole = args.quantity == "ggn_diag" and len(args.rows) == len(ROWS) - 1
        part = "compare" if whole else f"compare-{args.quantity}"
        publish(part, table(results), out / "figure.png" if args.figure else None)
    print("\n" + table(results))


if __name__ == "__main__":
    main()

"""The exact GGN diagonal of cross entropy by every tool that has one: agreement, time and memory, in a table and a figure.

    python examples/benchmarks/compare.py --out results

Every tool runs in a process of its own, with the same weights and data, and one run of each follows another, so that a busy
machine slows them alike. Results are compared with a reference in float64 before anything is timed; what is wrong, refused,
missing or too slow is a cell that says so. Memory is the peak beyond that of a plain gradient. `pip install -e '.[benchmarks]'`
brings the other tools.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from networks import ROWS
from tools import NAMES, PACKAGES

WRONG = 1e-3  # relative error beyond which a result in float32 is called wrong


class Process:
    """One tool on one network."""

    def __init__(self, tool: str, row: str, args: argparse.Namespace, limit: float | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads),
                       "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        worker = str(Path(__file__).parent / "worker.py")
        self.pipe = subprocess.Popen([sys.executable, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True, env=environment)
        self.limit, self.failed, self.times = limit or args.limit, "", []
        self.error = self.bytes = math.nan
        self.ask("load", tool=tool, row=row, threads=args.threads, device=args.device, limit=int(args.memory * 2**30))

    def ask(self, do: str, **rest: Any) -> dict[str, Any]:
        """Its answer; after a failure, none."""
        if self.failed:
            return {}
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        self.pipe.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self.pipe.stdin.flush()
        ready, _, _ = select.select([self.pipe.stdout], [], [], self.limit)
        line = self.pipe.stdout.readline() if ready else ""
        answer = json.loads(line) if line else {"failed": "out of memory" if ready else f"> {self.limit:.0f} s"}
        if "failed" in answer:
            self.failed = answer["failed"]
            self.close()
        return answer

    def close(self) -> None:
        self.pipe.kill()
        self.pipe.wait()

    @property
    def time(self) -> float:
        return statistics.median(self.times) if self.times else math.nan

    def summary(self) -> dict[str, Any]:
        return {"failed": self.failed, "error": self.error, "bytes": self.bytes, "times": self.times}


def measure(row: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All tools on one network."""
    path = Path(args.out).resolve() / f"reference-{row}.pt"
    if not path.exists():
        reference = Process("reference", row, args, limit=3600)
        reference.ask("time")
        reference.ask("save", path=str(path))
        reference.close()
        if reference.failed:
            raise SystemExit(f"the reference of {row} failed: {reference.failed}")
    alive: dict[str, Process] = {}
    for tool in ("gradient", *args.tools):
        process = alive[tool] = Process(tool, row, args)
        process.ask("time")  # the first run is no measure: it loads and compiles
        if tool != "gradient":
            process.error = process.ask("check", path=str(path)).get("error", math.nan)
            process.bytes = process.ask("memory").get("bytes", math.nan)
    for _ in range(args.repeats):
        for process in alive.values():
            answer = process.ask("time")
            if answer and "seconds" in answer:
                process.times.append(answer["seconds"])
    for process in alive.values():
        process.close()
    return {tool: process.summary() for tool, process in alive.items()}


def ratios(row: dict[str, dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """nnj's time and memory over those of the best tool that is right: {"time": (tool, ratio), "memory": ...}."""
    right = {tool: r for tool, r in row.items() if tool not in ("nnj", "gradient") and r["times"] and r["error"] <= WRONG}
    mine = row.get("nnj", {})
    if not right or not mine.get("times"):
        return {}
    time = lambda r: statistics.median(r["times"])
    fast, lean = min(right, key=lambda t: time(right[t])), min(right, key=lambda t: right[t]["bytes"])
    return {"time": (fast, time(mine) / time(right[fast])),
            "memory": (fast, mine["bytes"] / max(right[fast]["bytes"], 1)),
            "leanest": (lean, mine["bytes"] / max(right[lean]["bytes"], 1))}


def cell(r: dict[str, Any]) -> str:
    if r["failed"]:
        return r["failed"].split(":")[0] if r["failed"].startswith("missing") else r["failed"][:60]
    times = sorted(r["times"])
    text = f"{statistics.median(times) * 1e3:.3g} ms ({times[0] * 1e3:.3g}–{times[-1] * 1e3:.3g}), {r['bytes'] / 2**20:.0f} MiB"
    return text if r["error"] <= WRONG else f"wrong by {r['error']:.1g}: {text}"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each network, a column for each tool."""
    tools = results["tools"]
    names = [NAMES[t] for t in tools]
    lines = [f"| network | N | C | gradient | {' | '.join(names)} | nnj ÷ fastest: time | memory |",
             "|" + "---|" * (len(names) + 6)]
    for name, row in results["rows"].items():
        spec, best = ROWS[name], ratios(row)
        gradient = f"{statistics.median(row['gradient']['times']) * 1e3:.3g} ms" if row["gradient"]["times"] else "–"
        last = [f"{best[key][1]:.2g} ({NAMES[best[key][0]]})" if best else "–" for key in ("time", "memory")]
        cells = [cell(row[t]) for t in tools]
        lines.append(f"| {' | '.join([spec.text, str(spec.shape[0]), str(spec.classes), gradient, *cells, *last])} |")
    return "\n".join([*lines, "", results["machine"] + "."])


def machine(args: argparse.Namespace) -> str:
    """What the figures were measured on."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
        processor = models[0] if models else processor
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{processor}, {args.threads} threads"
    versions = []
    for tool in args.tools:
        try:
            versions.append(f"{PACKAGES[tool]} {importlib.metadata.version(PACKAGES[tool])}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{PACKAGES[tool]} missing")
    return (f"{datetime.date.today()}, {where}, float32, torch {torch.__version__}, Python {platform.python_version()}; "
            f"{', '.join(dict.fromkeys(versions))}; median of {args.repeats} interleaved runs (fastest–slowest), "
            f"peak memory beyond a plain gradient")


def figure(results: dict[str, Any], path: Path) -> None:
    """Time and memory of each tool, a group of points for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, tools = results["rows"], results["tools"]
    fig, axes = plt.subplots(1, 2, figsize=(12, 0.75 * len(rows) + 1.8), sharey=True)
    for axis, key, title in ((axes[0], "time", "time [s]"), (axes[1], "bytes", "peak memory beyond a gradient [MiB]")):
        for i, tool in enumerate(tools):
            xs, ys, bad = [], [], []
            for place, row in enumerate(rows.values()):
                r = row[tool]
                if r["times"]:
                    xs.append(statistics.median(r["times"]) if key == "time" else max(r["bytes"] / 2**20, 0.5))
                    ys.append(place + 0.3 * (i / max(len(tools) - 1, 1) - 0.5))
                    bad.append(not r["error"] <= WRONG)
            color = "black" if tool == "nnj" else f"C{i}"
            axis.scatter(xs, ys, s=[70 if tool == "nnj" else 45] * len(xs), color=color, label=NAMES[tool], zorder=3,
                         marker="D" if tool == "nnj" else "o")
            for x, y, wrong in zip(xs, ys, bad, strict=True):
                if wrong:
                    axis.annotate("wrong", (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{ROWS[n].text}\nN = {ROWS[n].shape[0]}, C = {ROWS[n].classes}" for n in rows])
    axes[0].invert_yaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    fig.suptitle("Exact GGN diagonal of cross entropy: what is missing was refused, too slow or too large")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[r for r in ROWS if r != "tiny"])
    parser.add_argument("--tools", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one run may take")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a process may use")
    parser.add_argument("--out", default="benchmark")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(args), "tools": args.tools, "rows": {}}
    for row in args.rows:
        results["rows"][row] = measure(row, args)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(table({**results, "rows": {row: results["rows"][row]}}).splitlines()[2], flush=True)
    (out / "table.md").write_text(table(results) + "\n")
    figure(results, out / "figure.png")
    print("\n" + table(results))


if __name__ == "__main__":
    main()

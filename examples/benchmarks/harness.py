"""What compare.py and scaling.py share: tools in processes of their own, measured in turn on the
same weights and data.

Every tool runs in its own process (worker.py) with its own idiomatic code (tools.py), on the same
cores and as many threads, in float32. Its first run is no measure: it loads and compiles. Its
result is compared with a reference in float64 (plain autograd) before it is timed. Then one run of
each tool follows another, so that a busy machine slows them alike. Memory is the peak of a run
beyond that of a plain gradient in the same process: of the process (Linux; to a few MiB), or on a
GPU of the allocator. Another program on one of the cores makes all that has threads slow, many
times over: the table says where there was one.

What goes wrong becomes a cell that says so: wrong, refused, missing, crashed, out of memory, or
longer than the limit.

`pip install -e '.[benchmarks]'` brings the other tools. On a GPU: `--device cuda`; JAX is refused
there unless its jaxlib has one. Results are kept in --out; so are the references, which are read
again where they exist: delete them with a change of networks.py."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from page import option
from tools import NAMES, PACKAGES
from worker import OUT

WORKER = Path(__file__).parent / "worker.py"
WRONG = 1e-3  # relative error beyond which a result in float32 is called wrong
PATIENCE = 3600.0  # seconds for a command to the reference, which is exact and slow


def busy(threads: int) -> float:
    """Seconds so far in which the cores of the workers did anything, or were taken by the host
    (Linux; elsewhere 0).
    """
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    cores = {f"cpu{i}" for i in sorted(os.sched_getaffinity(0))[:threads]}  # as in worker.py
    found = 0
    for name, *values in map(str.split, path.read_text().splitlines()):
        if name in cores:
            # left out: idle, and waiting for disks
            user, nice, system, _, _, *rest = map(int, values[:8])
            found += user + nice + system + sum(rest)
    return found / os.sysconf("SC_CLK_TCK")


class Process:
    """One tool. After a failure it is dead and says why."""

    def __init__(self, tool: str, args: argparse.Namespace):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(args.threads),
            "MKL_NUM_THREADS": str(args.threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if args.device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self.tool, self.limit, self.failed = (
            tool,
            PATIENCE if tool == "reference" else args.limit,
            "",
        )
        self.threads = args.threads if args.device == "cpu" else 0
        self.stderr = tempfile.TemporaryFile()
        self.pipe = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=environment,
        )
        self.clear()
        self.ask(
            "start",
            tool=tool,
            quantity=args.quantity,
            threads=args.threads,
            device=args.device,
            limit=int(args.memory * 2**30),
        )
        self.started = not self.failed

    def clear(self) -> None:
        self.times: list[float] = []
        self.error = self.bytes = self.results = math.nan
        # seconds by the clock, and of cores that other programs had meanwhile
        self.spent = self.others = 0.0

    def load(self, row: str) -> None:
        """Go on with another network."""
        self.clear()
        self.ask("load", row=row)

    def ask(self, do: str, **rest: Any) -> dict[str, Any]:
        """Its answer; after a failure, none."""
        if self.failed:
            return {}
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        start, ready, line = time.monotonic(), True, ""
        try:
            self.pipe.stdin.write(json.dumps({"do": do, **rest}) + "\n")
            self.pipe.stdin.flush()
            ready = bool(select.select([self.pipe.stdout], [], [], self.limit)[0])
            line = self.pipe.stdout.readline() if ready else ""
        except BrokenPipeError:
            pass  # it died since the last command, which `death` explains
        self.spent += time.monotonic() - start
        answer = (
            json.loads(line)
            if line
            else {"failed": self.death() if ready else f"> {self.limit:g} s"}
        )
        if "failed" in answer:
            self.failed = answer["failed"]
            self.close()
        return answer

    def time(self) -> float:
        """Seconds of one run; nan after a failure."""
        before, start = busy(self.threads), time.monotonic()
        answer = self.ask("time")
        if "seconds" not in answer:
            return math.nan
        others = (busy(self.threads) - before - answer["used"]) / (time.monotonic() - start)
        self.others = max(self.others, others)
        return answer["seconds"]

    def death(self) -> str:
        """Why the process is gone."""
        code = self.pipe.wait()
        self.stderr.seek(0)
        text = self.stderr.read().decode(errors="replace")
        if code == -signal.SIGKILL or any(s in text for s in OUT):
            return "out of memory"
        return f"crashed ({signal.Signals(-code).name if code < 0 else f'exit {code}'})"

    def close(self) -> None:
        self.pipe.kill()
        self.pipe.communicate()
        self.stderr.close()

    def summary(self) -> dict[str, Any]:
        return {
            "failed": self.failed,
            "error": self.error,
            "bytes": self.bytes,
            "results": self.results,
            "times": self.times,
            "others": self.others,
        }


class Pool:
    """The processes of one run, ended with it. What died on one network starts again for the
    next.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.processes = args, dict[str, Process]()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if not process.failed:
                process.close()

    def get(self, tool: str, row: str) -> Process:
        """The process of a tool, with the network loaded."""
        process = self.processes.get(tool)
        if process is None or (process.failed and process.started):
            process = self.processes[tool] = Process(tool, self.args)
        process.load(row)
        return process

    def reference(self, row: str) -> Path:
        """The file of the reference."""
        of = "" if self.args.quantity == "ggn_diag" else f"{self.args.quantity}-"
        path = Path(self.args.out).resolve() / f"reference-{of}{row}.pt"
        if not path.exists():
            process = self.get("reference", row)
            process.ask("time", least=0.0)
            process.ask("save", path=str(path))
            if process.failed:
                raise SystemExit(f"the reference of {row} failed: {process.failed}")
        return path

    def measure(self, row: str, check: bool = True) -> dict[str, dict[str, Any]]:
        """All tools on one network, and a plain gradient; results are compared only where it is
        asked for.
        """
        path, alive = self.reference(row) if check else None, list[Process]()
        for tool in ("gradient", *self.args.tools):
            process = self.get(tool, row)
            alive.append(process)
            process.ask("time")
            if tool != "gradient":
                if path is not None:
                    process.error = process.ask("check", path=str(path)).get("error", math.nan)
                found = process.ask("memory")
                process.bytes = found.get("bytes", math.nan)
                process.results = found.get("results", math.nan)
        for _ in range(self.args.repeats):
            for process in alive:
                if process.times and process.spent > process.limit:
                    continue  # a slow tool repeats less, so that the whole ends
                seconds = process.time()
                if not math.isnan(seconds):
                    process.times.append(seconds)
        return {process.tool: process.summary() for process in alive}


def median(r: dict[str, Any]) -> float:
    """Seconds; nan where nothing was measured."""
    return statistics.median(r["times"]) if r["times"] and not r["failed"] else math.nan


def lasting(*seconds: float) -> str:
    """Seconds, from one to the last, in the unit that suits the first."""
    factor, unit = (1.0, "s") if seconds[0] >= 0.9995 else (1e3, "ms")
    found = [f"{s * factor:.3g}" if s * factor < 999.5 else f"{s * factor:.0f}" for s in seconds]
    return f"{found[0]} {unit}" + (f" ({'–'.join(found[1:])})" if found[1:] else "")


def time_of(r: dict[str, Any]) -> str:
    return "–" if math.isnan(median(r)) else lasting(median(r))


def cell(r: dict[str, Any]) -> str:
    """What a table says of one tool on one network: time (fastest–slowest), memory, error."""
    if r["failed"]:
        return textwrap.shorten(r["failed"].replace("|", "/"), 60, placeholder=" …")
    memory = "" if math.isnan(r["bytes"]) else f", {r['bytes'] / 2**20:.0f} MiB"
    text = f"{lasting(median(r), min(r['times']), max(r['times']))}{memory}"
    return (
        f"{text}, error {r['error']:.0e}"
        if r["error"] <= WRONG
        else f"wrong by {r['error']:.1g}: {text}"
    )


def disturbed(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A sentence where other programs had more than a quarter of a core during a run: such a table
    is to be made again.
    """
    most = max((r["others"] for row in rows.values() for r in row.values()), default=0.0)
    return (
        f" **Disturbed:** other programs used up to {most:.1f} cores meanwhile."
        if most > 0.25
        else ""
    )


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} missing"


def where(threads: int, device: str = "cpu") -> str:
    """When and on what something is measured."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            s.split(":")[1].strip()
            for s in Path("/proc/cpuinfo").read_text().splitlines()
            if s.startswith("model name")
        ]
        processor = models[0] if models else processor
    on = f"{processor}, {threads} thread{'s' * (threads > 1)}"
    return (
        f"{datetime.date.today()}, {torch.cuda.get_device_name() if device != 'cpu' else on}, "
        f"float32, torch {torch.__version__}, Python {platform.python_version()}"
    )


def machine(args: argparse.Namespace) -> str:
    """When, on what and with which versions the figures of a table of tools were measured."""
    versions = [version(p) for tool in args.tools for p in PACKAGES[tool]]
    return (
        f"{where(args.threads, args.device)}; {', '.join(versions)}; median of {args.repeats} "
        "interleaved runs (fastest–slowest), peak memory beyond a plain gradient, largest error "
        "relative to the largest entry of a parameter"
    )


def parser(text: str | None, tools: list[str], out: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--tools", nargs="+", choices=NAMES, default=tools)
    found.set_defaults(quantity="ggn_diag")
    found.add_argument("--repeats", type=int, default=7)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument(
        "--limit",
        type=float,
        default=120.0,
        help="seconds for one command; after them runs repeat no more",
    )
    found.add_argument(
        "--memory", type=float, default=16.0, help="GiB that one tool may use; all share one GPU"
    )
    found.add_argument("--out", default=out)
    found.add_argument(
        "--no-figure", dest="figure", action="store_false", help="for those without matplotlib"
    )
    option(found)
    return found

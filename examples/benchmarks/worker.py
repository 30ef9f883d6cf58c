"""A process that runs one tool on one network: it reads commands, a line of JSON each, and answers in the same way.

Runs of several tools can so be interleaved, though none shares a process with another. See compare.py.
"""
from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(device: str, reset: bool = False) -> int:
    """The largest memory in use since the last reset, in bytes: of the process (Linux), or of the GPU."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Worker:
    """What it was told to load, and what it answers."""

    run: Callable[[], Any]

    def load(self, tool: str, row: str, threads: int, device: str, limit: int) -> dict[str, Any]:
        if device == "cpu":
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        import torch
        from networks import ROWS
        from tools import TOOLS

        torch.set_num_threads(threads)
        self.device = device
        dtype = torch.float64 if tool == "reference" else torch.float32
        self.model, self.x, self.y = ROWS[row].make(device, dtype)
        self.base = 0
        if tool != "gradient":
            plain = TOOLS["gradient"](self.model, self.x, self.y)
            plain()
            peak(device, reset=True)
            plain()
            self.base = peak(device)
            self.model.zero_grad()
        self.run = TOOLS[tool](self.model, self.x, self.y)
        return {}

    def time(self, least: float = 0.3) -> dict[str, Any]:
        """The median of as many runs as fit into `least` seconds, one at least: short runs are not those of cold caches."""
        seconds: list[float] = []
        while sum(seconds) < least:
            start = time.perf_counter()
            self.result = self.run()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds)}

    def wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def memory(self) -> dict[str, Any]:
        """Peak memory of a run beyond that of a plain gradient. Errors and what it leaves behind are the tool's own."""
        self.result = None
        for p in self.model.parameters():
            p.grad = None
        peak(self.device, reset=True)
        self.run()
        return {"bytes": max(0, peak(self.device) - self.base)}

    def save(self, path: str) -> dict[str, Any]:
        import torch

        torch.save([t.cpu() for t in self.result], path)
        return {}

    def check(self, path: str) -> dict[str, Any]:
        """The largest error of a parameter, relative to its largest entry."""
        import torch

        errors = []
        for found, expected in zip(self.result, torch.load(path), strict=True):
            scale = float(expected.abs().max()) or 1.0
            difference = (found.detach().cpu().double().reshape(expected.shape) - expected).abs().max()
            errors.append(float(difference) / scale)
        return {"error": max(e if e == e else float("inf") for e in errors)}


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    sys.path.insert(0, str(Path(__file__).parent))
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except MemoryError:
            answer = {"failed": "out of memory"}
        except Exception as error:
            text = (str(error) or type(error).__name__).strip().splitlines()[0]
            memory = any(s in text for s in ("can't allocate memory", "out of memory", "bad_alloc", "RESOURCE_EXHAUSTED"))
            missing = isinstance(error, ModuleNotFoundError)
            answer = {"failed": "out of memory" if memory else f"{'missing' if missing else type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

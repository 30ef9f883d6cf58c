"""A process that runs one tool on one network after another: it reads commands, a line of JSON
each, and answers in the same way.

Runs of several tools can so be interleaved, though none shares a process with another. See
harness.py."""

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

# how libraries say that memory is out
OUT = ("can't allocate memory", "out of memory", "bad_alloc", "RESOURCE_EXHAUSTED")


def peak(device: str, reset: bool = False) -> float:
    """The largest memory in use since the last reset, in bytes: of the process (Linux), or of torch
    on the GPU.
    """
    import torch

    if reset:
        gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


class Worker:
    """What it was told to load, and what it answers."""

    run: Callable[[], Any]

    def start(
        self, tool: str, quantity: str, threads: int, device: str, limit: int
    ) -> dict[str, Any]:
        """Import all that the tool needs, and run it once on the smallest network: libraries are
        not its memory.
        """
        if device == "cpu":
            # for those that ask how many cores there are, and not OMP_NUM_THREADS
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        import torch
        from networks import ROWS
        from quantities import QUANTITIES

        torch.set_num_threads(threads)
        if device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            part = min(1.0, limit / torch.cuda.get_device_properties(device).total_memory)
            torch.cuda.set_per_process_memory_fraction(part)
            os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(part)
        self.tool, self.device, self.result = tool, device, None
        self.tools = QUANTITIES[quantity]
        if tool not in self.tools:
            raise NotImplementedError(f"it has no {quantity}")
        self.tools[tool](*ROWS["tiny"].make(device, self.dtype))()
        return {}

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float64 if self.tool == "reference" else torch.float32

    def load(self, row: str) -> dict[str, Any]:
        """Draw weights and data, and see what a plain gradient needs."""
        from networks import find

        self.result = self.run = None  # what was loaded before goes
        self.model, x, y = find(row).make(self.device, self.dtype)
        plain = self.tools["gradient"](self.model, x, y)
        plain()
        self.model.zero_grad()
        peak(self.device, reset=True)
        plain()
        self.base = peak(self.device)
        self.model.zero_grad()
        self.run = self.tools[self.tool](self.model, x, y)
        return {}

    def time(self, least: float = 0.3) -> dict[str, Any]:
        """The median of as many runs as fit into `least` seconds, one at least: short runs are not
        those of cold caches.
        """
        seconds: list[float] = []
        used = time.process_time()
        while not seconds or sum(seconds) < least:
            self.wait()
            start = time.perf_counter()
            self.result = self.run()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds), "used": time.process_time() - used}

    def wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def memory(self) -> dict[str, Any]:
        """Peak memory of a run beyond that of a plain gradient, and what its results take. What
        the tool keeps from run to run is its own.
        """
        self.result = None
        self.model.zero_grad()
        peak(self.device, reset=True)
        self.result = self.run()
        top = peak(self.device)
        # torch does not see it; it has weights and data of its own
        if self.tool == "jax" and self.device != "cpu":
            import jax

            top = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        results = sum(t.numel() * t.element_size() for t in self.result)
        return {"bytes": max(0, top - self.base), "results": results} if top == top else {}

    def save(self, path: str) -> dict[str, Any]:
        import torch

        torch.save([t.detach().cpu() for t in self.result], path)
        return {}

    def check(self, path: str) -> dict[str, Any]:
        """The largest error of a parameter, relative to its largest entry."""
        import torch

        errors, references = [], torch.load(path)
        if [t.numel() for t in self.result] != [t.numel() for t in references]:
            return {"error": float("inf")}
        for found, expected in zip(self.result, references, strict=True):
            scale = float(expected.abs().max()) or 1.0
            difference = (
                (found.detach().cpu().double().reshape(expected.shape) - expected).abs().max()
            )
            errors.append(float(difference) / scale)
        return {"error": max(e if e == e else float("inf") for e in errors)}


def failure(error: Exception) -> str:
    """One line: out of memory, missing a module, refused by the tool, or the error itself."""
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    if isinstance(error, MemoryError) or any(s in str(error) for s in OUT):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"missing: {error.name}"
    return (
        f"refused: {text}"
        if isinstance(error, NotImplementedError)
        else f"{type(error).__name__}: {text}"
    )


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
        except Exception as error:
            answer = {"failed": failure(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
